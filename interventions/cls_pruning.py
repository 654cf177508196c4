"""VTC-CLS: the image tokens to which the tower's CLS token attends most (Wang et al., 2024, "[CLS] Token Tells Everything")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from interventions.ranked_tokens import SELECTED, best, check_select, check_share, count_kept, of_tokens
from probes.outlier_places import check_places
from slitlamp.decoding.intervention import Intervention, RunContext
from slitlamp.decoding.visual_tokens import ImageTokens, VisualTokenEdit
from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models import Anatomy
from slitlamp.tracing.sites import vision_attention

Select = Literal["most", "least", "random"]
Combine = Literal["sum", "min", "max"]
Encoder = Literal["cls", "received"]


@dataclass
class ClsPruning(VisualTokenEdit):
    """The language model is given only the image tokens to which the tower's CLS token attends most.

    A token's score is the sum over some blocks of the tower of the attention that its patches get from the CLS token, mean over
    heads. The kept ones stand in the order of the image. Tokens that stand for no patch are kept. One image per row, in one
    picture.

    Attributes:
        keep: the share that is kept, rounded down; 1 keeps all. The paper's for LLaVA-1.5: 256, 128 or 64 of 576.
        layers: blocks of the tower, 0-based; None for those from two thirds of its depth to the one before the last: of the 24
            of CLIP-L, 16 to 22, as published.
        combine: the "sum" over blocks, or their "min" or "max".
        encoder_attention: "cls", or, for towers without a CLS token, "received": the mean attention that a patch gets from all
            patches, which is another quantity.
        select: "most" (the method), or its controls "random" (as many, the same for all rows of as many tokens) and "least".
        seed: of the random tokens.
        positions: see `VisualTokenEdit`; "contiguous" is the paper's.
    """

    keep: float = 0.25
    layers: Sequence[int] | None = None
    combine: Combine = "sum"
    encoder_attention: Encoder = "cls"
    select: Select = "most"
    seed: int = 0
    kept_: tuple[Tensor, ...] = field(default=(), init=False, repr=False, compare=False)
    """Of the last run, per row: int64 [token], the kept image tokens, numbered from 0 among the row's."""

    name: ClassVar[str] = "ClsPruning"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters that do not fit the model, and models whose image tokens have no attention to go by."""
        super().check(anatomy)
        check_share("keep", self.keep, self.name)
        check_select(self.select, self.name)
        for what, value, known in (
            ("combine", self.combine, ("sum", "min", "max")),
            ("encoder_attention", self.encoder_attention, ("cls", "received")),
        ):
            if value not in known:
                raise unknown(f"{self.name} {what}", str(value), known)
        check_places(anatomy)
        if self.encoder_attention == "cls" and not anatomy.has_cls:
            raise UnsupportedError(
                f"{self.name}: the vision tower of {anatomy.family.name} has no CLS token; encoder_attention='received' goes by "
                "the mean attention that a patch gets from all patches, which is another quantity"
            )
        chosen = self._layers(anatomy.n_vision_layers)
        if not chosen or not all(0 <= one < anatomy.n_vision_layers for one in chosen):
            raise InputError(
                f"{self.name}: layers must be blocks of the tower, 0 to {anatomy.n_vision_layers - 1}, at least one; "
                f"found {list(chosen)}"
            )

    def _layers(self, n_layers: int) -> tuple[int, ...]:
        if self.layers is not None:
            return tuple(sorted(set(self.layers)))
        return tuple(range(min(2 * n_layers // 3, n_layers - 2), n_layers - 1)) if n_layers > 1 else (0,)

    def change(self, run: RunContext, tokens: ImageTokens) -> ImageTokens:
        """The kept tokens."""
        scores = self.scores(run)
        left = [values[number] for values, number in zip(scores, tokens.number, strict=True)]
        chosen = tokens.take(
            [best(one, count_kept(self.keep, int(one.isfinite().sum())), self.select, self.seed) for one in left]
        )
        self.kept_ = chosen.number
        return chosen

    def scores(self, run: RunContext) -> list[Tensor]:
        """Per row, the score of each image token of the whole prompt, float32 [token]; NaN for tokens that stand for no patch."""
        layers = self._layers(run.anatomy.n_vision_layers)
        queries: Literal["cls", "patches"] = "cls" if self.encoder_attention == "cls" else "patches"
        site = vision_attention(queries, layers=layers, reduce_heads="mean", reduce_queries="mean", label="encoder")
        recorded = run.trace(run.whole, [site], ())["encoder"]
        total = recorded[layers[0]].float()
        for layer in layers[1:]:
            more = recorded[layer].float()
            total = total + more if self.combine == "sum" else getattr(total, f"f{self.combine}")(more)
        return of_tokens(run, total, recorded.key_mask.sum(dim=1).tolist(), self.name)

    def controls(self) -> dict[str, Intervention]:
        """As many random tokens, and as many that get least attention."""
        return {"random": replace(self, select="random"), "least": replace(self, select="least")}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        how = "" if self.encoder_attention == "cls" else " (received)"
        where = "" if self.positions == "contiguous" else ", at their original positions"
        return f"{self.keep:.0%} of the image tokens kept: {SELECTED[self.select]} CLS attention{how}{where}"
