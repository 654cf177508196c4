"""Contrasts with a distorted or missing image: VCD (arXiv 2311.16922, CVPR 2024) and VDD (debiasing, arXiv 2403.05262)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

from torch import Tensor

from slitlamp.decoding.intervention import Intervention, RunContext
from slitlamp.decoding.two_branch import ContrastDecoding, ContrastView
from slitlamp.decoding.views import ImageFree, check_diffusion_step, diffused, image_free
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy

Distorted = Literal["diffusion", ImageFree]
DISTORTED: tuple[str, ...] = tuple(name for one in get_args(Distorted) for name in (get_args(one) or (one,)))
WORDS = {
    "diffusion": "a diffusion-noised image",
    "deleted": "no image",
    "zero": "image embeddings of 0",
    "mean": "the mean image embedding",
    "noise": "an image of noise",
}


@dataclass
class ImageContrast(ContrastDecoding):
    """Decode from what the model says with the image, against what it says with a distorted one or none.

    l* = (1 + alpha) l(image) - alpha l(view), on logits, then APC. VCD: the view is the image under the noise of a diffusion
    model. VDD: no image ("deleted"), or its embeddings replaced ("zero", "mean"). Published with sampling at temperature 1;
    compare with greedy decoding as well. The cost is one more pass over the prompt, and twice
    the rows in every step.

    Attributes:
        alpha: strength; 0 contrasts nothing (greedy decoding is then the plain one, since APC keeps the most probable token);
            1 is the papers'.
        view: "diffusion" (VCD), or "deleted", "zero", "mean", "noise"; see `slitlamp.decoding.views`.
        diffusion_step: T of the diffusion, 0 to 999; VCD's 500.
        seed: of the noise.
        beta: of APC; 0.1 is the papers'.
    """

    alpha: float = 1.0
    view: Distorted = "diffusion"
    diffusion_step: int = 500
    seed: int = 0
    beta: float = field(default=0.1, kw_only=True)

    name: ClassVar[str] = "ImageContrast"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters out of range."""
        super().check(anatomy)
        if not self.alpha >= 0:
            raise InputError(f"{self.name}: alpha must be 0 or more, found {self.alpha!r}")
        check_diffusion_step(self.diffusion_step)
        if self.view not in DISTORTED:
            raise unknown(f"{self.name} view", str(self.view), DISTORTED)

    def views(self, run: RunContext) -> Sequence[ContrastView]:
        """The batch with a distorted image, or none."""
        if self.view == "diffusion":
            return [(diffused(run.batch, self.diffusion_step, self.seed), ())]
        return [image_free(run.batch, self.view, self.seed)]

    def combine(self, clean: Tensor, contrasts: Sequence[Tensor], step: Tensor) -> Tensor:
        """(1 + alpha) l - alpha l'."""
        return (1 + self.alpha) * clean - self.alpha * contrasts[0]

    def controls(self) -> dict[str, Intervention]:
        """APC without a contrast, which alone changes what is sampled; and the same contrast with noise of another kind."""
        other: Distorted = "diffusion" if self.view == "noise" else "noise"
        return {"apc_only": replace(self, alpha=0.0), other: replace(self, view=other)}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        step = f" (step {self.diffusion_step})" if self.view == "diffusion" else ""
        return f"contrast with {WORDS[self.view]}{step}, alpha {self.alpha:g}, beta {self.beta:g}"
