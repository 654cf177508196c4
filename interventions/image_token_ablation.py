"""Image tokens that say nothing: their inputs to the language model replaced (the probe is `TokenAblation`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from interventions.cls_pruning import ClsPruning, Encoder
from interventions.given_tensors import check_tensor, from_file
from interventions.ranked_tokens import SELECTED, best, check_select
from slitlamp.decoding.intervention import Intervention, RunContext
from slitlamp.decoding.visual_tokens import ImageTokens, VisualTokenEdit
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy

Select = Literal["most", "least", "random"]
Value = Literal["mean", "zero", "given"]
WORDS = {"mean": "the mean of the image's", "zero": "0", "given": "a given one"}


@dataclass
class ImageTokenAblation(VisualTokenEdit):
    """Some image tokens are replaced at the input of the language model; their number and places stay.

    Attributes:
        share: of the image's tokens, how many, rounded down; 0 changes nothing.
        value: what stands at them: the "mean" of the row's own image tokens, "zero", or "given", `vector`.
        vector: [d_model], as numbers or a safetensors file with a tensor `vector`: the mean over a data set, say
            (`probes.token_ablation.mean_image_token`).
        select: those of "most" CLS attention (as `ClsPruning` ranks them), of "least", or its control "random": as many.
        encoder_attention: as in `ClsPruning`.
        seed: of the random tokens.
        positions: of no consequence here, but that together with edits that shorten prompts all must be the same.
    """

    share: float = 0.25
    value: Value = "mean"
    vector: Sequence[float] | str | None = None
    select: Select = "most"
    encoder_attention: Encoder = "cls"
    seed: int = 0
    ablated_: tuple[Tensor, ...] = field(default=(), init=False, repr=False, compare=False)
    """Of the last run, per row: int64 [token], the replaced image tokens, numbered from 0 among the row's."""

    name: ClassVar[str] = "ImageTokenAblation"

    def _ranking(self) -> ClsPruning:
        return ClsPruning(encoder_attention=self.encoder_attention)

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters that do not fit the model, and models whose image tokens have no attention to go by."""
        super().check(anatomy)
        if not 0 <= self.share <= 1:
            raise InputError(f"{self.name}: share must be from 0 to 1, found {self.share!r}")
        check_select(self.select, self.name)
        if self.value not in WORDS:
            raise unknown(f"{self.name} value", str(self.value), WORDS)
        if (self.value == "given") != (self.vector is not None):
            raise InputError(f"{self.name}: value='given' and vector go together")
        if self.value == "given":
            self._vector(anatomy.d_model)
        self._ranking().check(anatomy)

    def _vector(self, d_model: int) -> Tensor:
        given = self.vector
        found = from_file(given, "vector", self.name)[0] if isinstance(given, str | Path) else torch.as_tensor(given)
        return check_tensor(found.float(), [d_model], "[d_model]", self.name)

    def change(self, run: RunContext, tokens: ImageTokens) -> ImageTokens:
        """The tokens with some replaced."""
        states, ablated = [], []
        for scores, number, given in zip(self._ranking().scores(run), tokens.number, tokens.states, strict=True):
            left = scores[number]
            count = int(self.share * int(left.isfinite().sum()) + 1e-9)
            mask = best(left, count, self.select, self.seed) & left.isfinite()
            ablated.append(number[mask])
            states.append(torch.where(mask.to(given.device)[:, None], self._value(given), given))
        self.ablated_ = tuple(ablated)
        return ImageTokens(tokens.number, tuple(states))

    def _value(self, states: Tensor) -> Tensor:
        if self.value == "mean":
            return states.float().mean(dim=0).to(states)
        return torch.zeros_like(states[0]) if self.value == "zero" else self._vector(states.shape[-1]).to(states)

    def controls(self) -> dict[str, Intervention]:
        """As many random tokens, and as many that get least attention."""
        return {"random": replace(self, select="random"), "least": replace(self, select="least")}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        return f"{self.share:.0%} of the image tokens, {SELECTED[self.select]} CLS attention, replaced by {WORDS[self.value]}"
