"""Attention rollout and attention flow (Abnar and Zuidema, ACL 2020, arXiv 2005.00928), and shares inside of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor

from probes.outlier_places import Box

FloatArray = NDArray[np.float64]

CAPACITY = 10**6
"""What a capacity of 1 becomes: scipy's maximum flow takes whole numbers."""


def with_residual(attention: Tensor) -> Tensor:
    """(A + I) / 2 with rows that sum to 1: attention [..., query, key], its residual connection added.

    A row without any attention keeps its own position alone.
    """
    whole = attention.float() + torch.eye(attention.shape[-1], device=attention.device)
    return whole / whole.sum(dim=-1, keepdim=True)


def rollout(attention: Tensor, starts: Sequence[int]) -> Tensor:
    """Attention rollout from some positions, after every number of layers.

    Args:
        attention: [layer, query, key], mean over heads, rows that sum to 1.
        starts: the positions that it is followed from.

    Returns:
        [layer, start, key]: entry l is row `start` of A'_l ... A'_1 A'_0 with A' = `with_residual`; the last entry is the
        rollout of the whole model. Rows sum to 1.
    """
    steps = with_residual(attention)
    whole = steps[0]
    found = [whole[list(starts)]]
    for step in steps[1:]:
        whole = step @ whole
        found.append(whole[list(starts)])
    return torch.stack(found)


def uniform_causal(n_layers: int, n_positions: int) -> Tensor:
    """[layer, query, key]: every position attends equally to itself and to all before it. Its rollout is a control."""
    lower = torch.ones(n_positions, n_positions).tril()
    return (lower / lower.sum(dim=-1, keepdim=True)).expand(n_layers, -1, -1)


def attention_flow(attention: FloatArray, start: int, sinks: Sequence[int]) -> FloatArray:
    """The largest flow from a position after the last layer to each of some positions before the first.

    The graph has a node per position before the first layer and after every layer; from a position after layer l edges
    lead to the positions before it, with the capacities of `with_residual` (rounded to 1 / `CAPACITY`).

    Args:
        attention: [layer, query, key], mean over heads.
        start: the position that the flow comes from.
        sinks: the positions that it goes to, one at a time.

    Returns:
        [sink], between 0 and 1: no more than 1 leaves the start.
    """
    steps = with_residual(torch.as_tensor(attention)).numpy()
    n_layers, n_positions, _ = steps.shape
    capacity = np.rint(steps * CAPACITY).astype(np.int32)
    reached = np.zeros(n_positions, dtype=bool)
    reached[start] = True
    rows, columns, values = [], [], []
    for layer in range(n_layers - 1, -1, -1):  # edges that nothing from the start can reach are left out
        query, key = np.nonzero((capacity[layer] > 0) & reached[:, None])
        rows.append((layer + 1) * n_positions + query)
        columns.append(layer * n_positions + key)
        values.append(capacity[layer][query, key])
        reached = np.zeros_like(reached)
        reached[key] = True
    size = (n_layers + 1) * n_positions
    graph = coo_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(size, size)
    ).tocsr()
    source = n_layers * n_positions + start
    return np.array([maximum_flow(graph, source, int(sink)).flow_value for sink in sinks]) / CAPACITY


def turned(boxes: Sequence[Sequence[float]]) -> list[Box]:
    """The boxes turned by 180 degrees about the middle of the image: as large, elsewhere. A control."""
    return [(1 - right, 1 - bottom, 1 - left, 1 - top) for left, top, right, bottom in boxes]


def inside_share(weights: NDArray[Any], covered: FloatArray) -> FloatArray:
    """The share of weights [..., patch] that falls on what is covered [patch]; NaN where there is no weight."""
    total = np.asarray(weights, dtype=np.float64).sum(axis=-1)
    inside = np.asarray(weights, dtype=np.float64) @ covered
    return np.divide(inside, total, out=np.full(np.shape(total), np.nan), where=total > 0)
