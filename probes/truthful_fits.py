"""The classifiers of `TruthfulDirection`: every layer cross-validated, and a layer chosen without the images it is tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.linear_fits import CrossValidated, Method, MlpOptions, cross_validated
from slitlamp.errors import InputError
from slitlamp.evaluation.operating_points import threshold_at_fpr

METHODS: tuple[Any, ...] = ("logistic", "difference_of_means", "mlp")
MIN_NESTED_FOLDS = 4
"""Folds from which a layer can be chosen inside a training set, which leaves one fold less for choosing the penalty."""


@dataclass(frozen=True)
class Options:
    """Parameters of the fits; see `TruthfulDirection`."""

    strengths: tuple[float, ...]
    n_folds: int
    n_controls: int
    permutations: int
    target_fpr: float
    seed: int
    mlp: MlpOptions = field(default_factory=MlpOptions)


@dataclass(frozen=True)
class Chosen:
    """A detector whose layer and threshold were chosen without the images it is tested on.

    Attributes:
        layer: int [fold], the layer with the best AUROC in a cross-validation inside each training set.
        fold: int [sample], which fold holds a sample out.
        scores: [sample] log-odds of the fold's classifier at the fold's layer (difference of means: of its calibration).
        ranking: [sample] the same with an intercept common to the folds, where the method has one: for AUROC.
        thresholds: [fold], the log-odds above which `target_fpr` of the true mentions of the training set lie, out of inner
            fold.
    """

    layer: NDArray[np.int64]
    fold: NDArray[np.int64]
    scores: NDArray[np.float64]
    ranking: NDArray[np.float64]
    thresholds: NDArray[np.float64]


@dataclass(frozen=True)
class LayerFits:
    """One method at every layer.

    Attributes:
        layers: the layers, -1 for the input of the model.
        cv: cross-validated classifiers, over the layers.
        chosen: with the layer chosen inside the training folds; None where there are too few folds for that.
    """

    layers: list[int]
    cv: CrossValidated
    chosen: Chosen | None

    @property
    def best_layer(self) -> int:
        """The layer with the highest cross-validated AUROC over everything; the input counts only where it is alone."""
        return best_layer(self.layers, self.cv.auroc.numpy())

    def log_odds(self, layer: int) -> NDArray[np.float64]:
        """[sample], out of fold, of the probabilities."""
        return log_odds(self.cv.probabilities[self.layers.index(layer)])

    def own_scores(self, layer: int) -> NDArray[np.float64]:
        """[sample], out of fold, in the units of the fit on everything: log-odds (difference of means: projections)."""
        if self.cv.method == "difference_of_means":
            return np.asarray(self.cv.scores[self.layers.index(layer)].double().numpy())
        return self.log_odds(layer)


def best_layer(layers: list[int], auroc: NDArray[np.float64]) -> int:
    """The layer of the highest AUROC [layer], the first of equals; the model's input is left out where there are blocks."""
    kept = [place for place, layer in enumerate(layers) if layer >= 0] or list(range(len(layers)))
    return layers[kept[int(np.argmax(auroc[kept]))]]


def fit_layers(
    states: Callable[[int], Tensor], layers: list[int], mentions: pd.DataFrame, method: str, options: Options
) -> LayerFits:
    """Cross-validate one method at every layer, and choose the layer inside each training set.

    For each fold k the layer and the threshold come from a second cross-validation on the images outside of k alone; the
    classifier that scores k is the one trained on all of these. No choice has seen a label of the images that it is judged on.

    Args:
        states: layer -> [sample, d].
        layers: which.
        mentions: columns hallucinated, group, category, word.
        method: one of `METHODS`.
        options: of the fits.

    Raises:
        InputError: mentions of one kind only, or in too few images.
    """
    label = mentions["hallucinated"].to_numpy(dtype=bool)
    group = mentions["group"].to_numpy(dtype=str)
    if not len(label) or label.all() or not label.any():
        raise InputError(
            f"classifiers need hallucinated and true mentions: found {int(label.sum())} and {int((~label).sum())}"
        )
    n_groups = min(len(np.unique(group[label])), len(np.unique(group[~label])))
    n_folds = min(options.n_folds, n_groups)
    if n_folds < 2:
        raise InputError(
            "a kind of mention occurs in one image only: nothing can be trained on some images and tested on others"
        )
    kinds = control_types(mentions)
    cv = _validated(states, layers, label, group, method, options, n_folds, kinds)
    chosen = _choose(states, layers, label, group, method, options, cv) if n_folds >= MIN_NESTED_FOLDS else None
    return LayerFits(layers, cv, chosen)


def control_types(mentions: pd.DataFrame) -> NDArray[Any]:
    """What a control labeling gives one random label: the object category, or the word where no category is known."""
    return np.where(mentions["category"] != "", mentions["category"], mentions["word"]).astype(str)


def _validated(
    states: Callable[[int], Tensor],
    layers: list[int],
    label: NDArray[np.bool_],
    group: NDArray[Any],
    method: str,
    options: Options,
    n_folds: int,
    kinds: NDArray[Any] | None,
    rows: NDArray[np.bool_] | None = None,
) -> CrossValidated:
    kept = slice(None) if rows is None else rows
    strengths = options.strengths
    if n_folds < 3:  # nothing is left to choose a penalty on
        strengths = (sorted(strengths)[len(strengths) // 2],)
    controls = options.n_controls if kinds is not None and len(np.unique(kinds)) > 1 else 0
    if method == "mlp":  # each is a training of its own
        controls = min(controls, 1)
    pick = torch.from_numpy(np.arange(len(label))[kept])
    return cross_validated(
        lambda place: states(layers[place])[pick],
        label[kept],
        group[kept],
        method=cast(Method, method),
        strengths=strengths,
        n_folds=n_folds,
        seed=options.seed,
        controls=controls,
        permutations=options.permutations if kinds is not None and method != "mlp" else 0,
        types=None if kinds is None else kinds[kept],
        n_layers=len(layers),
        mlp=options.mlp,
    )


def _choose(
    states: Callable[[int], Tensor],
    layers: list[int],
    label: NDArray[np.bool_],
    group: NDArray[Any],
    method: str,
    options: Options,
    cv: CrossValidated,
) -> Chosen:
    test = cv.folds.test.numpy()
    fold = test.argmax(axis=0)
    layer, thresholds = [], []
    scores, ranking = np.full(len(label), np.nan), np.full(len(label), np.nan)
    for held_out in test:
        inner = _validated(states, layers, label, group, method, options, len(test) - 1, None, ~held_out)
        best = best_layer(layers, inner.auroc.numpy())
        place = layers.index(best)
        layer.append(best)
        level = threshold_at_fpr(
            log_odds(inner.probabilities[place]), label[~held_out], group[~held_out], options.target_fpr, n_resamples=1
        )
        thresholds.append(level.value)
        scores[held_out] = log_odds(cv.probabilities[place])[held_out]
        # projections have no unit that two layers share
        common = scores if method == "difference_of_means" else cv.scores[place].double().numpy()
        ranking[held_out] = common[held_out]
    return Chosen(np.array(layer), fold, scores, ranking, np.array(thresholds))


def log_odds(probabilities: Tensor) -> NDArray[np.float64]:
    """Log-odds in float64; probabilities that have rounded to 0 or 1 stay finite."""
    p = probabilities.double().clamp(1e-12, 1 - 1e-12)
    return np.asarray(torch.logit(p).numpy())
