"""PAI's input step: more attention to the image (Liu et al., ECCV 2024, arXiv 2407.21771)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from interventions.given_tensors import check_layers
from interventions.raised_scores import boosted_layers, check_image_tokens, describe_layers, raised_scores
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy
from slitlamp.tracing import AttentionEdit

Columns = Literal["image", "text"]


@dataclass
class ImageAttentionBoost(Intervention):
    """Where a next token is predicted, attention scores to image tokens are raised: a becomes a + alpha |a|.

    Before the softmax, in all heads of some layers, in the rows of the last prompt token and of every token generated after it.
    a is the model's own score, scaled and soft-capped. Items without an image are left as they are. PAI is this with its output
    step: `vlm.apply(ImageAttentionBoost(0.5), ImageFreeGuidance(1.1, view="deleted", space="log-probs", beta=0.1))`; the branch
    without the image is not changed.

    Attributes:
        alpha: 0 changes nothing; the paper's are 0.2, the default, to 0.5; below 0 takes attention away from the image.
        layers: 0-based; None for the third to the last, as the paper's.
        columns: "image", or "text", its control: the same alpha on the text of the prompt, before and after the image.
    """

    alpha: float = 0.2
    layers: Sequence[int] | None = None
    columns: Columns = "image"

    name: ClassVar[str] = "ImageAttentionBoost"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters that do not fit the model, and models without image tokens among their positions."""
        if not math.isfinite(self.alpha):
            raise InputError(f"{self.name}: alpha must be a finite number, found {self.alpha!r}")
        if self.columns not in ("image", "text"):
            raise unknown(f"{self.name} columns", str(self.columns), ("image", "text"))
        check_image_tokens(anatomy, self.name)
        layers = boosted_layers(self.layers, anatomy.n_layers)
        check_layers(layers, anatomy.n_layers, self.name)
        for layer in layers:
            anatomy.place("attention", layer)

    def controls(self) -> dict[str, Intervention]:
        """The same alpha on the text of the prompt; and the opposite one on the same columns."""
        other: Columns = "text" if self.columns == "image" else "image"
        return {other: replace(self, columns=other), "reversed": replace(self, alpha=-self.alpha)}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        where = describe_layers(self.layers)
        return f"attention scores to {self.columns} tokens changed by {self.alpha:+g} of their size in {where}"

    def edits(self, run: RunContext) -> list[AttentionEdit]:
        """Edits of attention in units of its scores; none where alpha is 0."""
        if self.alpha == 0:
            return []
        batch = run.batch
        raised = batch.image_mask if self.columns == "image" else batch.text_mask & ~batch.generated_mask
        return raised_scores(boosted_layers(self.layers, run.anatomy.n_layers), batch, self.alpha * raised.float())
