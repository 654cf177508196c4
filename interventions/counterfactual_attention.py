"""Attention weights that say nothing of what the model looks at, in the place of its own (CausalMM's counterfactuals)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from slitlamp.models import Anatomy
from slitlamp.tracing import Calls, WeightsEdit
from slitlamp.tracing.weights_edit import Tower

Kind = Literal["random", "uniform", "reversed", "shuffled"]
KINDS: tuple[str, ...] = get_args(Kind)
_MASK = 2**32 - 1


def counterfactual_edits(
    anatomy: Anatomy, tower: Tower, layers: Sequence[int], kind: Kind, seed: int, *, normalise: bool
) -> list[WeightsEdit]:
    """Edits by which every position of some layers attends by `counterfactual` weights, in all heads, at prefill and in every
    decode step.

    Draws are by layer, head, and the places of query and key in their own item (or tile), counted from its first token: they do
    not depend on what else is in the batch, nor on how many tokens come later; all items get the same.

    Args:
        anatomy: of the model.
        tower: "language" or "vision".
        layers: 0-based, of the tower.
        kind, normalise: see `counterfactual`.
        seed: of the draws.
    """

    def edit(layer: int) -> WeightsEdit:
        causal = tower == "language" and anatomy.attention_types[layer] == "full_attention"

        def change(weights: Tensor, rows: Tensor, columns: Tensor, calls: Calls) -> Tensor:
            seen = (weights > 0).any(dim=1, keepdim=True)
            start = torch.zeros(weights.shape[0], 1, dtype=torch.int64, device=weights.device)
            if tower == "language":
                first = calls.batch.length - torch.tensor(calls.batch.lengths, device=weights.device)
                start = first[:, None]
            if causal:  # also keys whose weight is too small to be told from 0
                there = (columns >= start)[:, None, None, :]
                seen = seen | (there & (columns <= rows[:, None, :, None]))
            drawn = None
            if kind in ("random", "shuffled"):
                base = _mix(_mix(_mix(seed & _MASK) + (tower == "vision")) + layer)
                drawn = draws(base, weights.shape[1], rows - start, columns - start)
            return counterfactual(weights, seen, kind, drawn, normalise=normalise)

        return WeightsEdit(layer, change, "all", tower)

    return [edit(layer) for layer in layers]


def counterfactual(weights: Tensor, seen: Tensor, kind: Kind, drawn: Tensor | None, *, normalise: bool) -> Tensor:
    """Other weights for the same rows, each from its row alone.

    "random": even draws from [0, 2); "uniform": 1 / n for n keys; "reversed": the row's largest weight minus each; "shuffled":
    the row's weights in a random order. Keys that are not seen keep weight 0.

    Args:
        weights: [batch, head, query, key], after the softmax.
        seen: bool [batch, 1, query, key], the keys that a query can attend to.
        kind: one of `KINDS`.
        drawn: for "random" and "shuffled", int64 [batch, head, query, key] from `draws`.
        normalise: whether rows are made to add up to 1, which those of "random" and "reversed" do not. A row whose weights are
            all alike, whose reverse is 0, is then uniform.
    """
    precise = torch.promote_types(weights.dtype, torch.float32)
    n_seen = seen.sum(dim=-1, keepdim=True).clamp(min=1)
    even = (seen.to(precise) / n_seen).expand(weights.shape)
    if kind == "uniform":
        return even.to(weights)
    if kind == "shuffled":
        assert drawn is not None
        return _shuffled(weights, seen, drawn)
    if kind == "random":
        assert drawn is not None
        found = 2 * drawn.to(precise) / (_MASK + 1)
    else:
        found = weights.amax(dim=-1, keepdim=True).to(precise) - weights
    found = found.masked_fill(~seen, 0)
    if normalise:
        total = found.sum(dim=-1, keepdim=True)
        found = torch.where(total > 0, found / total, even)
    return found.to(weights)


def _shuffled(weights: Tensor, seen: Tensor, drawn: Tensor) -> Tensor:
    """The weights of the keys that are seen, in the order of their draws; the others, which are 0, stay behind."""
    order = drawn.masked_fill(~seen, _MASK + 1).argsort(dim=-1, stable=True)
    places = (~seen).to(torch.uint8).argsort(dim=-1, stable=True).expand(weights.shape)
    return torch.zeros_like(weights).scatter(-1, places, weights.gather(-1, order))


def draws(base: int, n_heads: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Numbers from 0 to 2^32 - 1, each made from its head, query and key alone: int64 [batch, head, query, key].

    Args:
        base: of the seed and the layer.
        n_heads: how many heads.
        rows: int64 [batch, query], places of queries.
        columns: int64 [batch, key], places of keys.
    """
    head = _mixed(base + torch.arange(n_heads, device=rows.device))
    query = _mixed(head[None, :, None] + rows[:, None, :])
    return _mixed(query[..., None] + columns[:, None, None, :])


def _mix(value: int) -> int:
    return int(_mixed(torch.tensor(value)))


def _mixed(values: Tensor) -> Tensor:
    """A hash of integers to 32 bits; products stay below 2^63."""
    values = values & _MASK
    for _ in range(2):
        values = ((values ^ (values >> 16)) * 0x45D9F3B) & _MASK
    return values ^ (values >> 16)
