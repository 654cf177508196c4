"""Attention scores raised where a next token is predicted: a becomes a + factor |a|, before the softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slitlamp.errors import UnsupportedError
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import AttentionEdit, Calls
from slitlamp.tracing.sites import Positions


def predicting_rows(batch: Batch) -> tuple[Positions, Positions]:
    """The positions that predict what is generated, whether its tokens come one by one or all at once: the last of the prompt,
    bool [batch, position], and the name of those that are generated. No position is in both.
    """
    place = torch.arange(batch.length, device=batch.device)
    return place == batch.last_prompt_position[:, None], "generated"


def raised_scores(layers: Sequence[int], batch: Batch, factors: Tensor) -> list[AttentionEdit]:
    """Edits by which those positions attend otherwise, in all heads of some layers.

    Args:
        layers: 0-based.
        batch: of the run.
        factors: [batch, position], by how much of its size the score to each position changes; tokens that are generated step
            by step have none.
    """

    def raise_(rows: Tensor, columns: Tensor, calls: Calls) -> Tensor:
        taken = factors.to(columns.device)[:, columns.clamp(max=batch.length - 1)]
        return taken.masked_fill(columns >= batch.length, 0)[:, None, None]

    return [
        AttentionEdit(layer, raise_, queries, relative=True) for layer in layers for queries in predicting_rows(batch)
    ]


def check_image_tokens(anatomy: Anatomy, whose: str) -> None:
    """Refuse models that have no image tokens among the positions of their self-attention.

    Raises:
        UnsupportedError: it is one.
    """
    if anatomy.family.cross is not None:
        raise UnsupportedError(
            f"{whose}: {anatomy.family.name} reads the image by cross-attention: there are no image tokens among its positions"
        )


def boosted_layers(layers: Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    """The layers in which scores are raised: those given, or the third to the last."""
    return tuple(range(2, n_layers)) if layers is None else tuple(layers)


def describe_layers(layers: Sequence[int] | None) -> str:
    """Those layers in a few words."""
    if layers is None:
        return "the third layer to the last"
    return f"layers {', '.join(map(str, layers))}" if layers else "no layer"
