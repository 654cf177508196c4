"""Ranking the signals of the token ledger as detectors of hallucinated objects; how redundant they are; how rankings agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from probes.ledger_signals import Signal
from slitlamp.evaluation.detection import adjusted_auroc, auroc_difference
from slitlamp.evaluation.operating_points import detection_table
from slitlamp.evaluation.statistics import Interval, benjamini_hochberg, cluster_bootstrap, correlation_interval, ratio

FALSE: Final = ("hallucinated", "wrong")
TRUE: Final = ("object", "correct")
CHANCE: Final = 0.5
FALSE_DISCOVERIES: Final = 0.05
"""The share of false ones that is accepted among the signals called detectors."""
TO_BEST: Final = ("to_best", "to_best_low", "to_best_high")
COVARIATES: Final = ("position", "frequency")
"""Signals that the partial AUROC holds fixed."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Detection:
    """How detectors are measured: all intervals are over images.

    Attributes:
        fpr: the false positive rate at which the true positive rate is given.
        n_resamples, seed: of the bootstrap.
    """

    fpr: float
    n_resamples: int
    seed: int

    def measured(self, score: FloatArray, false: NDArray[np.bool_], groups: NDArray[Any]) -> dict[str, float]:
        """AUROC, AUPRC and the true positive rate of a score that is higher for hallucinated; NaN where a class is empty."""
        metrics = {"auroc": "", "auprc": "auprc_", "tpr": "tpr_"}
        if not false.any() or false.all():
            nothing = [[name, f"{prefix}low", f"{prefix}high"] for name, prefix in metrics.items()]
            return {**{one: float("nan") for names in nothing for one in names}, "fpr": self.fpr}
        table = detection_table(
            score, false, groups, fprs=(self.fpr,), n_resamples=self.n_resamples, seed=self.seed
        ).set_index("metric")
        row: dict[str, float] = {}
        for name, prefix in metrics.items():
            one = table.loc[name]
            row |= {name: float(one["value"]), f"{prefix}low": float(one["low"]), f"{prefix}high": float(one["high"])}
        return {**row, "fpr": self.fpr}

    def difference(
        self, reference: FloatArray, score: FloatArray, false: NDArray[np.bool_], groups: NDArray[Any]
    ) -> dict[str, float | None]:
        """AUROC of a score minus that of a reference on the same tokens, with its p value."""
        found = auroc_difference(reference, score, false, groups, n_resamples=self.n_resamples, seed=self.seed)
        return {"difference": found.value, "difference_low": found.low, "difference_high": found.high, "p": found.p}

    def beyond(
        self, score: FloatArray, false: NDArray[np.bool_], groups: NDArray[Any], covariates: FloatArray
    ) -> dict[str, float]:
        """AUROC of a score at equal covariates [token, covariate] (Janes and Pepe 2009): columns partial, with low and high."""
        found = adjusted_auroc(score, false, covariates, groups, n_resamples=self.n_resamples, seed=self.seed)
        return {"partial": found.value, "partial_low": found.low, "partial_high": found.high}


def covariates_of(ledger: pd.DataFrame) -> FloatArray:
    """Position in the caption, its square (signals need not change evenly along a caption), and the object's frequency where
    it is known for every token: [token, covariate].
    """
    position = ledger["token"].to_numpy(dtype=np.float64)
    centred = position - position.mean()
    columns = [centred, centred**2]
    frequency = ledger["frequency"].to_numpy(dtype=np.float64)
    return np.stack([*columns, frequency] if np.isfinite(frequency).all() else columns, axis=1)


def ranking_table(ledger: pd.DataFrame, signals: Sequence[Signal], detection: Detection) -> pd.DataFrame:
    """One row per signal, the best first by its AUROC in the direction that was declared for it.

    Columns: signal, title, family, sign; auroc, auprc, and tpr at fpr, each with low and high; partial, the AUROC at equal
    position and object frequency, with its interval (NaN for these two themselves); p, two-sided against chance, and q, by
    Benjamini and Hochberg over the signals; agrees: "yes" or "no", whether the data agree with the declared direction, where
    q < .05, "open" where it is not, "" for a signal without a direction; to_best, the AUROC minus the best signal's on the
    same tokens, paired, with low and high (the best is chosen on these tokens, in its favour; NaN for itself, for the random
    number, and where the signals are not known for the same tokens); chance of the AUROC; n_tokens, n_hallucinated, n_images.
    """
    rows = []
    scores: dict[str, FloatArray] = {}
    everything = covariates_of(ledger)
    for signal in signals:
        values = ledger[signal.name].to_numpy(dtype=np.float64)
        known = np.isfinite(values)
        if not known.any():
            continue
        false = ledger["label"].isin(FALSE).to_numpy()[known]
        groups = ledger["image"].to_numpy(dtype=str)[known]
        score = (signal.sign or 1) * values[known]
        scores[signal.name] = (signal.sign or 1) * values
        row: dict[str, Any] = {
            "signal": signal.name,
            "title": signal.title,
            "family": signal.family,
            "sign": signal.sign,
        }
        row |= detection.measured(score, false, groups)
        # against a score that is the same for all tokens, whose AUROC is .5 in every resample
        row["p"] = detection.difference(np.zeros(len(score)), score, false, groups)["p"]
        row |= dict.fromkeys(("partial", "partial_low", "partial_high"), float("nan"))
        if signal.name not in COVARIATES:
            row |= detection.beyond(score, false, groups, everything[known])
        counts = {"n_tokens": len(false), "n_hallucinated": int(false.sum()), "n_images": len(np.unique(groups))}
        rows.append({**row, "chance": CHANCE, **counts})
    table = pd.DataFrame(rows)
    tested = (table["family"] != "null") & table["p"].notna()
    q = np.full(len(table), np.nan)
    if tested.any():
        q[tested] = benjamini_hochberg(table.loc[tested, "p"])
    table.insert(table.columns.get_loc("p") + 1, "q", q)
    table.insert(table.columns.get_loc("q") + 1, "agrees", [_agreement(row) for row in table.to_dict("records")])
    table = table.sort_values("auroc", ascending=False, kind="stable", ignore_index=True)
    behind = [_behind(row, table, scores, ledger, detection) for row in table.to_dict("records")]
    for place, column in enumerate(TO_BEST):
        table.insert(table.columns.get_loc("agrees") + 1 + place, column, [one[place] for one in behind])
    return table


