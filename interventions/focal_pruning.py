"""FoPru: image tokens, or whole rows of them, by the tower's attention among patches (Jiang et al., 2024, "FoPru")."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from interventions.ranked_tokens import SELECTED, best, check_select, check_share, count_kept, of_tokens
from probes.cls_outliers import feature_block
from probes.outlier_places import check_places
from slitlamp.decoding.intervention import Intervention, RunContext
from slitlamp.decoding.visual_tokens import ImageTokens, VisualTokenEdit
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy
from slitlamp.tracing.sites import vision_attention

Select = Literal["most", "least", "random"]
Unit = Literal["rank", "row"]
Attention = Literal["auto", "received", "given"]


@dataclass
class FocalPruning(VisualTokenEdit):
    """The language model is given only the image tokens, or the rows of them, of most attention among the tower's patches.

    "received" is the mean attention that a patch gets from all patches, "given" the mean that it gives to them, which in towers
    without a CLS token is the same for all; both are means over heads, and of several patches under a token, sums. "auto" takes
    for each image the one that varies more. Tokens that stand for no patch are kept. One image per row, in one picture.

    Attributes:
        keep: the share that is kept, rounded down: of tokens ("rank"), or of the rows of the grid ("row"); 1 keeps all.
        unit: "rank" or "row".
        attention: "auto", "received" or "given".
        layer: block of the tower, 0-based; None for the one whose features the model reads (which one the paper took is not
            verified [?]).
        select: "most" (the method), or its controls "random" and "least".
        seed: of random tokens or rows.
        positions: see `VisualTokenEdit`.
    """

    keep: float = 0.25
    unit: Unit = "rank"
    attention: Attention = "auto"
    layer: int | None = None
    select: Select = "most"
    seed: int = 0
    kept_: tuple[Tensor, ...] = field(default=(), init=False, repr=False, compare=False)
    """Of the last run, per row: int64 [token], the kept image tokens, numbered from 0 among the row's."""

    name: ClassVar[str] = "FocalPruning"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters that do not fit the model, and models whose image tokens have no place on the image."""
        super().check(anatomy)
        check_share("keep", self.keep, self.name)
        check_select(self.select, self.name)
        for what, value, known in (
            ("unit", self.unit, ("rank", "row")),
            ("attention", self.attention, ("auto", "received", "given")),
        ):
            if value not in known:
                raise unknown(f"{self.name} {what}", str(value), known)
        check_places(anatomy)
        if self.layer is not None and not 0 <= self.layer < anatomy.n_vision_layers:
            raise InputError(f"{self.name}: layer {self.layer!r} is not one of 0 to {anatomy.n_vision_layers - 1}")
        if self.attention == "given" and not anatomy.has_cls:
            raise InputError(
                f"{self.name}: in the tower of {anatomy.family.name}, which has no CLS token, every patch gives the same "
                "attention to all patches together; use attention='received'"
            )

    def change(self, run: RunContext, tokens: ImageTokens) -> ImageTokens:
        """The kept tokens."""
        chosen = []
        for row, (values, number) in enumerate(zip(self.scores(run), tokens.number, strict=True)):
            if self.unit == "rank":
                left = values[number]
                chosen.append(best(left, count_kept(self.keep, int(left.isfinite().sum())), self.select, self.seed))
                continue
            patches = run.whole.patches[row]
            lines = patches.row[number].masked_fill(values[number].isnan(), -1)
            sums = torch.full((int(patches.row.max()) + 1,), torch.nan)
            for line in lines[lines >= 0].unique().tolist():
                sums[line] = values[number][lines == line].sum()
            count = count_kept(self.keep, int(sums.isfinite().sum()))
            mask = best(sums, count, self.select, self.seed) & sums.isfinite()
            chosen.append(torch.where(lines >= 0, mask[lines.clamp(min=0)], True))
        found = tokens.take(chosen)
        self.kept_ = found.number
        return found

    def scores(self, run: RunContext) -> list[Tensor]:
        """Per row, the score of each image token of the whole prompt, float32 [token]; NaN for tokens that stand for no patch."""
        n_layers = run.anatomy.n_vision_layers
        layer = feature_block(run.source.model.config, n_layers) if self.layer is None else self.layer
        received = vision_attention(
            "patches", layers=[layer], reduce_heads="mean", reduce_queries="mean", label="received"
        )
        sites = [received]
        if run.anatomy.has_cls:  # what a patch does not give to patches it gives to the CLS token
            sites.append(vision_attention("patches", "cls", layers=[layer], reduce_heads="mean", label="to_cls"))
        trace = run.trace(run.whole, sites, ())
        n_patches = trace["received"].key_mask.sum(dim=1).tolist()
        got = of_tokens(run, trace["received"][layer].float(), n_patches, self.name)
        if self.attention == "received" or not run.anatomy.has_cls:
            return got
        to_cls = trace["to_cls"][layer].float()[..., 0]
        given = (1 - to_cls) / torch.tensor(n_patches, device=to_cls.device)[:, None]
        gave = of_tokens(run, given, n_patches, self.name)
        if self.attention == "given":
            return gave
        return [one if _variance(one) >= _variance(two) else two for one, two in zip(got, gave, strict=True)]

    def controls(self) -> dict[str, Intervention]:
        """As many random tokens or rows, and as many of least attention."""
        return {"random": replace(self, select="random"), "least": replace(self, select="least")}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        what = "image tokens" if self.unit == "rank" else "rows of image tokens"
        how = "attention among patches" + ("" if self.attention == "auto" else f" ({self.attention})")
        where = "" if self.positions == "contiguous" else ", at their original positions"
        return f"{self.keep:.0%} of the {what} kept: {SELECTED[self.select]} {how}{where}"


def _variance(values: Tensor) -> float:
    return float(values[values.isfinite()].double().var(correction=0))
