"""Edits that probes and interventions share: of heads, image tokens, directions in the residual stream, and blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slitlamp.tracing.attention_edit import AttentionEdit
from slitlamp.tracing.call import Calls
from slitlamp.tracing.session import Edit
from slitlamp.tracing.sites import Positions

Heads = Sequence[tuple[int, int]]
"""(layer, head) pairs, 0-based."""


def _by_layer(heads: Heads) -> dict[int, list[int]]:
    layers: dict[int, list[int]] = {}
    for layer, head in heads:
        layers.setdefault(int(layer), []).append(int(head))
    return layers


def scale_heads(heads: Heads, factor: float = 0.0) -> list[Edit]:
    """Multiply the outputs of heads, before the output projection, at every position; 0 ablates them."""

    def edit(layer: int, chosen: list[int]) -> Edit:
        def scale(values: Tensor, calls: Calls) -> Tensor:
            factors = torch.ones(values.shape[2], dtype=values.dtype, device=values.device)
            factors[chosen] = factor
            return values * factors[:, None]

        return Edit("z", layer, scale)

    return [edit(layer, chosen) for layer, chosen in sorted(_by_layer(heads).items())]


def set_heads(heads: Heads, means: Tensor) -> list[Edit]:
    """Replace the outputs of heads by a constant (mean ablation) at every position.

    Args:
        heads: which.
        means: [layer, head, d_head], of all layers and heads.
    """

    def edit(layer: int, chosen: list[int]) -> Edit:
        def put(values: Tensor, calls: Calls) -> Tensor:
            changed = values.clone()
            changed[:, :, chosen] = means[layer, chosen].to(values)
            return changed

        return Edit("z", layer, put)

    return [edit(layer, chosen) for layer, chosen in sorted(_by_layer(heads).items())]


def replace_tokens(chosen: Tensor, value: Tensor | float = 0.0) -> list[Edit]:
    """Replace the inputs of the language model at chosen positions of the prompt.

    Args:
        chosen: bool [batch, position].
        value: a number, or [d_model], or [batch, position, d_model].
    """

    def replace(values: Tensor, calls: Calls) -> Tensor:
        new = torch.as_tensor(value, dtype=values.dtype, device=values.device)
        return torch.where(chosen.to(values.device)[..., None], new, values)

    return [Edit("resid_pre", 0, replace, prefill_only=True)]


def add_direction(layer: int, direction: Tensor, scale: float, *, relative: bool = True) -> list[Edit]:
    """Add a direction to the residual stream after a block, at every position.

    Args:
        layer: the block.
        direction: [d_model]; its length does not matter.
        scale: how much; with `relative`, in units of the norm of each position's residual stream.
        relative: whether to scale so.
    """
    unit = direction / direction.norm()

    def add(values: Tensor, calls: Calls) -> Tensor:
        step = scale * unit.to(values)
        if not relative:
            return values + step
        return values + values.float().norm(dim=-1, keepdim=True).to(values.dtype) * step

    return [Edit("resid_post", layer, add)]


def remove_direction(layers: Sequence[int], direction: Tensor, strength: float = 1.0) -> list[Edit]:
    """Take a direction [d_model] out of the residual stream after some blocks, at every position (projection ablation).

    Args:
        layers: after which blocks.
        direction: [d_model]; its length does not matter.
        strength: how much of the component is taken out; 1 for all of it.
    """
    unit = direction / direction.norm()

    def remove(values: Tensor, calls: Calls) -> Tensor:
        along = unit.to(values)
        return values - strength * (values @ along)[..., None] * along

    return [Edit("resid_post", layer, remove) for layer in layers]


def skip_block(layer: int) -> list[Edit]:
    """Let the residual stream pass a block unchanged."""
    before: list[Tensor] = []

    def keep(values: Tensor, calls: Calls) -> Tensor:
        before[:] = [values]
        return values

    def put_back(values: Tensor, calls: Calls) -> Tensor:
        return before.pop().to(values.device)

    return [Edit("resid_pre", layer, keep), Edit("resid_post", layer, put_back)]


def knock_out(layers: Sequence[int], queries: Positions, keys: Positions) -> list[AttentionEdit]:
    """Cut the attention of some positions to others, in all heads: score(q, k) = -inf (attention knockout, Geva et al.,
    EMNLP 2023, Sec. 4; Zhang et al., CVPR 2025, "Cross-modal Information Flow").

    Every position keeps its attention to itself, so that no row is left without a key.

    Args:
        layers: where it is cut.
        queries: the positions that may not look: a name of positions, or bool [batch, position].
        keys: the positions that they may not look at. Tokens that are generated are among positions given by a name as
            they come, and never among those of a mask.
    """

    def cut(rows: Tensor, columns: Tensor, calls: Calls) -> Tensor:
        selection = calls.select_keys(keys)
        length = calls.batch.length + max(calls.number, 0)
        hidden = torch.zeros(calls.batch.size, length, dtype=torch.bool, device=columns.device)
        if selection is not None:
            row, slot = selection.valid.nonzero(as_tuple=True)
            hidden[row.to(hidden.device), selection.index[row, slot].to(hidden.device)] = True
        return hidden[:, None, None, columns] & (rows[:, None, :, None] != columns)

    return [AttentionEdit(layer, cut, queries) for layer in layers]
