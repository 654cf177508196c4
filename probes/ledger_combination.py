"""How well the ledger's signals detect together: a logistic combination, cross-validated by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from probes.ledger_ranking import FALSE, Detection, covariates_of, usable
from probes.ledger_signals import Signal
from probes.linear_fits import (
    DEFAULT_STRENGTHS,
    CrossValidated,
    Folds,
    cross_validated,
    fit_logistic,
    grouped_folds,
)
from slitlamp.errors import InputError

FloatArray = NDArray[np.float64]

COMBINATIONS: Mapping[str, frozenset[str]] = {
    "all signals": frozenset({"visual dependence", "states", "attention", "certainty", "baseline"}),
    "all but the baselines": frozenset({"visual dependence", "states", "attention", "certainty"}),
    "output and baselines": frozenset({"certainty", "baseline"}),
    "baselines": frozenset({"baseline"}),
}
"""Which families of signals each combination takes. Baselines are position, mention index and object frequency; what can be known
without a look inside is the output distribution and the baselines."""


_PENALTY = 100.0
"""Of the probe where there are too few images to choose it: two folds."""


def folds_of(false: NDArray[np.bool_], groups: NDArray[Any], n_folds: int, seed: int) -> Folds | None:
    """At most `n_folds` folds that keep images whole, with both classes in every training set; None where that cannot be."""
    for count in range(min(n_folds, len(np.unique(groups))), 1, -1):
        try:
            folds = grouped_folds(groups, false, count, seed)
        except InputError:
            continue  # too few images of a class for so many folds
        classes = [false[rows] for rows in folds.train.numpy()]
        if all(one.any() and not one.all() for one in classes):
            return folds
    return None


def probe_fits(
    states: NDArray[Any], false: NDArray[np.bool_], groups: NDArray[Any], *, n_folds: int, seed: int
) -> CrossValidated | None:
    """The probe on states [token, d]: a logistic regression cross-validated by image, its penalty chosen inside the training
    folds. None where there are too few images of a class.
    """
    features = torch.tensor(states, dtype=torch.float64)
    for count in range(min(n_folds, len(np.unique(groups))), 1, -1):
        strengths = DEFAULT_STRENGTHS if count > 2 else (_PENALTY,)
        try:
            return cross_validated([features], false, groups, strengths=strengths, n_folds=count, seed=seed)
        except InputError:
            continue  # too few images of a class for so many folds
    return None


def out_of_fold(
    states: NDArray[Any], false: NDArray[np.bool_], groups: NDArray[Any], *, n_folds: int, seed: int
) -> FloatArray:
    """The probe's score of every token [token], from a fit on other images; NaN where there are too few."""
    fits = probe_fits(states, false, groups, n_folds=n_folds, seed=seed)
    return np.full(len(false), np.nan) if fits is None else fits.scores[0].double().numpy().copy()


def combined_scores(
    columns: FloatArray,
    states: NDArray[Any] | None,
    false: NDArray[np.bool_],
    groups: NDArray[Any],
    folds: Folds,
    *,
    n_folds: int,
    seed: int,
) -> FloatArray:
    """Out-of-fold scores of a logistic combination of signals [token, signal].

    The score of the probe on states [token, d] is one of them. It is itself fitted to labels, so it is made anew for every
    fold from the training images alone: by folds within them for the training tokens, by a fit on all of them for the
    held-out ones. Without that, labels of the held-out tokens would reach the combination through the probe.
    """
    scores = np.full(len(false), np.nan)
    for test in folds.test.numpy():
        train, x = ~test, columns
        if states is not None:
            fits = probe_fits(states[train], false[train], groups[train], n_folds=n_folds, seed=seed)
            if fits is not None:  # else too few images to cross-validate within: it goes without the probe
                probe = states.astype(np.float64) @ fits.directions[0].numpy() + float(fits.intercepts[0])
                probe[train] = fits.scores[0].numpy()
                x = np.column_stack([columns, probe])
        fit = fit_logistic(
            torch.tensor(x, dtype=torch.float64), torch.tensor(false), torch.tensor(train)[None], strengths=[1.0]
        )
        # a fold's own intercept depends on the labels that it holds out: it is left out, as in `cross_validated`
        scores[test] = (x[test] - x[train].mean(axis=0)) @ fit.coefficients[0, 0, 0].numpy()
    return scores


def combination_table(
    ledger: pd.DataFrame,
    signals: Sequence[Signal],
    ranking: pd.DataFrame,
    states: NDArray[Any] | None,
    *,
    detection: Detection,
    n_folds: int,
) -> tuple[pd.DataFrame, FloatArray]:
    """Each combination's AUROC, and its paired difference from other detectors on the same tokens.

    Returns:
        (one row per combination and what it is compared with, the out-of-fold scores of all signals together [token]). The
        table is empty where there are too few images to cross-validate.
    """
    false = ledger["label"].isin(FALSE).to_numpy()
    groups = ledger["image"].to_numpy(dtype=str)
    folds = folds_of(false, groups, n_folds, detection.seed)
    if folds is None:
        return pd.DataFrame(), np.full(len(ledger), np.nan)
    scores: dict[str, FloatArray] = {}
    sizes: dict[str, int] = {}
    for name, families in COMBINATIONS.items():
        mine = [one for one in signals if one.family in families and usable(ledger, one.name)]
        plain = [one.name for one in mine if one.name != "truthful_score"]
        own_states = states if len(plain) < len(mine) else None
        if len(mine) < 2:
            continue
        found = combined_scores(
            ledger[plain].to_numpy(dtype=np.float64), own_states, false, groups, folds,
            n_folds=n_folds, seed=detection.seed,
        )  # fmt: skip
        if np.isfinite(found).all():
            scores[name], sizes[name] = found, len(mine)
    single = best_single(ranking, signals, len(ledger))
    references = {} if single is None else {single.title: single.sign * ledger[single.name].to_numpy()}
    references |= {name: scores[name] for name in list(COMBINATIONS)[2:] if name in scores}
    rows = []
    for name, score in scores.items():
        row = {"combination": name, "n_signals": sizes[name], **detection.measured(score, false, groups)}
        row |= detection.beyond(score, false, groups, covariates_of(ledger))
        for reference, other in references.items():
            if reference == name:
                continue
            rows.append({**row, "against": reference, **detection.difference(other, score, false, groups)})
    everything = scores.get("all signals", np.full(len(ledger), np.nan))
    return pd.DataFrame(rows), everything


def best_single(ranking: pd.DataFrame, signals: Sequence[Signal], n_tokens: int) -> Signal | None:
    """The signal of the highest AUROC among those measured for every token; it is chosen on the same tokens, in its favour."""
    rows = ranking[(ranking["n_tokens"] == n_tokens) & (ranking["family"] != "null") & ranking["auroc"].notna()]
    if rows.empty:
        return None
    name = str(rows.loc[rows["auroc"].idxmax(), "signal"])
    return next(one for one in signals if one.name == name)
