"""FastV: image tokens dropped inside the decoder (Chen et al., ECCV 2024, arXiv 2403.06764); the usual baseline of pruning."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from interventions.image_columns import prompt_of
from interventions.raised_scores import check_image_tokens
from interventions.ranked_tokens import SELECTED, best, check_select, check_share, count_kept
from slitlamp.decoding.edits import knock_out
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError
from slitlamp.models import Anatomy
from slitlamp.tracing import AttentionEdit
from slitlamp.tracing.sites import attention

Select = Literal["most", "least", "random"]


@dataclass
class FastVPruning(Intervention):
    """From some layer on, nothing attends to the image tokens that got least attention from the last token of the prompt.

    Attention is that of the layer before, the mean over heads. The dropped tokens are cut from all later attention, which gives
    every other token what it would get if they were taken out of the sequence there, at the positions that they had; they are
    still computed, so that nothing is saved here: `slitlamp.flops` says what a kernel that drops them would save. One extra pass
    over the first layers chooses them.

    Attributes:
        keep: the share that is kept, rounded down; 1 keeps all. The paper's: .5.
        layer: from which layer on, 0-based, at least 1; the paper's K = 2.
        select: "most" (the method), or its controls "random" and "least".
        seed: of the random tokens.
    """

    keep: float = 0.5
    layer: int = 2
    select: Select = "most"
    seed: int = 0
    kept_: tuple[Tensor, ...] = field(default=(), init=False, repr=False, compare=False)
    """Of the last run, per row: int64 [token], the kept image tokens, numbered from 0 among those the model was given."""

    name: ClassVar[str] = "FastVPruning"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters that do not fit the model, and models without image tokens among their positions."""
        check_share("keep", self.keep, self.name)
        check_select(self.select, self.name)
        check_image_tokens(anatomy, self.name)
        if not 1 <= self.layer < anatomy.n_layers:
            raise InputError(
                f"{self.name}: layer must be from 1 (tokens are chosen by the layer before) to {anatomy.n_layers - 1}, found "
                f"{self.layer!r}"
            )
        for layer in range(self.layer - 1, anatomy.n_layers):
            anatomy.place("attention", layer)

    def edits(self, run: RunContext) -> list[AttentionEdit]:
        """Edits of attention that cut the dropped tokens from it; none where all are kept."""
        self.kept_ = ()
        batch = run.batch
        if self.keep == 1 or not bool(batch.image_mask.any()):
            return []
        prompt = prompt_of(batch)
        site = attention("last", "image", layers=[self.layer - 1], reduce_heads="mean", label="received")
        recorded = run.trace(prompt, [site], ())["received"]
        values = recorded[self.layer - 1][:, 0].float().cpu()  # [batch, image token]
        dropped = torch.zeros_like(batch.image_mask)
        kept = []
        for row, count in enumerate(batch.image_mask.sum(dim=1).tolist()):
            mask = best(values[row, :count], count_kept(self.keep, count), self.select, self.seed)
            kept.append(mask.nonzero()[:, 0])
            dropped[row, batch.image_mask[row].nonzero()[:, 0][(~mask).to(batch.device)]] = True
        self.kept_ = tuple(kept)
        return knock_out(range(self.layer, run.anatomy.n_layers), "all", dropped)

    def controls(self) -> dict[str, Intervention]:
        """As many random tokens, and as many that get least attention."""
        return {"random": replace(self, select="random"), "least": replace(self, select="least")}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        which = f"{SELECTED[self.select]} attention from the last token"
        return f"{self.keep:.0%} of the image tokens kept from layer {self.layer} on: {which}"
