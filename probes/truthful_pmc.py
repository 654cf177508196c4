"""PMC: the least confident step of a sentence before an object is named (TruthPrInt, Table 7).

The paper finds higher values before hallucinated objects (.29 against .22), a replication lower ones (.247 against .2975). The
minimum of more steps is lower, and where in a sentence objects are hallucinated differs, so the number of preceding tokens is
controlled in two ways: by comparing mentions with equally many of them, and by regression.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from slitlamp.evaluation.statistics import Interval, cluster_bootstrap, ratio

FloatArray = NDArray[np.float64]
COLUMNS = ["quantity", "value", "low", "high", "p", "n_hallucinated", "n_true", "n_items"]
PAPER = "paper: .29 hallucinated, .22 true; replication: .247 and .2975"


def pmc_tables(mentions: pd.DataFrame, *, n_resamples: int = 2000, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Tables `pmc` (means, differences with and without control of length) and `pmc_by_length`.

    Args:
        mentions: columns group, hallucinated, pmc (NaN at the first token of a sentence), n_preceding, token.
        n_resamples, seed: of the bootstrap over groups.
    """
    kept = mentions[np.isfinite(mentions["pmc"].to_numpy(dtype=np.float64))]
    options: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    return {"pmc": _differences(kept, options), "pmc_by_length": _by_length(kept, options)}


def _differences(kept: pd.DataFrame, options: dict[str, Any]) -> pd.DataFrame:
    lengths, sums = _length_sums(kept)
    n_bad = int(kept["hallucinated"].sum())
    counts = (n_bad, len(kept) - n_bad, len(sums))
    found = []
    if len(sums):
        width = len(lengths)

        def means(total: FloatArray) -> FloatArray:
            parts = total.reshape(*total.shape[:-1], 4, width).sum(axis=-1)
            return np.stack([ratio(parts[..., 1], parts[..., 0]), ratio(parts[..., 3], parts[..., 2])], axis=-1)

        def difference(total: FloatArray) -> FloatArray:
            both = means(total)
            return np.asarray(both[..., 0] - both[..., 1])

        def matched(total: FloatArray) -> FloatArray:
            n1, s1, n0, s0 = np.moveaxis(total.reshape(*total.shape[:-1], 4, width), -2, 0)
            weight = np.where((n1 > 0) & (n0 > 0), n1, 0.0)
            step = np.nan_to_num(ratio(s1, n1) - ratio(s0, n0))
            return ratio((weight * step).sum(axis=-1), weight.sum(axis=-1))

        for name, statistic in (
            ("hallucinated minus true", difference),
            ("hallucinated minus true, equally many preceding tokens", matched),
        ):
            found.append((name, cluster_bootstrap(sums, statistic, p_value=True, **options)))
        bad, good = _list(cluster_bootstrap(sums, means, **options))
        found = [("mean before hallucinated objects", bad), ("mean before true objects", good), *found]
        found.append(
            (
                "hallucinated minus true, regression on preceding tokens and place in the text",
                cluster_bootstrap(_regression_sums(kept), _coefficient, p_value=True, **options),
            )
        )
    else:
        found = [("hallucinated minus true", Interval(np.nan, np.nan, np.nan, 0))]
    rows = [(name, *_values(_list(one)[0]), *counts) for name, one in found]
    return pd.DataFrame(rows, columns=COLUMNS)


def _list(found: Interval | list[Interval]) -> list[Interval]:
    return found if isinstance(found, list) else [found]


def _values(one: Interval) -> tuple[float, float, float, float]:
    return one.value, one.low, one.high, np.nan if one.p is None else one.p


def _length_sums(kept: pd.DataFrame) -> tuple[NDArray[np.int64], FloatArray]:
    """The numbers of preceding tokens, and [group, 4 * length]: mentions and sum of PMC, of hallucinated and of true ones."""
    lengths, column = np.unique(kept["n_preceding"].to_numpy(dtype=np.int64), return_inverse=True)
    groups, row = np.unique(kept["group"].to_numpy(dtype=str), return_inverse=True)
    sums = np.zeros((len(groups), 4, len(lengths)))
    bad, value = kept["hallucinated"].to_numpy(dtype=bool), kept["pmc"].to_numpy(dtype=np.float64)
    for place, side in ((0, bad), (2, ~bad)):
        np.add.at(sums[:, place], (row[side], column[side]), 1.0)
        np.add.at(sums[:, place + 1], (row[side], column[side]), value[side])
    return lengths, sums.reshape(len(groups), 4 * len(lengths))


def _regression_sums(kept: pd.DataFrame) -> FloatArray:
    """[group, 16 + 4]: X^T X and X^T y of y = PMC on 1, hallucinated, number of preceding tokens, place of the token."""
    groups, row = np.unique(kept["group"].to_numpy(dtype=str), return_inverse=True)
    x = np.column_stack(
        [
            np.ones(len(kept)),
            *(kept[one].to_numpy(dtype=np.float64) for one in ("hallucinated", "n_preceding", "token")),
        ]
    )
    y = kept["pmc"].to_numpy(dtype=np.float64)
    products = np.hstack([(x[:, :, None] * x[:, None, :]).reshape(len(x), -1), x * y[:, None]])
    sums = np.zeros((len(groups), products.shape[1]))
    np.add.at(sums, row, products)
    return sums


def _coefficient(total: FloatArray) -> FloatArray:
    """The coefficient of "hallucinated" from summed products; NaN where the regression has no single solution."""
    size = 4
    square = total[..., : size * size].reshape(*total.shape[:-1], size, size)
    right = total[..., size * size :]
    scale = np.sqrt(np.maximum(np.diagonal(square, axis1=-2, axis2=-1), np.finfo(np.float64).tiny))
    unit = square / (scale[..., :, None] * scale[..., None, :])
    fits = np.linalg.cond(unit) < 1e10
    safe = np.where(fits[..., None, None], unit, np.eye(size))
    solution = np.linalg.solve(safe, (right / scale)[..., None])[..., 0] / scale
    return np.where(fits, solution[..., 1], np.nan)


def _by_length(kept: pd.DataFrame, options: dict[str, Any]) -> pd.DataFrame:
    """Mean PMC by number of preceding tokens and kind."""
    rows = []
    for (length, bad), part in kept.groupby(["n_preceding", "hallucinated"]):
        sums = part.groupby("group")["pmc"].agg(["count", "sum"]).to_numpy(dtype=np.float64)
        mean = _list(cluster_bootstrap(sums, lambda total: ratio(total[..., 1], total[..., 0]), **options))[0]
        rows.append(
            (length, "hallucinated" if bad else "object", mean.value, mean.low, mean.high, len(part), len(sums))
        )
    if not rows:
        rows = [(0, "object", np.nan, np.nan, np.nan, 0, 0)]
    return pd.DataFrame(rows, columns=["n_preceding", "label", "mean", "low", "high", "n_mentions", "n_items"])
