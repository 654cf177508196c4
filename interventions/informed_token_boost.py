"""PAINT: more attention to informed image tokens (Arif et al., 2025, arXiv 2501.12206)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from interventions.given_tensors import check_layers
from interventions.raised_scores import boosted_layers, describe_layers, raised_scores
from probes.outlier_places import check_places, place_tokens
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models import Anatomy
from slitlamp.tracing import AttentionEdit
from slitlamp.tracing.sites import vision_attention

Select = Literal["informed", "random"]


@dataclass
class InformedTokenBoost(Intervention):
    """Where a next token is predicted, attention scores to local and to summary tokens of the image are raised: a + factor |a|.

    Summary tokens are those to which the tower's CLS token attends exceptionally in the block before the last: above
    Q3 + 1.5 (Q3 - Q1) of the image's tokens. Local tokens are the share to which it attends most in the first block, but for
    the summary tokens. Attention is the mean over heads; where a token stands for several patches, their sum. Only tokens of the
    view of the whole image are chosen; one image per row. The paper's third set, spatial tokens, is not among them: as
    released, its score is 1 everywhere. They are chosen among all of them; those that edits of visual tokens have taken out are
    not there to be raised. The cost is a pass of the tower per run, to find the tokens.

    Attributes:
        alpha: the factor of local tokens; 0.7 is the paper's, which reports that captions break down from 0.8.
        beta: the factor of summary tokens; the paper's are 0.3, the default, to 0.4. Both 0 change nothing.
        share: of the image's tokens, how many are local before summary tokens are left out; 0.25 is the paper's.
        layers: 0-based; None for the third to the last, as the paper's.
        select: "informed", or its control "random": as many tokens of each kind, drawn among those of the image.
        seed: of the random tokens.
    """

    alpha: float = 0.7
    beta: float = 0.3
    share: float = 0.25
    layers: Sequence[int] | None = None
    select: Select = "informed"
    seed: int = 0
    local_: tuple[Tensor, ...] = field(default=(), init=False, repr=False, compare=False)
    """Of the last run, per row: int64 [token], the local tokens, numbered from 0 among the row's image tokens."""
    summary_: tuple[Tensor, ...] = field(default=(), init=False, repr=False, compare=False)
    """The summary tokens in the same way."""

    name: ClassVar[str] = "InformedTokenBoost"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters that do not fit the model, and models whose tower has no CLS token."""
        for what, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not math.isfinite(value):
                raise InputError(f"{self.name}: {what} must be a finite number, found {value!r}")
        if not 0 <= self.share <= 1:
            raise InputError(f"{self.name}: share must be from 0 to 1, found {self.share!r}")
        if self.select not in ("informed", "random"):
            raise unknown(f"{self.name} select", str(self.select), ("informed", "random"))
        check_places(anatomy)
        if not anatomy.has_cls or anatomy.n_vision_layers < 2:
            raise UnsupportedError(
                f"{self.name}: the vision tower of {anatomy.family.name} needs a CLS token and two blocks; found "
                f"{'a' if anatomy.has_cls else 'no'} CLS token and {anatomy.n_vision_layers} blocks; ImageAttentionBoost raises "
                "the scores of all image tokens alike"
            )
        layers = boosted_layers(self.layers, anatomy.n_layers)
        check_layers(layers, anatomy.n_layers, self.name)
        for layer in layers:
            anatomy.place("attention", layer)

    def controls(self) -> dict[str, Intervention]:
        """The same factors on as many random tokens of the image."""
        return {"random": replace(self, select="random")}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        who = "local and summary image tokens"
        if self.select == "random":
            who = f"as many random image tokens as {who} (seed {self.seed})"
        return (
            f"attention scores to {who} changed by {self.alpha:+g} and {self.beta:+g} of their size in "
            f"{describe_layers(self.layers)}" + ("" if self.share == 0.25 else f" (local share {self.share:g})")
        )

    def edits(self, run: RunContext) -> list[AttentionEdit]:
        """Edits of attention in units of its scores, once the tokens are found; none where both factors are 0."""
        self.local_ = self.summary_ = ()
        if self.alpha == 0 and self.beta == 0:
            return []
        batch = run.batch
        if not batch.has_images:
            raise InputError(f"{self.name} needs an image in every row, among whose tokens it chooses")
        first, late = 0, run.anatomy.n_vision_layers - 2
        site = vision_attention(
            "cls", "patches", layers=sorted({first, late}), reduce_heads="mean", reduce_queries="mean", label="encoder"
        )
        recorded = run.trace(run.whole, [site], ())["encoder"]
        n_patches = recorded.key_mask.sum(dim=1).tolist()
        factors = torch.zeros(batch.size, batch.length, device=batch.device)
        chosen = []
        for row in range(batch.size):
            placed = place_tokens(run.anatomy, run.whole, row, n_patches)
            early, deep = (
                placed.of_patches(recorded[layer][placed.tile, : n_patches[placed.tile]].float(), "sum").cpu()
                for layer in (first, late)
            )
            local, summary = self._drawn(*informed_tokens(early, deep, self.share))
            chosen.append((placed.token[local], placed.token[summary]))
            of_token = torch.zeros(int(run.whole.image_mask[row].sum()), device=batch.device)
            for tokens, factor in zip(chosen[-1], (self.alpha, self.beta), strict=True):
                of_token[tokens.to(batch.device)] = factor
            left = slice(None) if run.kept is None else run.kept[row].to(batch.device)
            factors[row, batch.image_mask[row]] = of_token[left]
        self.local_ = tuple(local for local, _ in chosen)
        self.summary_ = tuple(summary for _, summary in chosen)
        return raised_scores(boosted_layers(self.layers, run.anatomy.n_layers), batch, factors)

    def _drawn(self, local: Tensor, summary: Tensor) -> tuple[Tensor, Tensor]:
        """The masks [token] themselves, or of as many random tokens each."""
        if self.select == "informed":
            return local, summary
        order = torch.randperm(len(local), generator=torch.Generator().manual_seed(self.seed))
        drawn = torch.zeros_like(local), torch.zeros_like(summary)
        n_local = int(local.sum())
        drawn[0][order[:n_local]] = True
        drawn[1][order[n_local : n_local + int(summary.sum())]] = True
        return drawn


def informed_tokens(early: Tensor, late: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Which tokens are local and which are summary tokens, bool [token] each; none is both.

    Args:
        early: [token], attention of the CLS token in the tower's first block.
        late: [token], the same in the block before the last.
        share: of all tokens, how many are local before summary tokens are left out (rounded down).
    """
    low, high = late.quantile(torch.tensor([0.25, 0.75], dtype=late.dtype))
    summary = late > high + 1.5 * (high - low)
    local = torch.zeros_like(summary)
    local[early.topk(int(share * len(early))).indices] = True
    return local & ~summary, summary
