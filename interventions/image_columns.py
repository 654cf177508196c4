"""What interventions on attention to the image share: layers, columns of attention, the prompt alone, draws of an item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from interventions.given_tensors import check_layers
from slitlamp.errors import unknown
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import Calls, WeightsEdit
from slitlamp.tracing.sites import Positions

Stage = Literal["pre_softmax", "post_softmax"]
STAGES: dict[str, str] = {
    "pre_softmax": "cut before the softmax",
    "post_softmax": "zeroed after the softmax, nothing normalised again",
}


def check_stage(stage: str, whose: str) -> None:
    """Refuse an unknown stage.

    Raises:
        UnknownNameError: not one of `STAGES`.
    """
    if stage not in STAGES:
        raise unknown(f"{whose} stage", str(stage), STAGES)


def attention_layers(layers: Sequence[int] | None, anatomy: Anatomy, whose: str) -> tuple[int, ...]:
    """Layers with self-attention: those given, in order, or all that have it.

    Raises:
        InputError: a layer outside the model, or named twice.
        UnsupportedError: one that has no self-attention.
    """
    chosen = anatomy.layers("attention") if layers is None else tuple(sorted(layers))
    check_layers(chosen, anatomy.n_layers, whose)
    for layer in chosen:
        anatomy.place("attention", layer)
    return chosen


def at_columns(chosen: Tensor, columns: Tensor) -> Tensor:
    """bool [batch, key], which keys are among positions that are chosen.

    Args:
        chosen: bool [batch, position]; later positions, those of tokens generated since, are not.
        columns: int64 [key], their positions.
    """
    taken = chosen.to(columns.device)[:, columns.clamp(max=chosen.shape[1] - 1)]
    return taken & (columns < chosen.shape[1])


def prompt_of(batch: Batch) -> Batch:
    """The batch without a continuation: what is the same in a step of decoding and in one pass over all."""
    return batch.prompt_only() if any(batch.n_generated) else batch


def from_prompt(values: Tensor, batch: Batch) -> Tensor:
    """Values [batch, position of `prompt_of(batch)`, ...] at the same tokens of the batch, zero elsewhere."""
    found = values.new_zeros(*batch.input_ids.shape, *values.shape[2:])
    prompt = prompt_of(batch).real_mask.to(values.device)
    found[(batch.real_mask & ~batch.generated_mask).to(values.device)] = values[prompt]
    return found


def drawn_order(number: int, seed: int, layer: int) -> Tensor:
    """int64 [number], as many things in a random order of their own for each layer."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed * 1_000_003 + layer))


def zero_columns(layer: int, queries: Positions, chosen: Tensor, heads: Tensor | None = None) -> WeightsEdit:
    """An edit after the softmax by which rows have no weight on some positions of the prompt but on themselves.

    Args:
        layer: 0-based.
        queries: the rows.
        chosen: bool [batch, position].
        heads: bool [batch, head], the heads that are edited; None for all.
    """
    hidden = hidden_columns(chosen, heads)

    def zero(weights: Tensor, rows: Tensor, columns: Tensor, calls: Calls) -> Tensor:
        return weights.masked_fill(hidden(rows, columns, calls), 0)

    return WeightsEdit(layer, zero, queries)


def hidden_columns(chosen: Tensor, heads: Tensor | None = None) -> Callable[[Tensor, Tensor, Calls], Tensor]:
    """(query positions [batch, query], key positions [key], calls) -> bool [batch, head or 1, query, key], the pairs of a query
    and another token that is chosen.

    Args:
        chosen: bool [batch, position].
        heads: bool [batch, head]; None for all.
    """

    def hide(rows: Tensor, columns: Tensor, calls: Calls) -> Tensor:
        pairs = at_columns(chosen, columns)[:, None, None] & (rows[:, None, :, None] != columns)
        return pairs if heads is None else pairs & heads.to(columns.device)[:, :, None, None]

    return hide
