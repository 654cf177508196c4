"""Contrasts with a distorted or missing image: VCD (arXiv 2311.16922, CVPR 2024) and VDD (debiasing, arXiv 2403.05262)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from slitlamp.decoding.intervention import Intervention, RunContext
from slitlamp.decoding.two_branch import ContrastDecoding, ContrastView
from slitlamp.decoding.views import ImageFree, blocked, check_diffusion_step, check_rho, diffused, image_free
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy

Distorted = Literal["diffusion", "blocked", "both", ImageFree]
DISTORTED: tuple[str, ...] = get_args(Distorted)
WORDS = {
    "diffusion": "a diffusion-noised image",
    "blocked": "an image that hardly any attention goes to",
    "both": "the mean of no image and an unknown word for it",
    "deleted": "no image",
    "unk": "an unknown word for the image",
    "zero": "image embeddings of 0",
    "mean": "the mean image embedding",
    "noise": "an image of noise",
    "black": "a black image",
    "grey": "a grey image",
    "white": "a white image",
}


@dataclass
class ImageContrast(ContrastDecoding):
    """Decode from what the model says with the image, against what it says with a distorted one or none.

    l* = (1 + alpha) l(image) - alpha l(view), on logits, then APC. VCD: the view is the image under the noise of a diffusion
    model. VDD: no image ("deleted"), an unknown word in its place ("unk"), or the mean of the logits of these two ("both").
    Published with sampling at temperature 1; compare with greedy decoding as well. The cost is one more pass over the prompt, and
    twice the rows in every step (two and thrice for "both").

    Attributes:
        alpha: strength; 0 contrasts nothing (greedy decoding is then the plain one, since APC keeps the most probable token);
            1 is the papers'.
        view: "diffusion" (VCD); "deleted", "unk", "both" (VDD); "zero", "mean", "noise", "black", "grey", "white" (see
            `slitlamp.decoding.views.image_free`); or "blocked" (BDHS, see `slitlamp.decoding.views.blocked`).
        diffusion_step: T of the diffusion, 0 to 999; VCD's 500.
        rho: the share of image tokens that are blocked, for `view="blocked"`; 0.99 is the paper's.
        seed: of the noise, and of the tokens that are not blocked.
        beta: of APC; 0.1 is the papers'.
    """

    alpha: float = 1.0
    view: Distorted = "diffusion"
    diffusion_step: int = 500
    rho: float = 0.99
    seed: int = 0
    beta: float = field(default=0.1, kw_only=True)

    name: ClassVar[str] = "ImageContrast"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters out of range."""
        super().check(anatomy)
        if not self.alpha >= 0:
            raise InputError(f"{self.name}: alpha must be 0 or more, found {self.alpha!r}")
        check_diffusion_step(self.diffusion_step)
        check_rho(self.rho)
        if self.view not in DISTORTED:
            raise unknown(f"{self.name} view", str(self.view), DISTORTED)

    def views(self, run: RunContext) -> Sequence[ContrastView]:
        """The batch with a distorted image, or none; two for "both"."""
        if self.view == "diffusion":
            return [(diffused(run.batch, self.diffusion_step, self.seed), ())]
        if self.view == "blocked":
            return [blocked(run.batch, run.anatomy, self.rho, self.seed)]
        if self.view == "both":
            return [image_free(run.batch, "deleted"), image_free(run.batch, "unk")]
        return [image_free(run.batch, self.view, self.seed)]

    def combine(self, clean: Tensor, contrasts: Sequence[Tensor], step: Tensor) -> Tensor:
        """(1 + alpha) l - alpha l', with l' the mean over the contrasts."""
        other = contrasts[0] if len(contrasts) == 1 else torch.stack(list(contrasts)).mean(dim=0)
        return (1 + self.alpha) * clean - self.alpha * other

    def controls(self) -> dict[str, Intervention]:
        """APC without a contrast, which alone changes what is sampled; and the same contrast with noise of another kind."""
        other: Distorted = "diffusion" if self.view == "noise" else "noise"
        return {"apc_only": replace(self, alpha=0.0), other: replace(self, view=other)}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        step = {"diffusion": f" (step {self.diffusion_step})", "blocked": f" (rho {self.rho:g})"}.get(self.view, "")
        return f"contrast with {WORDS[self.view]}{step}, alpha {self.alpha:g}, beta {self.beta:g}"
