"""Choosing and reducing along one axis before anything is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from slitlamp.tracing.call import Selection
from slitlamp.tracing.sites import Reduction


def take(values: Tensor, selection: Selection, axis: int) -> Tensor:
    """The chosen positions along one axis, as a tensor of its own (never a view of the model's).

    Args:
        values: [row, ...].
        selection: the positions of each row.
        axis: the axis to choose along.

    Returns:
        `values` with `selection.count` along `axis`; 0 where a row has fewer.
    """
    values = values.detach()
    if selection.everything:
        return values.clone()
    index = selection.index.to(values.device)
    if selection.full and index.shape[0] == 1:
        return values.index_select(axis, index[0])
    # by whole slices: taking number by number (`take_along_dim`) is eight times slower
    of_row = torch.arange(index.shape[0], device=index.device)[:, None]
    chosen = values.movedim(axis, 1)[of_row, index]
    if not selection.full:
        absent = selection.valid.to(values.device).logical_not()
        chosen.masked_fill_(absent.view(*absent.shape, *[1] * (values.ndim - 2)), 0)
    return chosen.movedim(1, axis)


def reduce_axis(values: Tensor, valid: Tensor | None, axis: int, how: Reduction) -> Tensor:
    """Sum or mean over the valid entries of an axis, accumulated in float32 (float64 stays float64).

    Args:
        values: [row, ...], 0 where not valid.
        valid: bool [row, n] of the entries along `axis`; None where all are.
        axis: the axis, which disappears.
        how: "sum" or "mean"; a row without entries gives NaN.
    """
    wide = values.dtype if values.dtype == torch.float64 else torch.float32
    total = values.sum(dim=axis, dtype=wide)
    if valid is None:
        return total / values.shape[axis] if how == "mean" else total
    count = valid.sum(dim=1).to(device=values.device, dtype=wide).view(-1, *[1] * (total.ndim - 1))
    if how == "mean":
        return total / count  # 0 / 0 is NaN: nothing was there to be averaged
    return torch.where(count > 0, total, torch.nan)
