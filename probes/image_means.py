"""Means over items with intervals that resample whole images, since items that share an image are not independent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from slitlamp.evaluation.statistics import FloatArray, Interval, cluster_means, cluster_sums
from slitlamp.tracing.probe import Array


@dataclass(frozen=True, eq=False)
class Images:
    """Which items share an image, and how images are resampled.

    Attributes:
        group: [item], the image of each (`Batch.groups`).
        n_resamples, seed: of the bootstrap.
    """

    group: Array
    n_resamples: int
    seed: int

    def only(self, kept: Array) -> Images:
        """Some of the items: bool [item]."""
        return Images(self.group[kept], self.n_resamples, self.seed)

    def sums(self, values: FloatArray) -> FloatArray:
        """Values [item, ...] added up over the items of each image: [image, ...]."""
        return cluster_sums(values, self.group)

    def means(self, values: ArrayLike, *, p_value: bool = False) -> list[Interval]:
        """The mean over items of each column of [item, k] with its interval; NaN entries are left out.

        A column without a value gives NaN.
        """
        return cluster_means(values, self.group, n_resamples=self.n_resamples, seed=self.seed, p_value=p_value)

    def table(self, values: ArrayLike, name: str = "mean") -> pd.DataFrame:
        """The same, one row per column: `name`, low, high, n_items."""
        found = self.means(values)
        return pd.DataFrame(
            {
                name: [one.value for one in found],
                "low": [one.low for one in found],
                "high": [one.high for one in found],
                "n_items": np.isfinite(np.asarray(values, dtype=np.float64)).sum(axis=0),
            }
        )
