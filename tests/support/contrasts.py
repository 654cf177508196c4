"""A contrast of given views, and what looks at the scores of a generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LogitsProcessor

import slitlamp
from slitlamp.decoding import ContrastDecoding, RunContext, image_free
from slitlamp.decoding.edits import knock_out
from slitlamp.decoding.two_branch import ContrastView
from slitlamp.models import Batch
from slitlamp.vlm import VLM


class Planned(Exception):
    """Raised in the midst of a run."""


MakeView = Callable[[Batch], ContrastView]
ROUNDING = 2e-4
"""Logits of order 10 in float32: sums of some hundred terms in another order differ by 1e-5, contrasts by some times that."""


def unequal_prompts(organism: VLM) -> Batch:
    """Three rows of unequal prompts, as the embedded model was trained and not."""
    scenes = slitlamp.load_dataset("emoji_scenes/captions").take(3).items
    prompts = [scenes[0].prompt, "describe the image", f"{scenes[0].prompt} what is on the left side ?"]
    made = organism.encode([one.image for one in scenes], prompts)
    assert len(set(made.lengths)) == 3
    return made


@dataclass
class Against(ContrastDecoding):
    """(1 + alpha + growth t) l - (alpha + growth t) l', the mean over the views."""

    alpha: float = 1.0
    growth: float = 0.0
    make: Sequence[MakeView] = (image_free,)

    name: ClassVar[str] = "Against"

    def views(self, run: RunContext) -> Sequence[ContrastView]:
        return [make(run.batch) for make in self.make]

    def combine(self, clean: Tensor, contrasts: Sequence[Tensor], step: Tensor) -> Tensor:
        weight = (self.alpha + self.growth * step)[..., None]
        return (1 + weight) * clean - weight * torch.stack(list(contrasts)).mean(dim=0)


@dataclass
class Seen(LogitsProcessor):
    """Keeps what it is given, and, where tokens are given, makes the model say them."""

    force: list[Tensor] | None = None
    scores: list[Tensor] = field(default_factory=list)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.scores.append(scores.clone())
        if self.force is None:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.force[len(self.scores) - 1][:, None], 0.0)


def same(batch: Batch) -> ContrastView:
    return batch, ()


def zero(batch: Batch) -> ContrastView:
    return image_free(batch, "zero")


def noise(batch: Batch) -> ContrastView:
    return image_free(batch, "noise")


def blind(batch: Batch) -> ContrastView:
    """No attention to the image, cut in every layer of the embedded model, in every step."""
    return batch, knock_out(range(6), "all", "image")
