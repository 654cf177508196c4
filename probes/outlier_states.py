"""What is looked at in the residual stream of one image: norms, massive activations and attention sinks per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probes.outlier_definitions import massive_activations, norm_histogram, norm_outliers, sink_score
from slitlamp.tracing.probe import Array
from slitlamp.tracing.trace import SiteRecord


@dataclass(frozen=True, eq=False)
class StreamStatistics:
    """Of one item and all layers of a tower or a decoder.

    Attributes:
        rows: arrays [1, layer] of this item.
        sums: arrays to be added up over items.
        norms: float64 [layer, image token], L2.
        massive: bool [layer, d], the dimensions that are massive at some position.
    """

    rows: dict[str, Array]
    sums: dict[str, Array]
    norms: Tensor
    massive: Tensor


def stream_statistics(
    states: Tensor, kinds: Sequence[str], image: Tensor, value: float, times: float, n_sd: float
) -> StreamStatistics:
    """Norms of the image tokens, and the largest values at all positions.

    Args:
        states: [layer, position, d], of the real positions of one item.
        kinds: per position, what it is: "CLS", "patch", "start", "image", "text".
        image: bool [position], the positions whose norms count.
        value, times: the limits of massive activations.
        n_sd: of the norm rule.
    """
    norms = states[:, image.to(states.device)].double().norm(dim=-1)
    found = [massive_activations(one, value, times) for one in states]
    massive = torch.stack([one.dimensions for one in found])
    numbers: dict[str, Sequence[Any]] = {
        "largest": [one.largest for one in found],
        "median_size": [one.median for one in found],
        "dimension": [one.dimension for one in found],
        "kind": [kinds[one.position] for one in found],
        "n_massive": massive.sum(dim=1).tolist(),
        "norm_median": norms.median(dim=1).values.tolist(),
        "norm_ratio": (norms.amax(dim=1) / norms.median(dim=1).values).tolist(),
        "norm_above": norm_outliers(norms, n_sd).double().mean(dim=1).tolist(),
    }
    sums = {"histogram": norm_histogram(norms), "massive": massive.double().cpu().numpy()}
    return StreamStatistics({name: np.array([one]) for name, one in numbers.items()}, sums, norms.cpu(), massive.cpu())


def sink_scores(states: Tensor, massive: Tensor, dimensions: Sequence[int] | None) -> Tensor:
    """phi(x) of the image tokens in every layer: float64 [layer, token]; NaN where there is no sink dimension.

    Args:
        states: [layer, token, d_model].
        massive: bool [layer, d_model], from `stream_statistics`.
        dimensions: the sink dimensions; None for those with a massive activation in any layer.
    """
    chosen = massive.any(dim=0).nonzero()[:, 0] if dimensions is None else torch.tensor(list(dimensions))
    if not len(chosen):
        return torch.full(states.shape[:2], torch.nan, dtype=torch.float64)
    return sink_score(states, chosen).double().cpu()


def of_row(record: SiteRecord, row: int) -> Tensor:
    """One row of all layers of a recording: [layer, ...], on the device of the first layer."""
    layers = [record[layer][row] for layer in record.layers]
    return torch.stack([one.to(layers[0].device) for one in layers])
