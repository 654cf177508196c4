"""The tables of `TruthfulDirection`: how well each layer detects hallucinations, beside controls and baselines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probes.linear_fits import cross_validated
from probes.truthful_fits import LayerFits
from slitlamp.evaluation.detection import auroc_interval
from slitlamp.evaluation.statistics import Interval, cluster_bootstrap, ratio

FloatArray = NDArray[np.float64]
BASELINES = {"-log p": "neg_log_p", "mention index": "mention", "object frequency": "frequency"}
"""By name, the column that is a score of hallucination as it stands: less likely tokens, later mentions, commoner objects."""
TOGETHER = "these together"
MISSING = Interval(float("nan"), float("nan"), float("nan"), 0)


def detection_tables(
    mentions: pd.DataFrame,
    fitted: dict[str, LayerFits],
    methods: list[str],
    layers: list[int],
    target_fpr: float,
    options: dict[str, Any],
) -> dict[str, pd.DataFrame]:
    """Tables `layers`, `baselines`, `threshold`, `chosen_layers` and `mentions`.

    Args:
        mentions: the samples (`truthful_gather.COLUMNS`).
        fitted: by method; empty where nothing could be trained, and all estimates are NaN then.
        methods, layers: what was asked for.
        target_fpr: of the threshold.
        options: n_resamples and seed of the bootstrap.
    """
    label = mentions["hallucinated"].to_numpy(dtype=bool)
    group = mentions["group"].to_numpy(dtype=str)
    baselines = baseline_scores(mentions, fitted, options["seed"])
    counts = {"n_hallucinated": int(label.sum()), "n_true": int((~label).sum()), "n_items": len(np.unique(group))}

    def area(scores: FloatArray) -> Interval:
        return auroc_interval(scores, label, group, **options) if len(label) else MISSING

    return {
        "layers": _layers(fitted, methods, layers, area, counts),
        "baselines": _baselines(fitted, baselines, area, counts),
        "threshold": _threshold(fitted, methods, label, group, target_fpr, options, counts),
        "chosen_layers": _chosen_layers(fitted, methods),
        "mentions": _mentions(mentions, fitted, baselines),
    }


def baseline_scores(mentions: pd.DataFrame, fitted: dict[str, LayerFits], seed: int) -> dict[str, FloatArray]:
    """What detects hallucinations without the hidden states, by name: scores [sample]; those unknown for a sample are left out.

    "these together" is a cross-validated logistic regression on all of them, over the folds of the probes.
    """
    found = {}
    for name, column in BASELINES.items():
        values = mentions[column].to_numpy(dtype=np.float64)
        if len(values) and np.isfinite(values).all():
            found[name] = values
    if len(found) > 1 and fitted:
        cv = next(iter(fitted.values())).cv
        n_folds = len(cv.folds)
        features = np.column_stack(list(found.values()))
        together = cross_validated(
            [features],  # type: ignore[list-item]  # anything that torch.as_tensor takes
            mentions["hallucinated"].to_numpy(dtype=bool),
            mentions["group"].to_numpy(dtype=str),
            strengths=(1.0,),  # three features and hundreds of samples: the penalty hardly matters
            n_folds=n_folds,
            seed=seed,
        )
        found[TOGETHER] = together.scores[0].double().numpy()
    return found


def _interval(prefix: str, one: Interval) -> dict[str, float]:
    return {f"{prefix}low": one.low, f"{prefix}high": one.high}


def _layers(
    fitted: dict[str, LayerFits], methods: list[str], layers: list[int], area: Any, counts: dict[str, int]
) -> pd.DataFrame:
    """AUROC of every method at every layer, beside its control.

    The control's ends are its lowest and highest labeling. Selectivity is AUROC minus the mean control, its ends are those of
    AUROC's interval minus the highest and the lowest control: wider than an interval of the mean.
    """
    rows = []
    for method in methods:
        for place, layer in enumerate(layers):
            fit = fitted.get(method)
            one, control = MISSING, np.full(1, np.nan)
            if fit is not None:
                one = area(fit.cv.scores[place].double().numpy())
                drawn = fit.cv.control_auroc[place].numpy()
                control = drawn if len(drawn) else control
            rows.append(
                {
                    "method": method,
                    "layer": layer,
                    "auroc": one.value,
                    **_interval("", one),
                    "chance": 0.5,
                    "control_auroc": control.mean(),
                    "control_low": control.min(),
                    "control_high": control.max(),
                    "selectivity": one.value - control.mean(),
                    "selectivity_low": one.low - control.max(),
                    "selectivity_high": one.high - control.min(),
                    **counts,
                }
            )
    return pd.DataFrame(rows)


def _baselines(
    fitted: dict[str, LayerFits], baselines: dict[str, FloatArray], area: Any, counts: dict[str, int]
) -> pd.DataFrame:
    rows = []
    for name in [*BASELINES, TOGETHER]:
        one = area(baselines[name]) if name in baselines else MISSING
        rows.append({"baseline": name, "auroc": one.value, **_interval("", one), "chance": 0.5, **counts})
    return pd.DataFrame(rows)


def _threshold(
    fitted: dict[str, LayerFits],
    methods: list[str],
    label: NDArray[np.bool_],
    group: NDArray[Any],
    target_fpr: float,
    options: dict[str, Any],
    counts: dict[str, int],
) -> pd.DataFrame:
    """What comes of a threshold that was set on other images: the rates that it has on those it has not seen."""
    names = ("false positive rate", "true positive rate", "specificity", "LR+")
    rows = []
    for method in methods:
        fit = fitted.get(method)
        chosen = None if fit is None else fit.chosen
        found = [MISSING] * len(names)
        if chosen is not None:
            index = np.unique(group, return_inverse=True)[1]
            sums = np.zeros((index.max() + 1, 4))
            for column, rows_of in enumerate((~label & chosen.flagged, ~label, label & chosen.flagged, label)):
                np.add.at(sums[:, column], index[rows_of], 1.0)
            intervals = cluster_bootstrap(sums, _rates, **options)
            assert isinstance(intervals, list)
            found = intervals
        for name, one in zip(names, found, strict=True):
            rows.append(
                {
                    "method": method,
                    "wanted_fpr": target_fpr,
                    "metric": name,
                    "value": one.value,
                    **_interval("", one),
                    **counts,
                }
            )
    return pd.DataFrame(rows)


def _rates(total: FloatArray) -> FloatArray:
    """False positives, negatives, true positives, positives [..., 4] to FPR, TPR, specificity, LR+."""
    fpr, tpr = ratio(total[..., 0], total[..., 1]), ratio(total[..., 2], total[..., 3])
    return np.stack([fpr, tpr, 1 - fpr, ratio(tpr, fpr)], axis=-1)


def _chosen_layers(fitted: dict[str, LayerFits], methods: list[str]) -> pd.DataFrame:
    """The layer and threshold that the images outside of each fold chose."""
    rows: list[dict[str, Any]] = []
    for method in methods:
        fit = fitted.get(method)
        if fit is None or fit.chosen is None:
            rows.append({"method": method, "fold": -1, "layer": np.nan, "threshold": np.nan})
            continue
        for fold, (layer, threshold) in enumerate(zip(fit.chosen.layer, fit.chosen.thresholds, strict=True)):
            rows.append({"method": method, "fold": fold, "layer": float(layer), "threshold": threshold})
    return pd.DataFrame(rows)


def _mentions(mentions: pd.DataFrame, fitted: dict[str, LayerFits], baselines: dict[str, FloatArray]) -> pd.DataFrame:
    """Every mention with the scores of the detectors on it, out of fold."""
    table = mentions.copy()
    for method, fit in fitted.items():
        table[f"score_{method}"] = detector(fit)[1]
    if TOGETHER in baselines:
        table["score_baselines"] = baselines[TOGETHER]
    if table.empty:  # one row that says so: tables are never empty
        table = pd.DataFrame({name: [np.nan] if table[name].dtype.kind == "f" else [""] for name in table})
    return table


def detector(fit: LayerFits) -> tuple[str, FloatArray]:
    """(which layer, scores [sample]): with the layer chosen in the training folds, or at the middle block where none can be."""
    if fit.chosen is not None:
        return "chosen in the training folds", fit.chosen.ranking
    blocks = [layer for layer in fit.layers if layer >= 0] or fit.layers
    middle = blocks[len(blocks) // 2]
    return f"layer {middle}", fit.cv.scores[fit.layers.index(middle)].double().numpy()


def summary(tables: dict[str, pd.DataFrame], position: str, reason: str) -> str:
    """What was found, in up to three sentences."""
    if reason:
        return f"Nothing was trained: {reason}."
    layers = tables["layers"]
    best = layers.loc[layers["auroc"].idxmax()]
    return f"AUROC {best['auroc']:.2f} [{best['low']:.2f}, {best['high']:.2f}]"
