"""Similarities in the raw space, without its massive dimensions, and with every dimension standardised.

A few dimensions of enormous size make all cosines of a layer alike, whatever the tokens are; none of the three versions
is right by itself, so all three are reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slitlamp.tracing.probe import Array

Variant = Literal["raw", "removed", "standardised"]
VARIANTS: Final[tuple[Variant, ...]] = ("raw", "removed", "standardised")
Standardise = Literal["joint", "scale", "modality"]

MASSIVE_VALUE: Final = 100.0
MASSIVE_RATIO: Final = 1000.0


def massive(values: Tensor) -> Tensor:
    """Massive activations: |value| > 100 and at least 1000 times the median of its hidden state. [..., d] to bool [..., d].

    Sun et al. (2024, arXiv 2402.17762), section 2.
    """
    size = values.abs()
    large = size > MASSIVE_VALUE
    if not bool(large.any()):
        return large
    return large & (size >= MASSIVE_RATIO * size.median(dim=-1, keepdim=True).values)


@dataclass(frozen=True)
class Space:
    """The dimensions of one place in every layer.

    Attributes:
        mean, sd: float64 [modality, layer, d], what values of each modality are standardised with.
        removed: bool [layer, d], the massive dimensions.
        power: float64 [layer, d], mean square of each dimension, image and text weighing the same.
    """

    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    removed: NDArray[np.bool_]
    power: NDArray[np.float64]

    @staticmethod
    def of(moments: Array, counts: Array, n_items: int, top: int | None, standardise: Standardise) -> Space:
        """From sums over items.

        Args:
            moments: [2, modality, layer, d]: the sums of the tokens' means and mean squares of each item.
            counts: [layer, d]: how many tokens had a massive activation there.
            n_items: how many items were summed.
            top: how many dimensions of each layer to remove, those of the largest mean square; None for those in which any
                token had a massive activation.
            standardise: "joint" takes off the mean of image and text together (each weighing half) and divides by the
                standard deviation about it; "scale" only divides; "modality" gives each modality its own mean and deviation.
        """
        mean, square = moments / n_items
        power = square.mean(axis=0)
        if top is None:
            removed = counts > 0
        else:
            removed = np.zeros(counts.shape, dtype=bool)
            largest = np.argsort(-power, axis=1, kind="stable")[:, :top]
            np.put_along_axis(removed, largest, True, axis=1)
        if standardise != "modality":
            mean, square = (np.broadcast_to(one.mean(axis=0), one.shape) for one in (mean, square))
        sd = np.sqrt(np.maximum(square - mean**2, 0.0))
        sd = np.where(sd == 0, 1.0, sd)
        return Space(np.zeros_like(mean) if standardise == "scale" else mean, sd, removed, power)

    def apply(self, values: Array, modality: int, layer: int, variant: Variant, other: int | None = None) -> Array:
        """Values [..., d] of a modality and a layer in one of the spaces, in float64.

        Args:
            values: the states.
            modality, layer: which they are.
            variant: the space.
            other: the layer of what they will be compared with, where it is another: its massive dimensions go too.
        """
        wide = values.astype(np.float64)
        if variant == "raw":
            return wide
        if variant == "removed":
            gone = self.removed[layer] | self.removed[layer if other is None else other]
            return np.where(gone, 0.0, wide)
        result: NDArray[np.float64] = (wide - self.mean[modality, layer]) / self.sd[modality, layer]
        return result


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over positions in float32: [batch, position, ...] and bool [batch, position] to [batch, ...]; NaN where none."""
    shaped = mask.view(*mask.shape, *[1] * (values.dim() - 2))
    total = torch.where(shaped, values.float(), 0.0).sum(dim=1)
    return total / mask.sum(dim=1).view(-1, *[1] * (values.dim() - 2))
