"""Guidance by the image: soft-image guidance (LACING's IFG, arXiv 2411.12591) and PAI's output step (arXiv 2407.21771)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from interventions.given_tensors import embeddings, name_of
from slitlamp.decoding.intervention import Intervention, RunContext
from slitlamp.decoding.two_branch import ContrastDecoding, ContrastView
from slitlamp.decoding.views import IMAGE_FREE, ImageFree, image_free, soft_prompt
from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models import Anatomy

Space = Literal["logits", "log-probs"]
Guide = Literal["soft", ImageFree]
SPACES: tuple[str, ...] = ("logits", "log-probs")


@dataclass
class ImageFreeGuidance(ContrastDecoding):
    """Decode from what the model says without the image, taken `scale` times as far towards what it says with it.

    l* = l' + s (l - l'), with l' that of the image-free view: classifier-free guidance. LACING's IFG is on logits, without APC,
    s from 1 to 3; its image-free prompt is trained: give it as `prompt`, with `view="soft"`, or take the embeddings' mean, zero,
    or a blank image ("black", "grey", "white") in its place. PAI's output step is
    `ImageFreeGuidance(1.1, view="deleted", space="log-probs", beta=0.1)`. The cost is one more pass over the prompt, and twice
    the rows in every step.

    Attributes:
        scale: s; 1 changes nothing. 1.5, within the range of the paper, is our default [?].
        view: how the image is removed; see `slitlamp.decoding.views.image_free`. "soft" puts `prompt` in its place.
        space: "logits" or "log-probs". Log-probabilities are given on the scale of the clean logits. The two differ by a constant
            per step, which no softmax sees, but a repetition penalty does.
        seed: of the noise, for `view="noise"`.
        prompt: for `view="soft"`, the embeddings in the place of each image, [token, d_model], inputs of the first block:
            numbers, or a safetensors file.
        key: their name in the file.
        beta: of APC; 0 for none.
    """

    scale: float = 1.5
    view: Guide = "mean"
    space: Space = "logits"
    seed: int = 0
    prompt: Path | str | Sequence[Sequence[float]] | None = None
    key: str = "prompt"

    name: ClassVar[str] = "ImageFreeGuidance"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters out of range."""
        super().check(anatomy)
        if not self.scale >= 0:
            raise InputError(f"{self.name}: scale must be 0 or more, found {self.scale!r}")
        if self.view not in ("soft", *IMAGE_FREE):
            raise unknown(f"{self.name} view", str(self.view), ("soft", *IMAGE_FREE))
        if self.view == "soft":
            self._embeddings(anatomy)
            if anatomy.family.cross is not None:
                raise UnsupportedError(
                    f"{self.name}: {anatomy.family.name} reads the image by cross-attention; it has no image embeddings that a "
                    "soft prompt could replace"
                )
        elif self.prompt is not None:
            raise InputError(f"{self.name}: a prompt goes with view='soft', found view={self.view!r}")
        if self.space not in SPACES:
            raise unknown(f"{self.name} space", str(self.space), SPACES)

    def views(self, run: RunContext) -> Sequence[ContrastView]:
        """The batch without its image."""
        if self.view == "soft":
            return [(soft_prompt(run.batch, self._embeddings(run.anatomy)), ())]
        return [image_free(run.batch, self.view, self.seed)]

    def _embeddings(self, anatomy: Anatomy) -> Tensor:
        if self.prompt is None:
            raise InputError(
                f"{self.name}: view='soft' needs a prompt: numbers [token, d_model], or a safetensors file"
            )
        return embeddings(self.prompt, self.key, anatomy.d_model, self.name)

    def combine(self, clean: Tensor, contrasts: Sequence[Tensor], step: Tensor) -> Tensor:
        """s l + (1 - s) l'; of log-probabilities on the scale of the clean logits, l + (s - 1) (lp - lp')."""
        without = contrasts[0]
        if self.space == "logits":
            return self.scale * clean + (1 - self.scale) * without
        return clean + (self.scale - 1) * (clean.log_softmax(dim=-1) - without.log_softmax(dim=-1))

    def controls(self) -> dict[str, Intervention]:
        """The same guidance away from an image of noise, and, with APC, APC alone."""
        other: ImageFree = "deleted" if self.view == "noise" else "noise"
        found: dict[str, Intervention] = {other: replace(self, view=other, prompt=None)}
        return found | ({"apc_only": replace(self, scale=1.0)} if self.beta else {})

    def describe(self) -> str:
        """What this does, in a few plain words."""
        apc = f", beta {self.beta:g}" if self.beta else ""
        what = f"a soft prompt ({name_of(self.prompt)})" if self.view == "soft" else f"the image {self.view}"
        return f"guidance by the image against {what}, scale {self.scale:g}, on {self.space}{apc}"
