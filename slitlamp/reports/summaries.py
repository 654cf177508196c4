"""Tidy tables that figures and sentences share, computed from the tables of a run."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from slitlamp.evaluation.statistics import Interval, cluster_bootstrap, ratio
from slitlamp.reports.draw import need
from slitlamp.reports.wording import Estimate

FloatArray = NDArray[np.float64]
MIN_MENTIONS = 20
"""Fewest mentions at an index for which a share is drawn."""


def _share(sums: FloatArray) -> FloatArray:
    """Share per group from `[..., 2 * group]`: hits of every group, then their totals."""
    half = sums.shape[-1] // 2
    return ratio(sums[..., :half], sums[..., half:])


def mention_index_shares(mentions: pd.DataFrame, min_mentions: int = MIN_MENTIONS) -> pd.DataFrame:
    """CHAIR_i of the first, second, ... mention of a caption, with intervals by image.

    Args:
        mentions: columns condition, image_id, index (1 is the first mention), hallucinated.
        min_mentions: an index with fewer mentions in a condition is left out of it.

    Returns:
        Columns condition, index, value, low, high, n (mentions).
    """
    need(mentions, "condition", "image_id", "index", "hallucinated")
    found: list[tuple[str, int, float, float, float, int]] = []
    for condition, group in mentions.groupby("condition", sort=False):
        sizes = group.groupby("index").size()
        kept = [int(index) for index in sizes.index[sizes >= min_mentions]]
        if not kept:
            continue
        intervals = cluster_bootstrap(_counts(group, kept), _share, seed=0)
        assert isinstance(intervals, list)
        found += [
            (str(condition), index, one.value, one.low, one.high, int(sizes[index]))
            for index, one in zip(kept, intervals, strict=True)
        ]
    return pd.DataFrame(found, columns=["condition", "index", "value", "low", "high", "n"])


def mention_index_trend(
    mentions: pd.DataFrame, condition: str, min_mentions: int = MIN_MENTIONS
) -> tuple[int, Estimate] | None:
    """The last index with enough mentions, and CHAIR_i there minus CHAIR_i at the first mention; None below two indices."""
    group = mentions[mentions["condition"].astype(str) == condition]
    sizes = group.groupby("index").size()
    kept = [int(index) for index in sizes.index[sizes >= min_mentions]]
    if len(kept) < 2:
        return None

    def rise(sums: FloatArray) -> FloatArray:
        shares = _share(sums)
        return shares[..., -1] - shares[..., 0]

    interval = cluster_bootstrap(_counts(group, [kept[0], kept[-1]]), rise, seed=0)
    assert isinstance(interval, Interval)
    return kept[-1], Estimate(interval.value, interval.low, interval.high)


def _counts(mentions: pd.DataFrame, indices: list[int]) -> FloatArray:
    """Per image: hallucinated mentions at every index, then all mentions at every index."""
    images = {image: row for row, image in enumerate(mentions["image_id"].unique())}
    counts = np.zeros((len(images), 2 * len(indices)))
    cells = mentions[mentions["index"].isin(indices)]
    row = cells["image_id"].map(images).to_numpy(dtype=np.int64)
    column = np.searchsorted(indices, cells["index"].to_numpy(dtype=np.int64))
    np.add.at(counts, (row, column), cells["hallucinated"].to_numpy(dtype=np.float64))
    np.add.at(counts, (row, column + len(indices)), 1.0)
    return counts


def t_vhd_column(tokens: pd.DataFrame, k: int | None = None) -> tuple[str, int]:
    """The column of T-VHD for the top `k` heads per layer, and k; without `k` the middle one of those measured."""
    known = sorted(
        int(name.removeprefix("t_vhd_")) for name in tokens.columns if str(name).removeprefix("t_vhd_").isdigit()
    )
    if not known:
        need(tokens, "t_vhd_1")
    chosen = k if k in known else known[len(known) // 2]
    return f"t_vhd_{chosen}", chosen


def picked(heads: pd.DataFrame) -> NDArray[np.bool_]:
    """Which heads reinforcement picks in at least half of the items, `[row]`.

    Without the column `selected`, those above the median of their layer.
    """
    if "selected" in heads.columns and heads["selected"].notna().all():
        return np.asarray(heads["selected"] >= 0.5, dtype=np.bool_)
    return np.asarray(heads["vhd"] > heads.groupby("layer")["vhd"].transform("median"), dtype=np.bool_)
