"""The tables of `TruthfulDirection`: how well each layer detects hallucinations, beside controls and baselines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probes.linear_fits import cross_validated
from probes.truthful_fits import LayerFits, control_types
from slitlamp.evaluation.detection import adjusted_auroc, auroc_difference, auroc_interval, stratified_auroc
from slitlamp.evaluation.operating_points import (
    calibrated_error,
    detection_table,
    expected_calibration_error,
    operating_point,
    threshold_at_fpr,
)
from slitlamp.evaluation.statistics import Interval

FloatArray = NDArray[np.float64]
NUMERIC = {"-log p": "neg_log_p", "mention index": "mention", "object frequency": "frequency"}
"""By name, the column that is a score of hallucination as it stands: less likely tokens, later mentions, commoner objects."""
CATEGORY, TOGETHER = "object category", "all but the category"
BASELINES = (*NUMERIC, TOGETHER, CATEGORY)
CONFIDENCE = "-log p"
CHOSEN = "chosen in the training folds"
MISSING = Interval(float("nan"), float("nan"), float("nan"), 0, p=float("nan"))
PRIOR_WEIGHT = 5.0
"""Mentions of average rate that are added to each category's own, so that rare ones are not taken at their word."""


@dataclass(frozen=True)
class Sample:
    """Labels and images of the mentions, and how often to resample."""

    label: NDArray[np.bool_]
    group: NDArray[Any]
    options: dict[str, Any]

    @property
    def counts(self) -> dict[str, int]:
        """Columns that say how much there was."""
        bad = int(self.label.sum())
        return {"n_hallucinated": bad, "n_true": len(self.label) - bad, "n_items": len(np.unique(self.group))}


def detection_tables(
    mentions: pd.DataFrame,
    fitted: dict[str, LayerFits],
    methods: list[str],
    layers: list[int],
    target_fpr: float,
    options: dict[str, Any],
) -> dict[str, pd.DataFrame]:
    """Tables `layers`, `metrics`, `baselines`, `threshold`, `chosen_layers` and `mentions`.

    Args:
        mentions: the samples (`truthful_gather.COLUMNS`).
        fitted: by method; empty where nothing could be trained, and all estimates are NaN then.
        methods, layers: what was asked for.
        target_fpr: of the threshold.
        options: n_resamples and seed of the bootstrap.
    """
    sample = Sample(mentions["hallucinated"].to_numpy(dtype=bool), mentions["group"].to_numpy(dtype=str), options)
    baselines = baseline_scores(mentions, fitted, options["seed"]) if fitted else {}
    metrics = _metrics(fitted, methods, layers, sample)
    return {
        "layers": _layers(fitted, metrics, methods, layers, sample, baselines.get(CONFIDENCE)),
        "metrics": metrics,
        "baselines": _baselines(mentions, fitted, methods, baselines, sample),
        "threshold": _threshold(fitted, methods, target_fpr, sample),
        "chosen_layers": _chosen_layers(fitted, methods),
        "mentions": _mentions(mentions, fitted, baselines),
    }


def baseline_scores(mentions: pd.DataFrame, fitted: dict[str, LayerFits], seed: int) -> dict[str, FloatArray]:
    """What detects hallucinations without the hidden states, by name: scores [sample]; one unknown for any sample is left out.

    Those that are learned are cross-validated over the folds of the probes: a logistic regression on all the numeric ones, and
    the share of hallucinated mentions of the same category.
    """
    found = {}
    for name, column in NUMERIC.items():
        values = mentions[column].to_numpy(dtype=np.float64)
        if np.isfinite(values).all():
            found[name] = values
    label, group = mentions["hallucinated"].to_numpy(dtype=bool), mentions["group"].to_numpy(dtype=str)
    test = next(iter(fitted.values())).cv.folds.test.numpy()
    features = np.column_stack(list(found.values()))
    together = cross_validated(
        [features],  # type: ignore[list-item]  # anything that torch.as_tensor takes
        label,
        group,
        strengths=(1.0,),  # a few features and many samples: the penalty hardly matters
        n_folds=len(test),
        seed=seed,
    )
    found[TOGETHER] = together.scores[0].double().numpy()
    if (mentions["category"] != "").all():
        index = np.unique(control_types(mentions), return_inverse=True)[1]
        rate = np.empty(len(label))
        for held_out in test:
            n = np.bincount(index[~held_out], minlength=index.max() + 1)
            bad = np.bincount(index[~held_out], label[~held_out], minlength=index.max() + 1)
            rate[held_out] = ((bad + PRIOR_WEIGHT * label[~held_out].mean()) / (n + PRIOR_WEIGHT))[index[held_out]]
        found[CATEGORY] = rate
    return found


