"""No attention to the image in the last layers (the third step of YOPO)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from interventions.image_columns import STAGES, Stage, attention_layers, check_stage, zero_columns
from interventions.raised_scores import check_image_tokens
from slitlamp.decoding.edits import knock_out
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy
from slitlamp.tracing import AnyEdit

Select = Literal["last", "first", "random"]
SELECTED = ("last", "first", "random")


@dataclass
class LayerDrop(Intervention):
    """From a layer on, no token attends to image tokens, in all heads.

    Every position keeps its attention to itself. The two stages are different interventions. Cut before the softmax, a row's
    other weights grow to add up to 1, and nothing of the image reaches text in these layers. Zeroed after it, they stay as they
    are: how little is left still tells how much attention the image drew.

    Attributes:
        last: how many of the last layers; 0 changes nothing; None for half of the model (rounded down), as the paper's.
        stage: "pre_softmax" or "post_softmax"; which is the paper's is not settled here [?].
        select: "last" (the method), or its controls: as many "first" layers, or as many "random" ones drawn among all,
            but not the last ones themselves.
        seed: of the random layers.
    """

    last: int | None = None
    stage: Stage = "pre_softmax"
    select: Select = "last"
    seed: int = 0

    name: ClassVar[str] = "LayerDrop"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse more layers than there are, and models without image tokens among their positions."""
        check_stage(self.stage, self.name)
        if self.select not in SELECTED:
            raise unknown(f"{self.name} select", str(self.select), SELECTED)
        check_image_tokens(anatomy, self.name)
        self.chosen(anatomy)

    def chosen(self, anatomy: Anatomy) -> tuple[int, ...]:
        """The layers without attention to the image, in order.

        Raises:
            InputError: not a number of layers that the model has.
        """
        layers = attention_layers(None, anatomy, self.name)
        count = len(layers) // 2 if self.last is None else self.last
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= len(layers):
            raise InputError(f"{self.name}: last must be a number of layers from 0 to {len(layers)}, found {count!r}")
        last = layers[len(layers) - count :]
        if self.select == "first":
            return layers[:count]
        if self.select == "last" or count in (0, len(layers)):
            return last
        rng, drawn = np.random.default_rng(self.seed), last
        while drawn == last:
            drawn = tuple(sorted(int(layer) for layer in rng.choice(layers, size=count, replace=False)))
        return drawn

    def controls(self) -> dict[str, Intervention]:
        """The same in as many of the first layers, and in as many random ones."""
        return {"first": replace(self, select="first"), "random_layers": replace(self, select="random")}

    def describe(self) -> str:
        """What this does, in a few plain words, the stage among them."""
        count = "half of the layers" if self.last is None else f"{self.last} layer{'' if self.last == 1 else 's'}"
        where = (
            f"{count} drawn at random (seed {self.seed})" if self.select == "random" else f"the {self.select} {count}"
        )
        return f"attention to image tokens {STAGES[self.stage]}, in {where}"

    def edits(self, run: RunContext) -> list[AnyEdit]:
        """Edits of attention, before or after the softmax."""
        layers = self.chosen(run.anatomy)
        if self.stage == "pre_softmax":
            return [*knock_out(layers, "all", "image")]
        return [zero_columns(layer, "all", run.batch.image_mask) for layer in layers]
