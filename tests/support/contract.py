"""What the tests over all families share: prompts, batches, and a setting that many assertions look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from eager import Eager
from tiny_models.common import random_image

from slitlamp.models import Batch
from slitlamp.tracing import Site, Trace, sites
from slitlamp.vlm import VLM

TEXTS = ("is there a dog ?", "describe this red cat in the image .", "what ?")
CONTINUATIONS = (("dog", "cat", "red"), ("blue",), ())


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Equal but for rounding: 2e-5 times the largest absolute value of the reference (at least 1).

    Float32 rounds at 6e-8 relative; a few blocks of sums over at most some hundred terms keep the difference of two orders
    of summation below that.
    """
    found, wanted = found.detach(), wanted.detach()
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * scale)


def all_sites(vlm: VLM) -> list[Site]:
    """Every site that the model has, whole."""
    made = []
    for name in vlm.anatomy.places:
        make: Any = getattr(sites, name)
        if name == "cross_attention":
            made.append(make(queries="all"))
        elif name.endswith("attention"):
            made.append(make(queries="all", keys="all"))
        else:
            made.append(make(positions="all") if name == "logits" else make())
    return made


def prompt(vlm: VLM, n_images: int, text: str) -> str:
    """A prompt with placeholders around and in it, or none for processors that put the image first."""
    family = vlm.anatomy.family
    if family.placeholder is None or family.images_first:
        return text
    one = getattr(vlm.processor, family.placeholder)
    first, *others = text.split(" ")
    return " ".join([one] * min(n_images, 1) + [first] + [one] * max(n_images - 1, 0) + others)


def encode(vlm: VLM, pictures: list[list[PIL.Image.Image]], rows: Sequence[int] | None = None) -> Batch:
    """The texts above, one per list of pictures; or some rows of them."""
    texts = [prompt(vlm, len(own), text) for own, text in zip(pictures, TEXTS, strict=False)]
    chosen = range(len(pictures)) if rows is None else rows
    return vlm.encode([pictures[row] for row in chosen], [texts[row] for row in chosen], chat=False)


def pictures_of(vlm: VLM) -> list[list[PIL.Image.Image]]:
    """What the family can take in one batch: several images in a prompt, one, none, as far as its entry goes."""
    family = vlm.anatomy.family
    one, other, third = random_image(0), random_image(1, 30, 9), random_image(2, 24, 40)
    if family.cross is not None:  # prompts without an image do not mix with others, which `encode` says
        return [[one, other], [third]]
    if getattr(family, "max_images", None) == 1:
        return [[one], [third], []]
    return [[one, other], [third], []]


@dataclass
class Setting:
    """A model, a batch with continuations, all that is recorded in one forward pass over it, and the reference."""

    name: str
    vlm: VLM
    pictures: list[list[PIL.Image.Image]]
    batch: Batch
    trace: Trace
    logits: torch.Tensor
    eager: Eager

    def rows(self, label: str, layer: int) -> torch.Tensor:
        """What was recorded at all real positions: [position of any row, ...]."""
        return self.trace[label][layer][self.trace.mask(label)]
