"""DAMRO: contrast with the outlier tokens of the vision tower alone (Gong et al., EMNLP 2024, arXiv 2410.04514)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from probes.cls_outliers import feature_block
from probes.outlier_places import check_places, place_tokens
from slitlamp.decoding.intervention import Intervention, RunContext
from slitlamp.decoding.two_branch import ContrastDecoding, ContrastView
from slitlamp.decoding.views import only_tokens
from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models import Anatomy
from slitlamp.tracing import Site, Trace
from slitlamp.tracing.sites import resid_pre, vision_attention, vision_k, vision_q

Variant = Literal["paper", "as_released"]
Encoder = Literal["cls", "received"]
Select = Literal["outliers", "random", "least"]
VARIANTS: tuple[str, ...] = ("paper", "as_released")
ENCODERS: tuple[str, ...] = ("cls", "received")
SELECTED: dict[str, str] = {
    "outliers": "first in the encoder's attention",
    "random": "drawn at random",
    "least": "last in the encoder's attention",
}


@dataclass
class OutlierContrast(ContrastDecoding):
    """Decode from what the model says with the image, against what it says with the outlier tokens of the image alone.

    l* = (1 + alpha) l(all image tokens) - alpha l(outliers), on logits, then APC. Outliers are the `top_k` image tokens, of
    the view of the whole image, whose patches get most of the attention of the tower's CLS token in the block whose output the
    model reads. All other image tokens, those of tiles and ends of rows included, are taken out of the contrast. The cost
    is a pass of the tower per run to find them, one more over the prompt, and twice the rows in every step; one image per row.

    Variants. "paper": attention as the tower has it, the mean over heads; tokens in the order of the image. "as_released": the
    dot product of queries and keys over the full width, heads not split, in the block before the last whichever the model
    reads; tokens in the order of their attention. Two things of the released code are not done in either: its sampler, which
    passes by temperature, top-p, top-k and the least length, also in its baseline; and, for InstructBLIP, the choice among
    patches before the Q-Former (by an index off by one): families with a Q-Former are refused.

    Attributes:
        alpha: strength; 0 contrasts nothing. The paper's for LLaVA: 0.5 for captions (the default), 2 for other prompts.
        top_k: how many tokens are left; 10 is the paper's for LLaVA (of 576).
        variant: "paper" or "as_released".
        encoder_attention: "cls", or, for towers without a CLS token, "received": the mean attention that a patch gets from
            all patches, which is another quantity. The as-released variant has "cls" alone.
        select: which tokens are left: "outliers" (the method), or its controls "random" (as many of the same view, the same
            for all rows) and "least" (as many, those that get least attention).
        seed: of the random tokens.
        beta: of APC; 0.1 is the paper's.
    """

    alpha: float = 0.5
    top_k: int = 10
    variant: Variant = "paper"
    encoder_attention: Encoder = "cls"
    select: Select = "outliers"
    seed: int = 0
    beta: float = field(default=0.1, kw_only=True)
    tokens_: tuple[Tensor, ...] = field(default=(), init=False, repr=False, compare=False)
    """Of the last run, per row: int64 [token], the image tokens that were left, numbered from 0 among the row's."""

    name: ClassVar[str] = "OutlierContrast"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters out of range, and models whose image tokens have no attention of the tower's to be chosen by."""
        super().check(anatomy)
        if not self.alpha >= 0:
            raise InputError(f"{self.name}: alpha must be 0 or more, found {self.alpha!r}")
        if self.top_k < 1:
            raise InputError(f"{self.name}: top_k must be at least 1, found {self.top_k!r}")
        for what, value, known in (
            ("variant", self.variant, VARIANTS),
            ("encoder_attention", self.encoder_attention, ENCODERS),
            ("select", self.select, SELECTED),
        ):
            if value not in known:
                raise unknown(f"{self.name} {what}", str(value), known)
        check_places(anatomy)
        if anatomy.deepstack_layers:
            raise UnsupportedError(
                f"{self.name}: {anatomy.family.name} reads the image in several layers (DeepStack); it cannot be given some "
                "image tokens alone"
            )
        if self.variant == "as_released" and self.encoder_attention != "cls":
            raise InputError(f"{self.name}: the as-released variant goes by the CLS token; take variant='paper'")
        if self.encoder_attention == "cls" and not anatomy.has_cls:
            raise UnsupportedError(
                f"{self.name}: the vision tower of {anatomy.family.name} has no CLS token; encoder_attention='received' goes by "
                "the mean attention that a patch gets from all patches, which is another quantity"
            )

    def views(self, run: RunContext) -> Sequence[ContrastView]:
        """The batch with the chosen image tokens alone."""
        if not run.batch.has_images:
            raise InputError(f"{self.name} needs an image in every row, whose tokens it chooses among")
        released = self.variant == "as_released"
        last = run.anatomy.n_vision_layers - 1
        layer = last - 1 if released else feature_block(run.source.model.config, last + 1)
        sites = _released_sites(layer) if released else [self._attention(layer)]
        trace = run.trace(run.batch, [*sites, resid_pre(layers=0, positions="image", label="embedded")], ())
        attention, real = _released_attention(trace, layer) if released else _attention(trace, layer)
        n_patches = real.sum(dim=1).tolist()
        chosen = []
        for row in range(run.batch.size):
            placed = place_tokens(run.anatomy, run.batch, row, n_patches)
            values = placed.of_patches(attention[placed.tile, : n_patches[placed.tile]], "sum").cpu()
            tokens = placed.token[self._chosen(values)]
            chosen.append(tokens if released else tokens.sort().values)
        self.tokens_ = tuple(chosen)
        return [(only_tokens(run.batch, chosen, trace["embedded"][0]), ())]

    def _attention(self, layer: int) -> Site:
        queries: Literal["cls", "patches"] = "cls" if self.encoder_attention == "cls" else "patches"
        return vision_attention(queries, layers=layer, reduce_heads="mean", reduce_queries="mean", label="encoder")

    def _chosen(self, attention: Tensor) -> Tensor:
        """int64 [chosen]: of tokens with so much attention [token], those that are left, in the order of it."""
        k = min(self.top_k, len(attention))
        if self.select == "random":
            return torch.randperm(len(attention), generator=torch.Generator().manual_seed(self.seed))[:k]
        return attention.topk(k, largest=self.select == "outliers").indices

    def combine(self, clean: Tensor, contrasts: Sequence[Tensor], step: Tensor) -> Tensor:
        """(1 + alpha) l - alpha l'."""
        return (1 + self.alpha) * clean - self.alpha * contrasts[0]

    def controls(self) -> dict[str, Intervention]:
        """As many random tokens; as many that get least attention; and APC without a contrast."""
        return {
            "random": replace(self, select="random"),
            "least": replace(self, select="least"),
            "apc_only": replace(self, alpha=0.0),
        }

    def describe(self) -> str:
        """What this does, in a few plain words."""
        how = "" if self.variant == "paper" else ", as released"
        received = "" if self.encoder_attention == "cls" else " (received)"
        return (
            f"contrast with the {self.top_k} image tokens {SELECTED[self.select]}{received} alone{how}, alpha {self.alpha:g}, "
            f"beta {self.beta:g}"
        )


def _attention(trace: Trace, layer: int) -> tuple[Tensor, Tensor]:
    """Attention to patches [tile, patch] and which there are, bool [tile, patch]."""
    return trace["encoder"][layer].float(), trace["encoder"].key_mask


def _released_sites(layer: int) -> list[Site]:
    return [vision_q(layer, positions="cls", label="query"), vision_k(layer, positions="patches", label="key")]


def _released_attention(trace: Trace, layer: int) -> tuple[Tensor, Tensor]:
    """As `_attention`, before the softmax, which does not change the order of patches."""
    query, key = trace["query"][layer].flatten(-2).float(), trace["key"][layer].flatten(-2).float()
    return (key @ query.mT)[..., 0], trace.mask("key")
