"""Heads that hardly look at the image do not look at it at all (the second step of YOPO)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from interventions.image_columns import (
    STAGES,
    Stage,
    attention_layers,
    check_stage,
    drawn_order,
    hidden_columns,
    prompt_of,
    zero_columns,
)
from interventions.raised_scores import check_image_tokens
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy
from slitlamp.tracing import AnyEdit, AttentionEdit, Calls, Edit
from slitlamp.tracing.sites import attention

Select = Literal["inactive", "random"]


@dataclass
class InactiveHeads(Intervention):
    """Heads with little attention on the image lose it: text no longer attends to image tokens in them, and their outputs at
    image tokens are zero.

    A head is inactive if its attention on image tokens is at most `theta` times that on text tokens, the first token of the
    prompt among them: means over the text of the prompt after the image, in an extra forward pass without edits. It is found for
    each item, so that answers do not depend on what else is in the batch; the paper takes heads that are active in at most 40 of
    100 samples, which are the same for all items: find them by the probe of your choice, and give `heads`. The stages are
    different interventions: cut before the softmax, a row's other weights grow to add up to 1; zeroed after it, they stay.

    Attributes:
        theta: the ratio; 0 changes nothing. The paper's value is not known here [?].
        stage: "post_softmax" (as the method is described) or "pre_softmax".
        kept_layers: how many of the first layers have no inactive heads; 2 is the paper's.
        heads: fixed (layer, head) pairs, 0-based, instead of measured ones, whatever `theta` and `kept_layers` are: no extra
            pass. () changes nothing.
        select: "inactive", or its control "random": of each layer as many heads, drawn among the others, and among the inactive
            ones where there are no more others.
        seed: of the random heads.
    """

    theta: float = 0.1
    stage: Stage = "post_softmax"
    kept_layers: int = 2
    heads: Sequence[tuple[int, int]] | None = None
    select: Select = "inactive"
    seed: int = 0
    inactive_: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    """Of the last run: bool [item, layer, head], the heads that were edited."""

    name: ClassVar[str] = "InactiveHeads"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters that do not fit the model, and models without image tokens among their positions."""
        check_stage(self.stage, self.name)
        if not (math.isfinite(self.theta) and self.theta >= 0):
            raise InputError(f"{self.name}: theta must be a finite number from 0, found {self.theta!r}")
        if self.select not in ("inactive", "random"):
            raise unknown(f"{self.name} select", str(self.select), ("inactive", "random"))
        if isinstance(self.kept_layers, bool) or not isinstance(self.kept_layers, int) or self.kept_layers < 0:
            raise InputError(f"{self.name}: kept_layers must be a number of layers from 0, found {self.kept_layers!r}")
        check_image_tokens(anatomy, self.name)
        attention_layers(sorted({int(layer) for layer, _ in self.heads or ()}), anatomy, self.name)
        for _, head in self.heads or ():
            if not 0 <= head < anatomy.n_heads:
                raise InputError(f"{self.name}: head {head!r} is not one of 0 to {anatomy.n_heads - 1}")

    def controls(self) -> dict[str, Intervention]:
        """As many random heads of the same layers."""
        return {"random": replace(self, select="random")}

    def describe(self) -> str:
        """What this does, in a few plain words, the stage among them."""
        which = f"heads with at most {self.theta:g} times as much attention on the image as on text"
        if self.heads is not None:
            which = f"{len(self.heads)} fixed heads"
        if self.select == "random":
            which = f"as many random heads as {which} (seed {self.seed})"
        return f"attention to image tokens {STAGES[self.stage]}, and outputs at image tokens zero, in {which}"

    def edits(self, run: RunContext) -> list[AnyEdit]:
        """Edits of attention of text, and of the heads' outputs at image tokens, once the heads are found."""
        self.inactive_ = None
        if not self.theta and self.heads is None:
            return []
        batch = run.batch
        inactive = self._measured(run) if self.heads is None else self._given(run)
        if self.select == "random":
            inactive = torch.stack([self._drawn(item) for item in inactive])
        self.inactive_ = inactive
        edits: list[AnyEdit] = []
        for layer in inactive.any(dim=2).any(dim=0).nonzero()[:, 0].tolist():
            heads = inactive[:, layer]
            if self.stage == "pre_softmax":
                edits.append(AttentionEdit(layer, hidden_columns(batch.image_mask, heads), "text"))
            else:
                edits.append(zero_columns(layer, "text", batch.image_mask, heads))
            edits.append(_silent_at(layer, batch.image_mask, heads))
        return edits

    def _given(self, run: RunContext) -> Tensor:
        """bool [item, layer, head], the fixed heads."""
        inactive = torch.zeros(run.anatomy.n_layers, run.anatomy.n_heads, dtype=torch.bool)
        for layer, head in self.heads or ():
            inactive[layer, head] = True
        return inactive.expand(run.batch.size, -1, -1)

    def _measured(self, run: RunContext) -> Tensor:
        """bool [item, layer, head], the heads whose ratio is at most theta.

        Raises:
            InputError: an item without an image, or without text after it.
        """
        prompt = prompt_of(run.batch)
        silent = ~prompt.text_after_image_mask.any(dim=1)
        if bool(silent.any()):
            item = prompt.ids[int(silent.nonzero()[0, 0])]
            raise InputError(
                f"{self.name} looks at the attention of the prompt's text after the image; item {item!r} has none: put the image "
                "before the question, or give heads"
            )
        found = torch.zeros(prompt.size, run.anatomy.n_layers, run.anatomy.n_heads, dtype=torch.bool)
        layers = [layer for layer in run.anatomy.layers("attention") if layer >= self.kept_layers]
        if layers:
            asked = [
                attention(
                    "text_after_image", keys, layers, reduce_queries="mean", reduce_keys="sum", label=f"on {keys}"
                )
                for keys in ("image", "text")
            ]
            trace = run.trace(prompt, asked, ())
            for layer in layers:
                found[:, layer] = (trace["on image"][layer] <= self.theta * trace["on text"][layer]).cpu()
        return found

    def _drawn(self, inactive: Tensor) -> Tensor:
        """bool [layer, head], as many random heads in every layer as are inactive."""
        drawn = torch.zeros_like(inactive)
        for layer, mine in enumerate(inactive):
            order = drawn_order(len(mine), self.seed, layer)
            order = torch.cat([order[~mine[order]], order[mine[order]]])
            drawn[layer, order[: int(mine.sum())]] = True
        return drawn


def _silent_at(layer: int, image: Tensor, heads: Tensor) -> Edit:
    """The outputs of some heads, bool [item, head], are zero at image tokens, bool [batch, position]."""

    def silence(values: Tensor, calls: Calls) -> Tensor:
        silent = (image[:, :, None] & heads.to(image.device)[:, None]).to(values.device)
        return values.masked_fill(silent[..., None], 0)

    return Edit("z", layer, silence, prefill_only=True)
