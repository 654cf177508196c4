"""Do layers, or models, arrange the same items alike? CKA, SVCCA, Procrustes and mutual nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar, Literal, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.labelled_states import STATES, need_images
from probes.similarity import (
    MEASURES,
    Similarity,
    linear_cka,
    measured,
    mutual_knn,
    procrustes,
    random_matching,
    svcca,
    unbiased_cka,
)
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import GatheringProbe, Part, Probe, ProbeResult, Site, Trace
from slitlamp.tracing.probe import Array, Labels

POSITIONS = ("last", "image_mean", "text_mean")


@dataclass
class RepresentationSimilarity(GatheringProbe):
    """How alike two layers arrange the same items; between models, in `compare`.

    One state per item and layer. Every value stands beside what items matched at random give: with few items against many
    dimensions that is far from 0 (for SVCCA it may be near 1).

    Attributes:
        site: "resid_post", "resid_pre", "resid_mid", "attn_out", "mlp_out", "ln1", "ln2", "z" or "mlp_post".
        position: "last" (the last position of the prompt), "image_mean" or "text_mean" (of the text after the image).
        layers: 0-based; None for all.
        measures: "cka" (linear), "cka_unbiased", "svcca", "procrustes", "mutual_knn".
        k: neighbours of mutual_knn [?: 10, as in Huh et al.].
        share: of the variance that SVCCA keeps (.99 in the paper).
        n_permutations: random matchings of the items, those of an image together.
        n_parts: that the jackknife leaves out one of; whole images.
        seed: of the matchings and the parts.
    """

    site: str = "resid_post"
    position: Literal["last", "image_mean", "text_mean"] = "image_mean"
    layers: Sequence[int] | None = None
    measures: Sequence[str] = ("cka", "cka_unbiased", "svcca", "procrustes", "mutual_knn")
    k: int = 10
    share: float = 0.99
    n_permutations: int = 19
    n_parts: int = 10
    seed: int = 0
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "representation_similarity"
    no_target: ClassVar[str] = (
        "how alike two layers arrange a set of items is a property of the set, not a place in the model."
    )

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """One state per item."""
        for what, values, known in (
            ("site of states", [self.site], tuple(STATES)),
            ("position", [self.position], POSITIONS),
            ("similarity", self.measures, MEASURES),
        ):
            for one in values:
                if one not in known:
                    raise unknown(what, one, known)
        if not self.measures or self.k < 1 or not 0 < self.share <= 1 or self.n_permutations < 0 or self.n_parts < 2:
            raise InputError("needs a measure, k from 1, share in (0, 1], n_permutations from 0 and n_parts from 2")
        make = STATES[self.site]
        if self.position == "last":
            return [make(self.layers, "before_generated", label="state")]  # the first of them
        return [
            make(self.layers, "image" if self.position == "image_mean" else "text_after_image", "mean", label="state")
        ]

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch."""
        if self.position != "last":
            need_images(batch)
        states = trace["state"].stack().float()  # [layer, batch, (position,) ...]
        states = states[:, :, 0] if self.position == "last" else states
        self._constants(layer=np.array(trace["state"].layers))
        self._rows(
            item=np.array(batch.ids, dtype=str),
            group=np.array(batch.groups, dtype=str),
            state=states.flatten(2).transpose(0, 1).cpu().numpy(),
        )

    def result(self) -> ProbeResult:
        """Table `layers`: one row per measure and pair of layers."""
        states, layer = self._get("state").astype(np.float64), self._get("layer")
        pairs = [(int(a), int(b)) for a, b in combinations(range(len(layer)), 2)]
        if not pairs:
            raise InputError("similarity needs at least two layers; take more, or compare models")
        table = self._measure(states, states, pairs, self._get("group"))
        table.insert(1, "layer_a", [int(layer[a]) for a, _ in pairs] * len(self.measures))
        table.insert(2, "layer_b", [int(layer[b]) for _, b in pairs] * len(self.measures))
        first = table[table["measure"] == self.measures[0]]
        low = first.loc[first["value"].idxmin()]
        text = (
            f"{low['measure']} between layers ({self.site}, {self.position.replace('_', ' ')}) is lowest between layers "
            f"{int(low['layer_a'])} and {int(low['layer_b'])}: {low['value']:.2f} [{low['low']:.2f}, {low['high']:.2f}], "
            f"{low['null']:.2f} for items matched at random (n = {int(low['n_items'])})."
        )
        return ProbeResult(self.name, {"layers": table}, text)

    def _measure(self, x: Array, y: Array, pairs: list[tuple[int, int]], group: Array) -> pd.DataFrame:
        """Rows by measure, then pair, of states [item, layer, d]."""
        n = len(x)
        rng = np.random.default_rng(self.seed)
        names, index = np.unique(group, return_inverse=True)
        if len(names) < 2:
            raise InputError(f"similarity needs at least two images: found {len(names)}")
        part = rng.permutation(np.arange(len(names)) % min(self.n_parts, len(names)))[index]
        orders = [random_matching(index, rng) for _ in range(self.n_permutations)]
        a, b = ([torch.from_numpy(np.ascontiguousarray(side[:, i])) for i in range(side.shape[1])] for side in (x, y))
        rows = [
            {"measure": name, **_row(measured(a[i], b[j], function, part, orders)), "n_items": n}
            for name, function in self._functions(n)
            for i, j in pairs
        ]
        return pd.DataFrame(rows)

    def _functions(self, n_items: int) -> Iterator[tuple[str, Callable[[Tensor, Tensor], float]]]:
        # the jackknife leaves items out, and fewer than k others may be left of few
        k = max(1, min(self.k, (n_items - -(-n_items // min(self.n_parts, n_items))) - 1))
        known: dict[str, Callable[[Tensor, Tensor], float]] = {
            "cka": linear_cka,
            "cka_unbiased": unbiased_cka,
            "svcca": lambda x, y: svcca(x, y, self.share),
            "procrustes": procrustes,
            "mutual_knn": lambda x, y: mutual_knn(x, y, k),
        }
        for name in self.measures:
            yield name, known[name]

    @classmethod
    def compare(cls, parts: Mapping[Part, Probe], scores: pd.DataFrame | None = None) -> ProbeResult | None:
        """Models on the same items: table `models`, every layer of one against every layer of the other."""
        tables = []
        for (one, probe), (two, second) in combinations(parts.items(), 2):
            if one.model == two.model or (one.condition, one.dataset) != (two.condition, two.dataset):
                continue
            first, other = cast("RepresentationSimilarity", probe), cast("RepresentationSimilarity", second)
            shared, mine, theirs = np.intersect1d(first._get("item"), other._get("item"), return_indices=True)
            if len(shared) < 2:
                continue
            x, y = first._get("state")[mine].astype(np.float64), other._get("state")[theirs].astype(np.float64)
            pairs = [(a, b) for a in range(x.shape[1]) for b in range(y.shape[1])]
            table = first._measure(x, y, pairs, first._get("group")[mine])
            table.insert(0, "model_a", one.model)
            table.insert(1, "model_b", two.model)
            table.insert(2, "condition", one.condition)
            table.insert(3, "dataset", one.dataset)
            table.insert(5, "layer_a", [int(first._get("layer")[a]) for a, _ in pairs] * len(first.measures))
            table.insert(6, "layer_b", [int(other._get("layer")[b]) for _, b in pairs] * len(first.measures))
            tables.append(table)
        if not tables:
            return None
        found = pd.concat(tables, ignore_index=True)
        rows = found[found["measure"] == found["measure"].iloc[0]]
        best = rows.loc[rows["value"].idxmax()]
        text = (
            f"{best['model_a']} and {best['model_b']} are most alike at layers {int(best['layer_a'])} and "
            f"{int(best['layer_b'])}: {best['measure']} {best['value']:.2f} [{best['low']:.2f}, {best['high']:.2f}], "
            f"{best['null']:.2f} for items matched at random (n = {int(best['n_items'])})."
        )
        return ProbeResult(cls.name, {"models": found}, text)


def _row(one: Similarity) -> dict[str, float]:
    """Columns of a table; no similarity exceeds 1, but the jackknife does not know it."""
    return {**vars(one), "high": min(one.high, 1.0)}
