"""Activation patching: which positions and heads carry what the image says to the answer (Vig et al., NeurIPS 2020; Meng et
al., NeurIPS 2022; Zhang and Nanda, ICLR 2024, arXiv 2309.16042), and its first-order estimate, attribution patching.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from probes.knockout_flows import measured_tokens, up_to
from probes.patching_edits import CORRUPT, Corrupt, corrupted, first_order, patch_head, patch_positions
from probes.patching_places import ROLES, contrast, random_places, roles
from probes.patching_tables import DIRECTIONS, Gathered, summary, tables_of
from slitlamp.decoding.edits import scale_heads
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import AnyEdit, CausalTarget, GatheringProbe, ProbeResult, Site, Trace, View
from slitlamp.tracing.gradients import Scalar
from slitlamp.tracing.probe import N_DRAWS, Array, EditsOf, Labels
from slitlamp.tracing.sites import logits, resid_post, z

Direction = Literal["denoising", "noising"]
Component = Literal["positions", "heads"]


@dataclass
class ActivationPatching(GatheringProbe):
    """How much of the answer activations of the image's run carry, position by position and head by head.

    LD = logit(correct) - logit(foil) where the answer is predicted: of a yes/no question the right and the wrong answer, of a
    caption the first object that is in the image and its likeliest rival. Two runs: clean, and corrupt (the image replaced
    by another of the same number of tokens). Activations of one are put into the other at one place:

    - denoising, clean into corrupt: (LD_patch - LD_corrupt) / (LD_clean - LD_corrupt): is the place sufficient;
    - noising, corrupt into clean: (LD_clean - LD_patch) / (LD_clean - LD_corrupt): is it necessary.

    Places are the residual stream after each block at the positions of a role (`patching_places.ROLES`), and the output of
    each head at all positions. Items whose |LD_clean - LD_corrupt| is below `min_difference` are left out, and so are wrong
    answers and captions without an object of the image; both are counted. Attribution patching estimates the same from one
    gradient of LD per run: gradient * (clean - corrupt).

    The control of a role puts in as many random other positions (all others, for a role of more than half of them); that of
    a head is the mean of all other heads. p values are one-sided: a place carries more than its control.

    `transformer_lens.patching` does the same for one head, or one position, of a model that it runs itself. It takes our traces
    as its caches and gives the same numbers where it applies (docs/transformer_lens.md; a test compares them). The loop is here
    because an image has many tokens, to be patched as a set that differs from row to row, and because runs are made batch by
    batch by whoever measures, so that they can be resumed.

    Memory: both runs' residual streams and head outputs at all positions are held for a batch, and their gradients.

    Attributes:
        corrupt: the corrupt run: "noise" works for every family and needs no labels; "mean"; "object" paints the object
            over and says what the object itself carries (`patching_edits.corrupted`).
        directions: which of the two are done.
        components: "positions", "heads" or both.
        method: "exact" patching (one run per place and direction), "attribution" (one run per direction), or "both", which
            also compares them.
        layers: 0-based; None for all.
        min_difference: least |LD_clean - LD_corrupt| of an item, in logits [?].
        seed: of the noise, the random positions and the bootstrap.
        n_resamples: of the bootstrap, over groups of items that share an image.
    """

    corrupt: Corrupt = "noise"
    directions: Sequence[Direction] = ("denoising", "noising")
    components: Sequence[Component] = ("positions", "heads")
    method: Literal["exact", "attribution", "both"] = "both"
    layers: Sequence[int] | None = None
    min_difference: float = 1.0
    seed: int = 0
    n_resamples: int = 2000
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "activation_patching"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The last logits; what is patched is in the views, which are cut before the measured token."""
        if self.corrupt not in CORRUPT:
            raise unknown("corrupt run", self.corrupt, CORRUPT)
        if self.method not in ("exact", "attribution", "both"):
            raise unknown("method", self.method, ("exact", "attribution", "both"))
        for given, known in ((self.directions, DIRECTIONS), (self.components, ("positions", "heads"))):
            if not given or not set(given) <= set(known) or len(set(given)) < len(given):
                raise InputError(f"expected different ones of {', '.join(known)}; found {list(given)}")
        if not self.min_difference >= 0:
            raise InputError(f"min_difference must be at least 0, found {self.min_difference}")
        if not self._layers(anatomy) or any(not 0 <= layer < anatomy.n_layers for layer in self._layers(anatomy)):
            raise InputError(f"layers must be some of 0 to {anatomy.n_layers - 1}, found {list(self.layers or ())}")
        return [logits("last")]

    def _layers(self, anatomy: Anatomy) -> list[int]:
        return list(range(anatomy.n_layers)) if self.layers is None else sorted(self.layers)

    def views(self, anatomy: Anatomy) -> dict[str, View]:
        """The clean and the corrupt run, and, unless only attributions are asked for, a run for every place."""
        layers = self._layers(anatomy)
        kept = [resid_post(layers), z(layers), logits("last")]
        last = [logits("last")]

        def clean(batch: Batch, trace: Trace) -> tuple[Batch, list[AnyEdit]]:
            return up_to(batch, measured_tokens(batch, trace.labels)), []

        def other(batch: Batch, trace: Trace) -> tuple[Batch, Sequence[AnyEdit]]:
            tokens = measured_tokens(batch, trace.labels)
            return corrupted(_batch(trace, "clean"), self.corrupt, trace.labels, tokens, self.seed)

        def positions(
            direction: str, role: str, layer: int, control: bool, batch: Batch, trace: Trace
        ) -> tuple[Batch, Sequence[AnyEdit]]:
            mask = self._roles(trace)[role]
            if control:
                mask = random_places(_batch(trace, "clean"), mask, role, self.seed)
            return self._into(direction, trace, lambda source: patch_positions(layer, source, mask))

        def head(
            direction: str, layer: int, number: int, batch: Batch, trace: Trace
        ) -> tuple[Batch, Sequence[AnyEdit]]:
            return self._into(direction, trace, lambda source: patch_head(layer, number, source))

        gradient = None if self.method == "exact" else self._scalar
        found = {"clean": View(clean, kept, gradient), "corrupt": View(other, kept, gradient)}
        if self.method == "attribution":
            return found
        for direction in self.directions:
            for layer in layers:
                if "positions" in self.components:
                    for role in ROLES:
                        for control in (False, True):
                            change = partial(positions, direction, role, layer, control)
                            found[_view(direction, role, layer, control)] = View(change, last)
                if "heads" in self.components:
                    for number in range(anatomy.n_heads):
                        found[f"{direction} head {layer} {number}"] = View(
                            partial(head, direction, layer, number), last
                        )
        return found

    def _into(self, direction: str, trace: Trace, patch: Any) -> tuple[Batch, Sequence[AnyEdit]]:
        """The batch that is patched, and its edits."""
        if direction == "noising":
            return _batch(trace, "clean"), patch(trace.views["corrupt"])
        main = trace.batch
        assert main is not None
        tokens = measured_tokens(main, trace.labels)
        batch, edits = corrupted(_batch(trace, "clean"), self.corrupt, trace.labels, tokens, self.seed)
        return batch, [*edits, *patch(trace.views["clean"])]

    def _scalar(self, batch: Batch, trace: Trace) -> Scalar:
        """LD of every row, to be differentiated; which tokens it compares is decided by the clean run."""

        def difference(output: Any) -> Tensor:
            found: Tensor = output.logits[:, -1]
            first = trace.views["clean"]["logits"][0][:, 0] if "clean" in trace.views else found
            correct, foil = self._tokens(trace, first)
            return found.gather(1, correct[:, None]) - found.gather(1, foil[:, None])

        return difference

    @staticmethod
    def _tokens(trace: Trace, clean: Tensor) -> tuple[Tensor, Tensor]:
        main, source = trace.batch, trace.source
        assert main is not None
        assert source is not None
        return contrast(main, trace.labels, measured_tokens(main, trace.labels), clean, source.tokenizer)

    @staticmethod
    def _roles(trace: Trace) -> dict[str, Tensor]:
        main, source = trace.batch, trace.source
        assert main is not None
        assert source is not None
        tokens = measured_tokens(main, trace.labels)
        return roles(_batch(trace, "clean"), trace.labels, tokens, source.tokenizer)

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch; `labels` say what the right answer is, and where the object is."""
        kept = [row for row, token in enumerate(measured_tokens(batch, labels)) if token is not None]
        clean = trace.views["clean"]
        correct, foil = self._tokens(trace, clean["logits"][0][:, 0])

        def differences(view: str) -> Array:
            """LD, float64 [row that is kept]."""
            found = trace.views[view]["logits"][0][:, 0].double()
            both = [found.gather(1, ids.to(found.device)[:, None])[:, 0] for ids in (correct, foil)]
            return np.asarray((both[0] - both[1])[kept].cpu())

        ends = {"clean": differences("clean"), "corrupt": differences("corrupt")}
        total = ends["clean"] - ends["corrupt"]
        enough = np.abs(total) >= self.min_difference
        enough &= total != 0
        rows, scale = np.flatnonzero(enough), total[enough]
        places = self._roles(trace)
        layers = clean["resid_post"].layers
        self._constants(layer=np.array(layers), n_heads=np.array(clean["z"][layers[0]].shape[2]))
        self._rows(
            item=np.array([batch.ids[kept[row]] for row in rows], dtype=str),
            group=np.array([batch.groups[kept[row]] for row in rows], dtype=str),
            ld=np.stack([ends["clean"], ends["corrupt"]], axis=1)[rows],
            present=torch.stack([one.any(dim=1) for one in places.values()], dim=1).cpu().numpy()[kept][rows],
            unanswered=np.array([batch.size - len(kept)]),
            too_close=np.array([len(kept) - len(rows)]),
        )

        def effect(view: str, direction: str) -> Array:
            """What a run's patch restores or takes away, in shares of LD_clean - LD_corrupt."""
            patched = differences(view)
            changed = patched - ends["corrupt"] if direction == "denoising" else ends["clean"] - patched
            return changed[rows] / scale

        if self.method != "attribution":
            for direction in self.directions:
                if "positions" in self.components:
                    each = [
                        [
                            [effect(_view(direction, role, layer, one), direction) for one in (False, True)]
                            for layer in layers
                        ]
                        for role in ROLES
                    ]
                    self._rows(**{f"positions_{direction}": np.moveaxis(np.array(each), -1, 0)})
                if "heads" in self.components:
                    n_heads = clean["z"][layers[0]].shape[2]
                    by_head = [
                        [effect(f"{direction} head {layer} {one}", direction) for one in range(n_heads)]
                        for layer in layers
                    ]
                    self._rows(**{f"heads_{direction}": np.moveaxis(np.array(by_head), -1, 0)})
        if self.method != "exact":
            for direction in self.directions:
                of = trace.views["corrupt" if direction == "denoising" else "clean"]
                of_roles, of_heads = first_order(of, clean, trace.views["corrupt"], places)
                wide = scale[:, None, None]
                self._rows(
                    **{
                        f"attributed_positions_{direction}": of_roles.numpy()[kept][rows] / wide,
                        f"attributed_heads_{direction}": of_heads.numpy()[kept][rows] / wide,
                    }
                )

    def result(self) -> ProbeResult:
        """Tables `positions`, `heads`, `attribution`, `agreement` and `items`, as far as they were asked for."""
        gathered = self._gather()
        tables = tables_of(gathered)
        return ProbeResult(self.name, tables, summary(tables, gathered))

    def _gather(self) -> Gathered:
        item = self._get("item")
        if not len(item):
            raise InputError(
                f"activation patching has no item left: {int(self._get('unanswered').sum())} without a right answer or a true "
                f"object, {int(self._get('too_close').sum())} whose clean and corrupt runs differ by less than "
                f"min_difference = {self.min_difference:g} logits"
            )
        names = [f"{kind}_{one}" for kind in self.components for one in self.directions]
        found = {name: self._get(name) for name in [*names, *(f"attributed_{one}" for one in names)] if self._has(name)}
        return Gathered(
            layers=[int(one) for one in self._get("layer")],
            items=item,
            groups=self._get("group"),
            differences=self._get("ld"),
            present=self._get("present"),
            effects=found,
            unanswered=int(self._get("unanswered").sum()),
            too_close=int(self._get("too_close").sum()),
            n_resamples=self.n_resamples,
            seed=self.seed,
        )

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        """The four heads that carry most, set to zero, against as many random others.

        Raises:
            InputError: heads are not among the components, or nothing was taken in.
        """
        if "heads" not in self.components:
            raise InputError("activation patching points at heads, which are not among its components here")
        tables = tables_of(self._gather())
        heads = tables.get("heads")
        if heads is None:
            found = tables["attribution"]
            heads = found[found["component"] == "heads"].rename(columns={"place": "head"})
        heads = heads[heads["direction"] == self.directions[0]].sort_values("effect", ascending=False)
        pairs = [(int(layer), int(head)) for layer, head in zip(heads["layer"], heads["head"], strict=True)]
        count = min(4, len(pairs) // 2)
        top, others = pairs[:count], pairs[count:]

        def zeroed(chosen: list[tuple[int, int]]) -> EditsOf:
            return lambda batch: scale_heads(chosen)

        rng = np.random.default_rng(self.seed)
        draws = [[others[i] for i in rng.choice(len(others), size=count, replace=False)] for _ in range(N_DRAWS)]
        return [
            CausalTarget(
                f"the {count} heads that carry most of the answer set to zero",
                zeroed(top),
                tuple(zeroed(one) for one in draws),
                f"{count} random other heads",
            )
        ]


def _batch(trace: Trace, view: str) -> Batch:
    batch = trace.views[view].batch
    assert batch is not None
    return batch


def _view(direction: str, role: str, layer: int, control: bool) -> str:
    return f"{direction} {role} {layer}" + (" control" if control else "")
