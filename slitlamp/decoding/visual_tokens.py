"""Edits of image tokens before the language model: which of them it is given, and what stands at them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models.anatomy import Anatomy
from slitlamp.tracing.session import AnyEdit
from slitlamp.tracing.sites import resid_pre

Places = Literal["contiguous", "original"]


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The image tokens that the language model is given, row by row, in the order of the prompt.

    Attributes:
        number: per row, int64 [token], ascending: which of the row's image tokens, numbered from 0 in the batch as given, each
            is; of tokens that were merged into one, the one that stands for them.
        states: per row, [token, d_model], what stands at them at the input of the first block.
    """

    number: tuple[Tensor, ...]
    states: tuple[Tensor, ...]

    def take(self, chosen: Sequence[Tensor]) -> ImageTokens:
        """Some of the tokens alone, in their order.

        Args:
            chosen: per row, bool [token].
        """
        return ImageTokens(
            tuple(one[mask.to(one.device)] for one, mask in zip(self.number, chosen, strict=True)),
            tuple(one[mask.to(one.device)] for one, mask in zip(self.states, chosen, strict=True)),
        )


@dataclass
class VisualTokenEdit(Intervention):
    """An intervention that gives the language model other image tokens: fewer, or others in their place.

    Several act one after the other, each on what the one before has left. The vision tower and the projector run as ever, once;
    the language model then runs over what is left, so that pruning makes it faster. What is recorded under such an intervention
    has the positions of the shorter prompt (`trace.batch`). `generate` and `forward` take the whole batch and change it, and so
    every generation can be run again.

    Attributes:
        positions: of rows that got shorter: "contiguous", tokens are counted anew without gaps; "original", every token has the
            position that it has in the whole prompt.
    """

    positions: Places = field(default="contiguous", kw_only=True)

    kind: ClassVar[Kind] = "visual_tokens"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse models whose image tokens are not given to the language model at its input."""
        if self.positions not in ("contiguous", "original"):
            raise unknown(f"{self.name} positions", str(self.positions), ("contiguous", "original"))
        if anatomy.family.cross is not None or anatomy.deepstack_layers:
            how = "by cross-attention" if anatomy.family.cross is not None else "in several layers (DeepStack)"
            raise UnsupportedError(
                f"{self.name}: {anatomy.family.name} reads the image {how}; it cannot be given other image tokens at its input"
            )
        if self.positions == "original" and anatomy.family.first_position is None:
            raise UnsupportedError(
                f"{self.name}: {anatomy.family.name} counts positions by row and column of the image, which are lost with its "
                "grid; use positions='contiguous'"
            )

    def edits(self, run: RunContext) -> list[AnyEdit]:
        """None: the batch itself is changed."""
        return []

    @abstractmethod
    def change(self, run: RunContext, tokens: ImageTokens) -> ImageTokens:
        """Other image tokens.

        A function of its arguments alone, the same for a row whatever else is in the batch and whatever follows its prompt.

        Args:
            run: of the whole batch.
            tokens: what earlier interventions left of them.
        """


def check_together(interventions: Sequence[Intervention]) -> None:
    """Refuse interventions that number the positions of one prompt differently.

    Raises:
        UnsupportedError: there are two.
    """
    found = [one for one in interventions if isinstance(one, VisualTokenEdit)]
    for one in found[1:]:
        if one.positions != found[0].positions:
            raise UnsupportedError(
                f"{found[0].name} with positions={found[0].positions!r} and {one.name} with positions={one.positions!r}: a "
                "prompt has one way of counting its positions; give both the same"
            )


def with_visual_edits(run: RunContext, interventions: Sequence[Intervention]) -> RunContext:
    """The run over what interventions leave of a batch's image tokens; the same run where they leave all as they are.

    Raises:
        InputError: a row without an image.
    """
    found = [one for one in interventions if isinstance(one, VisualTokenEdit)]
    if not found:
        return run
    batch = run.batch
    if not batch.has_images:
        rows = [batch.ids[row] for row, some in enumerate(batch.image_mask.any(dim=1).tolist()) if not some]
        raise InputError(f"{found[0].name} needs an image in every row; none in {', '.join(rows[:5])}")
    counts = batch.image_mask.sum(dim=1).tolist()
    embedded = run.trace(batch, [resid_pre(layers=0, positions="image", label="embedded")], ())["embedded"][0]
    whole = ImageTokens(
        tuple(torch.arange(count) for count in counts),
        tuple(states[:count] for states, count in zip(embedded, counts, strict=True)),
    )
    tokens = whole
    for one in found:
        tokens = one.change(run, tokens)
    if all(map(torch.equal, tokens.number, whole.number)):
        if all(map(torch.equal, tokens.states, whole.states)):
            return run
        return replace(run, batch=batch.with_features(tokens.states), given=batch)
    if not all(len(one) for one in tokens.number):
        raise InputError(
            f"{' and '.join(one.name for one in found)} leave a row no image token at all; keep at least one"
        )
    shorter = batch.with_image_tokens(tokens.number, tokens.states, keep_positions=found[0].positions == "original")
    return replace(run, batch=shorter, given=batch, kept=tokens.number)
