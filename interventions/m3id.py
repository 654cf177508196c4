"""M3ID: mutual-information decoding against forgetting of the image (Favero et al., CVPR 2024, arXiv 2403.14003)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from slitlamp.decoding.intervention import Intervention, RunContext
from slitlamp.decoding.two_branch import ContrastDecoding, ContrastView
from slitlamp.decoding.views import ImageFree, check_image_free, image_free
from slitlamp.errors import InputError
from slitlamp.models import Anatomy


@dataclass
class M3ID(ContrastDecoding):
    """Decode from what the image adds to the text, more so the longer the answer.

    With lp the log-probabilities with and lp' those without the image, and t the number of tokens generated before:
    lp* = lp + w_t (lp - lp'), w_t = e^{decay (t + offset)} - 1, in steps where max lp < log(gate); else lp. It is given on the
    scale of the logits (a constant per step that no softmax sees), so that at weight 0 they are the plain ones. At t = 0 and
    offset 0 nothing is changed. The cost is one more pass over the prompt, and twice the
    rows in every step.

    Attributes:
        decay: lambda; 0 changes nothing, 0.02 is the paper's.
        gate: the probability of the most probable token above which the step is left as it is; 0.3 is the paper's.
        max_weight: the largest w_t, which has no bound in the paper; 10, reached at t = 120, is our default [?].
        offset: t0, how many steps the image has been forgotten for before the first [?].
        view: how the image is removed; "deleted" is the paper's. See `slitlamp.decoding.views.image_free`.
        seed: of the noise, for `view="noise"`.
        beta: of APC; 0, the paper's, for none.
    """

    decay: float = 0.02
    gate: float = 0.3
    max_weight: float = 10.0
    offset: int = 0
    view: ImageFree = "deleted"
    seed: int = 0

    name: ClassVar[str] = "M3ID"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters out of range."""
        super().check(anatomy)
        for name in ("decay", "max_weight", "offset"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{self.name}: {name} must be 0 or more, found {getattr(self, name)!r}")
        if not 0 < self.gate <= 1:
            raise InputError(f"{self.name}: gate must be above 0 and at most 1, found {self.gate!r}")
        check_image_free(self.view)

    def views(self, run: RunContext) -> Sequence[ContrastView]:
        """The batch without its image."""
        return [image_free(run.batch, self.view, self.seed)]

    def combine(self, clean: Tensor, contrasts: Sequence[Tensor], step: Tensor) -> Tensor:
        """lp + w_t (lp - lp') on the scale of the logits, or the logits where the model is sure."""
        lp, without = clean.log_softmax(dim=-1), contrasts[0].log_softmax(dim=-1)
        weight = torch.expm1(self.decay * (step + self.offset).float()).clamp(max=self.max_weight)
        unsure = lp.amax(dim=-1) < math.log(self.gate)
        return torch.where(unsure[..., None], clean + weight[..., None] * (lp - without), clean)

    def controls(self) -> dict[str, Intervention]:
        """The same weights against an image of noise; and no gate, the same contrast in the steps where the model is sure too."""
        other: ImageFree = "deleted" if self.view == "noise" else "noise"
        return {other: replace(self, view=other), "ungated": replace(self, gate=1.0)}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        started = f" from {self.offset}" if self.offset else ""
        return (
            f"contrast with the image {self.view}, weight e^({self.decay:g} t) - 1{started} up to {self.max_weight:g}, where no "
            f"token has probability {self.gate:g}"
        )