def detector(fit: LayerFits) -> tuple[str, FloatArray]:
    """(which layer, scores [sample]): with the layer chosen in the training folds, or at the middle block where none can be."""
    if fit.chosen is not None:
        return CHOSEN, fit.chosen.ranking
    blocks = [layer for layer in fit.layers if layer >= 0] or fit.layers
    middle = blocks[len(blocks) // 2]
    return f"layer {middle}", fit.cv.scores[fit.layers.index(middle)].double().numpy()


def _ends(prefix: str, one: Interval) -> dict[str, float]:
    return {f"{prefix}low": one.low, f"{prefix}high": one.high}


def _metrics(fitted: dict[str, LayerFits], methods: list[str], layers: list[int], sample: Sample) -> pd.DataFrame:
    """Every detection metric of every method at every layer, and with the layer chosen in the training folds.

    `n_allowed` is how many true mentions may be flagged at a rate: with 0 there are too few to resolve it.
    """
    parts = []
    for method in methods:
        fit = fitted.get(method)
        if fit is None:
            missing = {"metric": "auroc", "fpr": np.nan, "value": np.nan, "low": np.nan, "high": np.nan, "chance": 0.5,
                       "n_allowed": np.nan}  # fmt: skip
            parts.append(pd.DataFrame([{"method": method, "layer": str(one), **missing} for one in layers]))
            continue
        scores = {str(layer): fit.cv.scores[place].double().numpy() for place, layer in enumerate(fit.layers)}
        probabilities = {
            str(layer): fit.cv.probabilities[place].double().numpy() for place, layer in enumerate(fit.layers)
        }
        if fit.chosen is not None:
            scores[CHOSEN] = fit.chosen.ranking
            probabilities[CHOSEN] = 1 / (1 + np.exp(-fit.chosen.scores))
        for layer, values in scores.items():
            table = detection_table(values, sample.label, sample.group, **sample.options)
            # the threshold of scores with a common intercept is none of the classifier: table `threshold` has that one
            table = table[table["metric"] != "threshold"]
            table = table[["metric", "fpr", "value", "low", "high", "chance", "n_allowed"]]
            error = expected_calibration_error(probabilities[layer], sample.label, sample.group, **sample.options)
            right = calibrated_error(probabilities[layer], seed=sample.options["seed"])
            ece = {"metric": "ece", "fpr": np.nan, "value": error.value, **_ends("", error), "chance": right.value,
                   "n_allowed": np.nan}  # fmt: skip
            table = pd.concat([table, pd.DataFrame([ece])], ignore_index=True)
            table.insert(0, "method", method)
            table.insert(1, "layer", layer)
            parts.append(table)
    return pd.concat(parts, ignore_index=True).assign(**sample.counts)


def _layers(
    fitted: dict[str, LayerFits],
    metrics: pd.DataFrame,
    methods: list[str],
    layers: list[int],
    sample: Sample,
    confidence: FloatArray | None,
) -> pd.DataFrame:
    """AUROC of every method at every layer, beside its control and minus that of -log p.

    The control's ends are its lowest and highest labeling. Selectivity is AUROC minus the mean control; its ends are those of
    AUROC's interval minus the highest and the lowest control, which is wider than an interval of the mean. `p` and
    `p_any_layer` (against the best layer of each permutation) are NaN without permutations.
    """
    areas = metrics[metrics["metric"] == "auroc"].set_index(["method", "layer"])
    rows = []
    for method in methods:
        for place, layer in enumerate(layers):
            fit, one = fitted.get(method), areas.loc[(method, str(layer))]
            control, gain = np.full(1, np.nan), MISSING
            if fit is not None:
                drawn = fit.cv.control_auroc[place].numpy()
                control = drawn if len(drawn) else control
                if confidence is not None:
                    scores = fit.cv.scores[place].double().numpy()
                    gain = auroc_difference(confidence, scores, sample.label, sample.group, **sample.options)
            rows.append(
                {
                    "method": method,
                    "layer": layer,
                    "auroc": one["value"],
                    "low": one["low"],
                    "high": one["high"],
                    "chance": 0.5,
                    "control_auroc": control.mean(),
                    "control_low": control.min(),
                    "control_high": control.max(),
                    "selectivity": one["value"] - control.mean(),
                    "selectivity_low": one["low"] - control.max(),
                    "selectivity_high": one["high"] - control.min(),
                    "over_confidence": gain.value,
                    **_ends("over_confidence_", gain),
                    "p": np.nan if fit is None else float(fit.cv.p[place]),
                    "p_any_layer": np.nan if fit is None else float(fit.cv.p_any_layer[place]),
                    **sample.counts,
                }
            )
    return pd.DataFrame(rows)


def _baselines(
    mentions: pd.DataFrame,
    fitted: dict[str, LayerFits],
    methods: list[str],
    baselines: dict[str, FloatArray],
    sample: Sample,
) -> pd.DataFrame:
    """Each baseline, what a probe has over it (paired difference of AUROC), and the probe's AUROC where the baseline is equal.

    The last is the AUROC within categories, or of what a regression on the baselines leaves of the probe's score (Janes and
    Pepe 2009): above 1/2, the states tell more than the baseline, even where the baseline is the better detector.
    """
    rows = []
    numeric = [NUMERIC[name] for name in NUMERIC if name in baselines]
    for method in methods:
        fit = fitted.get(method)
        scores = None if fit is None else detector(fit)[1]
        for name in BASELINES:
            area = gain = beyond = MISSING
            if name in baselines and scores is not None:
                split: tuple[Any, ...] = (sample.label, sample.group)
                area = auroc_interval(baselines[name], *split, **sample.options)
                gain = auroc_difference(baselines[name], scores, *split, **sample.options)
                if name == CATEGORY:
                    kinds = control_types(mentions)
                    beyond = stratified_auroc(scores, sample.label, kinds, sample.group, **sample.options)
                else:
                    columns = numeric if name == TOGETHER else [NUMERIC[name]]
                    covariates = mentions[columns].to_numpy(dtype=np.float64)
                    beyond = adjusted_auroc(scores, sample.label, covariates, sample.group, **sample.options)
            rows.append(
                {
                    "baseline": name,
                    "auroc": area.value,
                    **_ends("", area),
                    "chance": 0.5,
                    "method": method,
                    "probe_layer": "" if fit is None else detector(fit)[0],
                    "gain": gain.value,
                    **_ends("gain_", gain),
                    "gain_p": gain.p,
                    "beyond": beyond.value,
                    **_ends("beyond_", beyond),
                    **sample.counts,
                }
            )
    return pd.DataFrame(rows)


def _threshold(fitted: dict[str, LayerFits], methods: list[str], target_fpr: float, sample: Sample) -> pd.DataFrame:
    """What a threshold that was set at a false positive rate on other images does on images that it has not seen.

    The row "threshold" is the one to use on further data: at the best layer, set on all mentions out of fold, in the units of
    `TruthfulDirection.score`. The perceptron, which has no fit on everything, has none.
    """
    parts = []
    for method in methods:
        fit = fitted.get(method)
        if fit is None or fit.chosen is None:
            nothing = {"value": np.nan, "low": np.nan, "high": np.nan, "chance": np.nan, "n_flagged": 0}
            found = pd.DataFrame(
                [{"metric": one, **nothing} for one in ("tpr", "fpr", "specificity", "precision", "lr_plus")]
            )
        else:
            # each fold has its own threshold: what lies above it is what lies above zero after it is taken off
            above = fit.chosen.scores - fit.chosen.thresholds[fit.chosen.fold]
            found = operating_point(above, sample.label, sample.group, 0.0, **sample.options)
            found = found[["metric", "value", "low", "high", "chance", "n_flagged"]]
        level, layer = MISSING, np.nan
        if fit is not None and method != "mlp":
            layer = float(fit.best_layer)
            level = threshold_at_fpr(
                fit.own_scores(fit.best_layer), sample.label, sample.group, target_fpr, **sample.options
            )
        row = {"metric": "threshold", "value": level.value, **_ends("", level), "chance": np.nan, "layer": layer}
        found = pd.concat([found, pd.DataFrame([row])], ignore_index=True)
        found.insert(0, "method", method)
        found.insert(1, "wanted_fpr", target_fpr)
        parts.append(found)
    return pd.concat(parts, ignore_index=True).assign(**sample.counts)


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
        unknown: dict[str, Any] = {**dict.fromkeys(("item", "group", "word", "category"), ""), "hallucinated": None}
        return pd.DataFrame({name: [unknown.get(name, np.nan)] for name in table})
    return table
