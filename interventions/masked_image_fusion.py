"""Fusion with a view of what matters for the question (AGLA: An et al., CVPR 2025, arXiv 2406.12718)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from interventions.given_tensors import check_layers
from interventions.image_relevance import blurred_noise, default_layer, grad_att
from slitlamp.decoding.intervention import Intervention, RunContext
from slitlamp.decoding.pixel_views import check_keep, check_one_tile, masked
from slitlamp.decoding.two_branch import ContrastDecoding, ContrastView
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy

Relevance = Literal["grad_att", "random"]
RELEVANCE: dict[str, str] = {
    "grad_att": "the model's own attention and its gradient (grad_att) single out",
    "random": "blurred noise singles out, whatever the image",
}


@dataclass
class MaskedImageFusion(ContrastDecoding):
    """Decode from what the model says of the image and of a view of it in which what does not matter is blacked out.

    l* = l(image) + alpha l(masked image), on logits, then APC. What matters is said here by the model's own attention and its
    gradient (`grad_att` of ViCrop, at the last token of the prompt), in place of the paper's image-text matching model, which is
    not loaded: results are not those of AGLA as published. The weights sum to 1 + alpha, so that a masked view that says what
    the image says makes the model surer of it; the control "unmasked" is that alone. The cost is one forward and one
    backward pass per run, and one more forward pass per step. Families whose tower takes each image as one picture alone.

    Attributes:
        alpha: 0 adds nothing; 2 is the paper's.
        keep: the share of the pixels that stay, above 0, at most 1. The paper's is 1 - s / 2 with s the similarity of image and
            prompt to a matching model; 0.8 for all items is our default [?].
        layer: 0-based, of `grad_att`; None for the one as deep as LLaVA-1.5's 14 of 32 [?].
        relevance: "grad_att", or, as a control, "random": blurred noise, the same for all items.
        seed: of the noise.
        beta: of APC; 0.5 is the paper's.
    """

    alpha: float = 2.0
    keep: float = 0.8
    layer: int | None = None
    relevance: Relevance = "grad_att"
    seed: int = 0
    beta: float = field(default=0.5, kw_only=True)
    maps_: tuple[Tensor, ...] = field(default=(), init=False, repr=False, compare=False)
    """Of the last run, per row: float32 [image token], the map that the view was masked by."""

    name: ClassVar[str] = "MaskedImageFusion"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters out of range, and families on whose images no map can be laid."""
        super().check(anatomy)
        if not self.alpha >= 0:
            raise InputError(f"{self.name}: alpha must be 0 or more, found {self.alpha!r}")
        check_keep(self.keep, self.name)
        if self.relevance not in RELEVANCE:
            raise unknown(f"{self.name} relevance", str(self.relevance), RELEVANCE)
        check_one_tile(anatomy, self.name)
        check_layers((self._layer(anatomy),), anatomy.n_layers, self.name)

    def _layer(self, anatomy: Anatomy) -> int:
        return default_layer(anatomy.n_layers) if self.layer is None else self.layer

    def views(self, run: RunContext) -> Sequence[ContrastView]:
        """The batch with masked images."""
        if not run.batch.has_images:
            raise InputError(f"{self.name} needs an image in every row, of which it masks a part")
        random = self.relevance == "random"
        maps = blurred_noise(run.batch, self.seed) if random else grad_att(run, self._layer(run.anatomy))
        self.maps_ = tuple(maps)
        return [(masked(run.batch, maps, self.keep), ())]

    def combine(self, clean: Tensor, contrasts: Sequence[Tensor], step: Tensor) -> Tensor:
        """l + alpha l'."""
        return clean + self.alpha * contrasts[0]

    def controls(self) -> dict[str, Intervention]:
        """A random map with the same share of pixels; the image unmasked; and APC alone."""
        return {
            "random": replace(self, relevance="random"),
            "unmasked": replace(self, keep=1.0),
            "apc_only": replace(self, alpha=0.0),
        }

    def describe(self) -> str:
        """What this does, in a few plain words."""
        what = "the image as it is"
        if self.keep < 1:
            where = "" if self.layer is None or self.relevance == "random" else f" in layer {self.layer}"
            what = f"the {self.keep:.0%} of the image that {RELEVANCE[self.relevance]}{where}"
        return f"fusion with {what}, alpha {self.alpha:g}, beta {self.beta:g}; no matching model"
