"""Which weights image and text tokens activate (IMA: Shukor and Cord, NeurIPS 2024, arXiv 2405.16700, section 4)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch

from probes.overlaps import TokenSet, overlaps
from probes.subnetwork_tables import Named, compare_sets, iou_tables, joint_table, summary
from probes.wanda import matrices, save_masks
from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import GatheringProbe, Probe, ProbeResult, Site, Trace
from slitlamp.tracing.probe import Labels, Part
from slitlamp.tracing.sites import Positions
from slitlamp.tracing.trace import Source

Text = Literal["text_after_image", "text", "generated"]
TEXTS: tuple[str, ...] = ("text_after_image", "text", "generated")
IMAGE, TEXT = "image", "text"


@dataclass
class Subnetworks(GatheringProbe):
    """The weights that image tokens and text tokens activate, by Wanda's score, and how far they overlap (IoU).

    The score of a weight is |W_ij| ||X_j||, X_j being the j-th input over the tokens of one kind; in every output row the
    lowest share of the scores is dropped. Both kinds share |W|, so the IoU lies above that of random masks whatever the
    tokens do. Beside it stand therefore: the IoU of random masks; that of the same weights with the text's norms dealt out
    at random to the inputs; and that of two halves of the items within one kind, which is what the number of items allows.

    Items are gathered in folds by a hash of their group (their image), so that memory does not grow with them; intervals
    leave out one fold at a time (jackknife). Masks are made in `result`, which needs the model's weights: `source_` is set by
    `update`, and by an experiment on what it has merged.

    Padding is never among the tokens. Norms are of the model as it is, and not, as in Wanda's released code, of a model
    whose lower layers are pruned already.

    Attributes:
        sparsities: shares of every row that are dropped.
        text: what text is: "text_after_image" (IMA's, generated tokens included), "text" or "generated".
        layers: 0-based; None for all.
        folds: number of folds.
        shuffles: over how many random dealings the control of shuffled norms is averaged.
        seed: of the shuffles.
    """

    sparsities: Sequence[float] = (0.3, 0.5)
    text: Text = "text_after_image"
    layers: Sequence[int] | None = None
    folds: int = 8
    shuffles: int = 3
    seed: int = 0
    source_: Source | None = field(default=None, init=False, repr=False, compare=False)
    """The model whose weights are looked at."""
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "subnetworks"
    no_target: ClassVar[str] = (
        "the finding is a set of weights, not a place among the states: run the model with these weights alone as a condition "
        "(interventions.SubnetMask), whose controls keep as many weights, the largest or random ones."
    )

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The inputs of the blocks' linear maps, at image tokens and at text tokens."""
        if not self.sparsities or not all(0 < one < 1 for one in self.sparsities):
            raise InputError(f"{self.name}: sparsities lie between 0 and 1, found {list(self.sparsities)}")
        if self.text not in TEXTS:
            raise unknown(f"{self.name} text", str(self.text), TEXTS)
        if self.folds < 2 or self.shuffles < 1:
            raise InputError(f"{self.name}: folds must be 2 or more and shuffles 1 or more")
        if anatomy.family.cross is not None:
            raise UnsupportedError(
                f"{anatomy.family.name} reads the image by cross-attention: no image tokens go through its blocks"
            )
        where: dict[str, set[int]] = {}
        for one in matrices(anatomy, self.layers):
            where.setdefault(one.site, set()).add(one.layer)
        places: tuple[tuple[str, Positions], ...] = ((IMAGE, "image"), (TEXT, self.text))
        return [
            Site(site, tuple(sorted(layers)), positions, label=f"{site} {kind}")
            for site, layers in where.items()
            for kind, positions in places
        ]

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch."""
        blind = [name for name, has in zip(batch.ids, batch.image_mask.any(dim=1).tolist(), strict=True) if not has]
        if blind:
            raise InputError(f"{self.name} needs an image in every row; none in: {', '.join(blind)}")
        self.source_ = trace.source
        folds = [_fold(group, self.folds) for group in batch.groups]
        for fold in sorted(set(folds)):
            self._sums(**{f"items.{fold}": np.array(folds.count(fold))})
        for label in trace.sites:
            site, kind = label.split()
            layers = trace[label].layers
            if not layers:  # no row of this batch has such tokens
                continue
            self._constants(**{f"layers.{site}": np.array(layers)})
            real = trace.mask(label)
            rows = torch.stack([_squares(trace[label][layer], real).cpu() for layer in layers], dim=1).double()
            self._sums(**{f"tokens.{kind}.{site}": real.sum().cpu().numpy()})
            for fold in sorted(set(folds)):
                chosen = torch.tensor([one == fold for one in folds])
                self._sums(**{f"squares.{site}.{kind}.{fold}": rows[chosen].sum(dim=0).numpy()})

    def merge(self, other: Probe) -> None:
        """Add what another probe gathered."""
        super().merge(other)
        if isinstance(other, Subnetworks) and self.source_ is None:
            self.source_ = other.source_

    def token_set(self, kind: str) -> TokenSet:
        """What was gathered of the tokens of one kind, "image" or "text".

        Raises:
            InputError: nothing was, or the weights are not known.
        """
        if kind not in (IMAGE, TEXT):
            raise unknown("kind of tokens", kind, (IMAGE, TEXT))
        items = np.array(
            [self._get(f"items.{fold}") if self._has(f"items.{fold}") else 0 for fold in range(self.folds)]
        )
        if not items.any():
            self._get("items")  # raises: nothing was taken in
        if self.source_ is None:
            raise InputError(
                f"{self.name} keeps no weights: after load_state, set source_ to the model (a trace of it has it as "
                "trace.source)"
            )
        found = matrices(self.source_.anatomy, self.layers)
        squares, layers = {}, {}
        for site in dict.fromkeys(one.site for one in found):
            if not self._has(f"tokens.{kind}.{site}") or not self._get(f"tokens.{kind}.{site}"):
                raise InputError(f"{self.name}: no {kind} tokens among the items ({self.text!r} for text)")
            layers[site] = self._get(f"layers.{site}").astype(np.int64)
            keys = [f"squares.{site}.{kind}.{fold}" for fold in range(self.folds)]
            one = next(self._get(key) for key in keys if self._has(key))
            squares[site] = np.stack([self._get(key) if self._has(key) else np.zeros_like(one) for key in keys])
        return TokenSet(self.source_, {one.key: one for one in found}, squares, layers, items.astype(np.int64))

    def result(self) -> ProbeResult:
        """Tables `iou`, `iou_by_type` and `alpha_subnet`."""
        image, text = self.token_set(IMAGE), self.token_set(TEXT)
        folds = np.flatnonzero(image.items).tolist()
        found = overlaps([image, text], [(0, 1)], self.sparsities, groups=[(0, 1)], folds=folds)
        shuffled = [text.shuffled(self.seed * 1_000_003 + number) for number in range(self.shuffles)]
        halves = [one for pair in (image.halves(), text.halves()) for one in pair or ()]
        controls = overlaps(
            [image, *shuffled, *halves],
            [(0, 1 + number) for number in range(self.shuffles)]
            + [(1 + self.shuffles + number, 2 + self.shuffles + number) for number in range(0, len(halves), 2)],
            self.sparsities,
        ).iou[0]
        missing = np.full(controls.shape[1:], np.nan)
        beside = {
            "shuffled": controls[: self.shuffles].mean(axis=0),
            "image_halves": controls[self.shuffles] if halves else missing,
            "text_halves": controls[self.shuffles + 1] if halves else missing,
        }
        every, sizes = list(image.matrices.values()), image.items[folds].astype(np.float64)
        tables = dict(
            zip(("iou", "iou_by_type"), iou_tables(found.iou[:, 0], every, sizes, self.sparsities, beside), strict=True)
        )
        tables["alpha_subnet"] = joint_table(found.joint[:, 0], every, sizes, self.sparsities, 2)
        return ProbeResult(name=self.name, tables=tables, summary=summary(tables))

    def save_masks(
        self,
        path: str | Path,
        *,
        sparsity: float = 0.5,
        tokens: Sequence[str] = (IMAGE, TEXT),
        others: Sequence[Subnetworks] = (),
    ) -> Path:
        """Write the alpha-SubNet: the weights that all these tokens keep, of this probe and of others of the same model.

        `interventions.SubnetMask(masks=path)` runs a model with no other weights.

        Args:
            path: of the file (safetensors, a bit per weight).
            sparsity: share of every row that each kind of tokens drops; what all keep is sparser.
            tokens: "image", "text" or both.
            others: probes of other data sets.

        Raises:
            InputError: a sparsity or kind of tokens that cannot be, or nothing was taken in.
        """
        if not 0 < sparsity < 1 or not tokens:
            raise InputError(f"{self.name}: needs a sparsity between 0 and 1 and tokens, found {sparsity}, {tokens}")
        sets = [one.token_set(kind) for one in (self, *others) for kind in tokens]
        masks = {
            key: torch.stack([one.masks(key, [sparsity])[0].cpu() for one in sets]).all(dim=0)
            for key in sets[0].matrices
        }
        return save_masks(path, masks, sparsity=str(sparsity), tokens=", ".join(tokens), sets=str(len(sets)))

    @classmethod
    def compare(cls, parts: Mapping[Part, Probe], scores: pd.DataFrame | None = None) -> ProbeResult | None:
        """Tables `tasks` (IoU of pairs of sets of tokens), `tasks_by_kind` (their means) and `joint_subnet` (of all of a model).

        Pairs are: any two sets of tokens of one model and condition; the same tokens under two conditions; the same tokens in
        two models whose linear maps have the same shapes (checkpoints, or tunings, of one model: in models trained apart the
        j-th inputs have nothing to do with each other, and the IoU is that of chance).
        """
        probes = {part: one for part, one in parts.items() if isinstance(one, Subnetworks)}
        if len(probes) < 2:
            return None
        first = next(iter(probes.values()))
        sets = [Named(part, kind, one.token_set(kind)) for part, one in probes.items() for kind in (IMAGE, TEXT)]
        return compare_sets(cls.name, sets, first.sparsities)


def _fold(group: str, folds: int) -> int:
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") % folds


def _squares(values: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Per row, the sum of squares over its tokens: [batch, position, ...] and bool [batch, position] to [batch, width]."""
    flat = values.flatten(2).float()
    return flat.square().masked_fill(~real.to(flat.device)[..., None], 0).sum(dim=1)