def _behind(
    row: dict[str, Any],
    table: pd.DataFrame,
    scores: dict[str, FloatArray],
    ledger: pd.DataFrame,
    detection: Detection,
) -> tuple[float | None, ...]:
    """AUROC of a signal minus that of the first of the ranking, with its interval: `TO_BEST`."""
    real = table[(table["family"] != "null") & table["auroc"].notna()]
    nothing = (np.nan,) * len(TO_BEST)
    if row["family"] == "null" or real.empty or row["signal"] == real["signal"].iloc[0]:
        return nothing
    best, mine = scores[real["signal"].iloc[0]], scores[row["signal"]]
    known = np.isfinite(mine)
    if (known != np.isfinite(best)).any():
        return nothing
    false, groups = ledger["label"].isin(FALSE).to_numpy()[known], ledger["image"].to_numpy(dtype=str)[known]
    found = detection.difference(best[known], mine[known], false, groups)
    return found["difference"], found["difference_low"], found["difference_high"]


def _agreement(row: dict[str, Any]) -> str:
    if not row["sign"]:
        return ""
    return "open" if not row["q"] < FALSE_DISCOVERIES else "yes" if row["auroc"] > CHANCE else "no"


def redundancy_table(ledger: pd.DataFrame, signals: Sequence[Signal], *, n_resamples: int, seed: int) -> pd.DataFrame:
    """Spearman correlations of all pairs of signals over the object tokens, bootstrapped over images.

    Ranks are taken once, over all tokens; a resample correlates the ranks of the images that were drawn. Signals keep their
    own sign. Columns: signal_a, title_a, signal_b, title_b, spearman, low, high, n_tokens, n_images, chance (0). Signals
    that are not known for every token, or do not vary, are left out.
    """
    kept = [one for one in signals if usable(ledger, one.name)]
    pairs = list(combinations(range(len(kept)), 2))
    if not pairs:
        return pd.DataFrame()
    ranks = np.stack([rankdata(ledger[one.name]) for one in kept], axis=1)
    ranks = (ranks - ranks.mean(axis=0)) / ranks.std(axis=0)  # the scale does not matter, and sums stay small
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    moments = np.hstack([np.ones((len(ranks), 1)), ranks, ranks**2, ranks[:, first] * ranks[:, second]])
    names, image = np.unique(ledger["image"].to_numpy(dtype=str), return_inverse=True)
    sums = np.zeros((len(names), moments.shape[1]))
    np.add.at(sums, image, moments)
    width = len(kept)

    def correlation(total: FloatArray) -> FloatArray:
        mean = ratio(total[..., 1:], total[..., :1])
        one, square, product = mean[..., :width], mean[..., width : 2 * width], mean[..., 2 * width :]
        variance = np.maximum(square - one**2, 0)
        covariance = product - one[..., first] * one[..., second]
        return ratio(covariance, np.sqrt(variance[..., first] * variance[..., second]))

    found = cluster_bootstrap(sums, correlation, n_resamples=n_resamples, seed=seed)
    intervals = found if isinstance(found, list) else [found]
    return pd.DataFrame(
        {
            "signal_a": [kept[one].name for one in first],
            "title_a": [kept[one].title for one in first],
            "signal_b": [kept[one].name for one in second],
            "title_b": [kept[one].title for one in second],
            "spearman": [one.value for one in intervals],
            "low": [one.low for one in intervals],
            "high": [one.high for one in intervals],
            "n_tokens": len(ledger),
            "n_images": len(names),
            "chance": 0.0,
        }
    )


def usable(ledger: pd.DataFrame, name: str) -> bool:
    """Whether a signal is known for every token and varies."""
    values = ledger[name].to_numpy(dtype=np.float64)
    return bool(np.isfinite(values).all() and np.ptp(values) > 0)


def agreement_table(rankings: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """How far the rankings of two parts agree: Spearman correlation of the signals' AUROC, for every pair of parts.

    The interval is over signals, which are the units here (and are not independent of each other: see the redundancy);
    rankings that have nothing in common correlate by 0. The random number is left out.

    Args:
        rankings: ranking tables with columns model, condition and dataset in front.
    """
    rows = []
    for one, other in combinations(rankings, 2):
        both = [table[table["family"] != "null"].dropna(subset="auroc").set_index("signal") for table in (one, other)]
        shared = [name for name in both[0].index if name in both[1].index]
        found = _correlation(*(table.loc[shared, "auroc"].to_numpy(dtype=np.float64) for table in both))
        names = {
            f"{column}_{side}": table[column].iloc[0]
            for side, table in (("a", one), ("b", other))
            for column in ("model", "condition", "dataset")
        }
        rows.append(
            {**names, "spearman": found.value, "low": found.low, "high": found.high, "p": found.p}
            | {"n_signals": len(shared), "chance": 0.0}
        )
    return pd.DataFrame(rows)


def _correlation(one: FloatArray, other: FloatArray) -> Interval:
    if len(one) < 2:
        return Interval(np.nan, np.nan, np.nan, len(one))
    return correlation_interval(one, other)
