"""Transfer of truthful directions between data sets, models and layers: trained on one, applied to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from probes.folds import grouped_folds
from probes.linear_fits import cross_validated, fit_logistic
from probes.transfer import (
    Alignment,
    coral,
    no_alignment,
    pair_anchors,
    procrustes,
    standardised,
    subspace_alignment,
)
from probes.truthful_fits import LayerFits, Options, log_odds
from slitlamp.errors import InputError
from slitlamp.evaluation.detection import auroc_interval
from slitlamp.evaluation.operating_points import operating_point, threshold_at_fpr
from slitlamp.evaluation.statistics import Interval
from slitlamp.tracing import Part

FloatArray = NDArray[np.float64]
ALIGNMENTS = ("none", "standardised", "subspace", "coral", "procrustes")
SOURCE_ALONE = ("none", "standardised")
"""Alignments whose map of the source does not depend on the target."""
INNER_FOLDS = 3
"""Folds in which the penalty of a carried probe is chosen; there are many such fits, and the choice is a coarse one."""
MIN_PAIRS = 10
"""Fewest pairs of anchors that an alignment is made of."""
Classifier = tuple[FloatArray, float, float]
"""Weights, intercept and threshold."""


@dataclass(frozen=True)
class Domain:
    """The mentions of one model on one data set, at one layer.

    Attributes:
        layer: which.
        states: [mention, d].
        hallucinated: bool [mention].
        group: [mention], the image.
        category: [mention], the object.
        anchors: by name, (key [anchor], group [anchor], states [anchor, kind, d]): states of things that another domain
            of the same data set may have too.
    """

    layer: int
    states: FloatArray
    hallucinated: NDArray[np.bool_]
    group: NDArray[Any]
    category: NDArray[Any]
    anchors: dict[str, tuple[NDArray[Any], NDArray[Any], FloatArray]] = field(default_factory=dict)

    def all_anchors(self) -> dict[str, tuple[list[Any], NDArray[Any], FloatArray]]:
        """The given anchors, and the mentions themselves: the states at which the same object of the same image is named."""
        found = {name: (list(key), group, states) for name, (key, group, states) in self.anchors.items()}
        known = self.category != ""
        keys = list(zip(self.group[known], self.category[known], strict=True))
        return {**found, "mentions": (keys, self.group[known], self.states[known][:, None])}


Aligner = Callable[[FloatArray, FloatArray, NDArray[Any]], Alignment]
"""(source states, target states, images held out) -> alignment."""


def aligners(
    source: Domain, target: Domain, names: Sequence[str], components: Sequence[int]
) -> dict[tuple[str, float], Aligner]:
    """Every way to align two domains by (name, number of components or NaN); Procrustes once for each kind of anchor.

    Ways that the domains do not allow (unequal widths, no shared things) are left out.
    """
    nan, found = float("nan"), {}
    simple = {"none": no_alignment, "standardised": standardised, "coral": coral}
    if source.states.shape[1] == target.states.shape[1]:
        for name in names:
            if name in simple:
                found[name, nan] = _unpaired(simple[name])
        rank = int(0.7 * min(len(source.states), len(target.states)))  # of what a training fold surely has
        for k in components if "subspace" in names else ():
            if k <= min(rank, source.states.shape[1]):
                found["subspace", float(k)] = _unpaired(lambda s, t, k=k: subspace_alignment(s, t, k))
    if "procrustes" in names:
        first, second = source.all_anchors(), target.all_anchors()
        for kind in first:
            if kind in second and len(pair_anchors(first[kind][0], second[kind][0])[0]) >= MIN_PAIRS:
                found[f"procrustes ({kind})", nan] = _paired(first[kind], second[kind])
    return found


def _unpaired(align: Callable[..., Alignment]) -> Aligner:
    return lambda source, target, held_out: align(source, target)


def _paired(
    first: tuple[list[Any], NDArray[Any], FloatArray], second: tuple[list[Any], NDArray[Any], FloatArray]
) -> Aligner:
    rows, others = pair_anchors(first[0], second[0])

    def align(source: FloatArray, target: FloatArray, held_out: NDArray[Any]) -> Alignment:
        kept = ~np.isin(first[1][rows], held_out)
        sides = [_centred(first[2][rows[kept]]), _centred(second[2][others[kept]])]
        return procrustes(source, target, *sides)

    return align


def _centred(anchors: FloatArray) -> FloatArray:
    """[anchor, kind, d] to [anchor * kind, d], each kind around its own mean: what differs between things counts."""
    centred = anchors - anchors.mean(axis=0)
    return np.concatenate(list(np.moveaxis(centred, 1, 0)))


@dataclass(frozen=True)
class Carried:
    """What classifiers of a source say of a target.

    Attributes:
        scores: [target mention] log-odds.
        above: [target mention] log-odds less the threshold that the source set for `target_fpr`: flagged above zero.
    """

    scores: FloatArray
    above: FloatArray


def transferred(
    source: Domain,
    target: Domain,
    aligner: Aligner,
    held_out: Sequence[NDArray[Any]],
    options: Options,
    strength: float | None = None,
    known: dict[int, Classifier] | None = None,
) -> Carried:
    """Judge the target by classifiers that saw source labels only, and no label or state of the mention's image.

    Args:
        source, target: the domains.
        aligner: how they are brought together, on the images that are not held out.
        held_out: per fold, its images; they take turns in both domains.
        options: of the fits.
        strength: a penalty that is known. None for one chosen inside the source's training set, and only then is there a
            threshold: otherwise `above` is NaN.
        known: classifiers by fold, taken from here where they are and put here where they are not: for several targets
            of a source whose own map is the same for all of them.
    """
    fitted = {} if known is None else known
    scores, above = np.full(len(target.states), np.nan), np.full(len(target.states), np.nan)
    for fold, images in enumerate(held_out):
        train, test = ~np.isin(source.group, images), np.isin(target.group, images)
        unlabelled = ~test if (~test).sum() > 1 else test
        if not test.any():
            continue
        maps = aligner(source.states[train], target.states[unlabelled], images)
        if fold not in fitted:
            fitted[fold] = _classifier(
                maps.source(source.states[train]), source.hallucinated[train], source.group[train], options, strength
            )
        weights, bias, threshold = fitted[fold]
        scores[test] = maps.target(target.states[test]) @ weights + bias
        above[test] = scores[test] - threshold
    return Carried(scores, above)


def _classifier(
    x: FloatArray, label: NDArray[np.bool_], group: NDArray[Any], options: Options, strength: float | None
) -> Classifier:
    """Weights and intercept of a logistic regression, and its threshold for `target_fpr`.

    Both the penalty and the threshold come from a cross-validation inside these samples.
    """
    states = torch.from_numpy(x).float()
    if strength is not None:
        fit = fit_logistic(states, torch.from_numpy(label), None, [strength])
        return fit.coefficients[0, 0, 0].double().numpy(), float(fit.intercept[0, 0, 0]), float("nan")
    wanted = options.strengths
    n_folds = min(INNER_FOLDS, *(len(np.unique(group[label == side])) for side in (True, False)))
    if n_folds < 3:
        wanted = (sorted(wanted)[len(wanted) // 2],)
    found = cross_validated([states], label, group, strengths=wanted, n_folds=n_folds, seed=options.seed)
    level = threshold_at_fpr(log_odds(found.probabilities[0]), label, group, options.target_fpr, n_resamples=1)
    return found.directions[0].double().numpy(), float(found.intercepts[0]), level.value


def shared_folds(source: Domain, target: Domain, options: Options) -> list[NDArray[Any]]:
    """Images to hold out in turn, in both domains at once.

    Raises:
        InputError: a kind of mention in too few images.
    """
    group = np.concatenate([source.group, target.group])
    label = np.concatenate([source.hallucinated, target.hallucinated])
    n_folds = min(options.n_folds, *(len(np.unique(group[label == side])) for side in (True, False)))
    folds = grouped_folds(group, label, n_folds, options.seed).test.numpy()
    return [np.unique(group[rows]) for rows in folds]


def compare_domains(
    domains: Mapping[Part, Domain],
    left_out: Mapping[Part, str],
    names: Sequence[str],
    components: Sequence[int],
    options: Options,
    n_resamples: int,
    layers: Mapping[Part, Sequence[int]],
    domain_at: Callable[[Part, int], Domain],
) -> tuple[dict[str, pd.DataFrame], str]:
    """Table `transfer`: every ordered pair of parts that differ in one thing (model, condition or data set).

    The source's layer is the one that its own cross-validation chose; the target's lies at the same share of the depth, so
    that no label of the target is used. Beside each transfer stands the upper bound, a classifier trained on the target's own
    labels over the same folds at the same layer, and chance, which is .5. (A part carried to itself is judged on the labels
    that chose its layer, which makes it a little too good; table `metrics` of the probe has it with a layer chosen elsewhere.)
    `source_threshold_fpr` and `_tpr` are what a threshold set on the source for `target_fpr` does on the target: where they
    are far off, the threshold has to be set anew on labelled items of the target.

    Args:
        domains: of each part, at its best layer.
        left_out: parts that cannot be trained on, with the reason.
        names, components: the alignments.
        options, n_resamples: of fits and bootstrap.
        layers: recorded layers of each part.
        domain_at: (part, layer) -> its domain there.
    """
    rows: list[dict[str, Any]] = []
    for a, source in domains.items():
        for b in domains:
            differs = [name for name, one, other in zip(Part._fields, a, b, strict=True) if one != other]
            if len(differs) > 1:
                continue
            target = domain_at(b, _counterpart(source.layer, layers[a], layers[b]))
            if a.dataset != b.dataset:  # their items share no id and no prompt
                target = replace(target, anchors={})
            place = {
                **{f"source_{k}": v for k, v in a._asdict().items()},
                **{f"target_{k}": v for k, v in b._asdict().items()},
            }
            place |= {"varies": differs[0] if differs else "nothing"}
            rows += [
                {**place, **row} for row in _pair(source, target, not differs, names, components, options, n_resamples)
            ]
    for part, reason in left_out.items():
        place = {f"{side}_{k}": v for side in ("source", "target") for k, v in part._asdict().items()}
        rows.append({**place, "varies": "nothing", **_row(-1, -1, f"not trained: {reason}")})
    table = pd.DataFrame(rows)
    return {"transfer": table}, _summary(table, options.target_fpr)


def _counterpart(layer: int, layers: Sequence[int], others: Sequence[int]) -> int:
    """The layer of `others` at the same share of the depth."""
    if layer in others and len(layers) == len(others):
        return layer
    blocks = [one for one in others if one >= 0] or list(others)
    deepest = max([*layers, 1])
    wanted = layer / deepest * max(blocks)
    return int(min(blocks, key=lambda one: abs(one - wanted)))


def _pair(
    source: Domain,
    target: Domain,
    same: bool,
    names: Sequence[str],
    components: Sequence[int],
    options: Options,
    n_resamples: int,
) -> list[dict[str, Any]]:
    try:
        folds = shared_folds(source, target, options)
        at_home = transferred(target, target, _unpaired(no_alignment), folds, options)
    except InputError as error:
        return [_row(source.layer, target.layer, f"not trained: {error}", target=target)]
    bootstrap: dict[str, Any] = {"n_resamples": n_resamples, "seed": options.seed}

    def row(name: str, carried: Carried | None, components: float = np.nan, n_pairs: int = 0) -> dict[str, Any]:
        return _row(source.layer, target.layer, name, components, carried, at_home, n_pairs, target, bootstrap)

    if same:
        return [row("itself", at_home)]
    found = []
    for (name, k), aligner in aligners(source, target, names, components).items():
        n_pairs = 0
        if name.startswith("procrustes"):
            kind = name.removeprefix("procrustes (").rstrip(")")
            n_pairs = len(pair_anchors(source.all_anchors()[kind][0], target.all_anchors()[kind][0])[0])
        found.append(row(name, transferred(source, target, aligner, folds, options), k, n_pairs))
    return found or [row("nothing shared to align by", None)]


def _row(
    source_layer: int,
    target_layer: int,
    alignment: str,
    components: float = np.nan,
    carried: Carried | None = None,
    at_home: Carried | None = None,
    n_pairs: int = 0,
    target: Domain | None = None,
    bootstrap: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    missing = Interval(np.nan, np.nan, np.nan, 0)
    label = np.zeros(0, dtype=bool) if target is None else target.hallucinated
    areas = [missing, missing]
    rates = {"fpr": missing, "tpr": missing}
    if target is not None:
        options = dict(bootstrap or {})
        for place, one in enumerate((carried, at_home)):
            if one is not None:
                areas[place] = auroc_interval(one.scores, label, target.group, **options)
        if carried is not None:
            point = operating_point(carried.above, label, target.group, 0.0, **options).set_index("metric")
            for name in rates:
                value, low, high = (float(point.loc[name, one]) for one in ("value", "low", "high"))
                rates[name] = Interval(value, low, high, areas[0].n)
    columns = {"auroc": areas[0], "target_trained": areas[1]}
    columns |= {f"source_threshold_{name}": one for name, one in rates.items()}
    found: dict[str, Any] = {
        "source_layer": source_layer, "target_layer": target_layer, "alignment": alignment, "components": components
    }  # fmt: skip
    for name, interval in columns.items():
        prefix = "" if name == "auroc" else f"{name}_"
        found |= {name: interval.value, f"{prefix}low": interval.low, f"{prefix}high": interval.high}
    return {
        **found,
        "chance": 0.5,
        "n_anchor_pairs": n_pairs,
        "n_hallucinated": int(label.sum()),
        "n_true": int((~label).sum()),
        "n_items": 0 if target is None else len(np.unique(target.group)),
    }


def _summary(table: pd.DataFrame, target_fpr: float) -> str:
    moved = table[(table["varies"] != "nothing") & table["auroc"].notna()]
    if moved.empty:
        return "No probe could be carried from one part to another: too few mentions of a kind, or nothing to align by."
    plain = moved[moved["alignment"] == "none"]
    best = moved.loc[moved["auroc"].idxmax()]
    text = (
        f"Carried to another {best['varies']}, the best of {len(moved)} transfers ({best['alignment']}) gives AUROC "
        f"{best['auroc']:.2f} [{best['low']:.2f}, {best['high']:.2f}] (trained on the target: {best['target_trained']:.2f}; "
        "chance .50)"
    )
    if len(plain):
        text += f"; unaligned transfers lie between {plain['auroc'].min():.2f} and {plain['auroc'].max():.2f}"
    rates = moved["source_threshold_fpr"]
    return (
        f"{text}. The source's threshold, set for a false positive rate of {target_fpr:g}, has rates from {rates.min():.3f} to "
        f"{rates.max():.3f} on the target."
    )


def layer_transfer(
    domain: Callable[[int], Domain],
    fits: LayerFits,
    names: Sequence[str],
    components: Sequence[int],
    options: Options,
    n_resamples: int = 500,
) -> pd.DataFrame:
    """The logistic probe of every layer on every other one of the same model: states of the same mentions, so all are paired.

    The penalty is the one that the source layer's cross-validation chose.

    Args:
        domain: layer -> its domain.
        fits: of the logistic probe.
        names, components: the alignments.
        options, n_resamples: of fits and bootstrap.
    """
    domains = {layer: domain(layer) for layer in fits.layers}
    first = next(iter(domains.values()))
    group, label = first.group, first.hallucinated
    folds = [np.unique(group[test]) for test in fits.cv.folds.test.numpy()]
    strengths = {layer: float(fits.cv.final_strengths[place]) for place, layer in enumerate(fits.layers)}
    bare = [one for one in names if one != "procrustes"]

    fitted: dict[tuple[int, str], dict[int, Classifier]] = {}

    def carried(a: int, b: int, aligner: Aligner, name: str) -> Interval:
        known = fitted.setdefault((a, name), {}) if name in SOURCE_ALONE else None
        found = transferred(domains[a], domains[b], aligner, folds, options, strengths[a], known)
        return auroc_interval(found.scores, label, group, n_resamples=n_resamples, seed=options.seed)

    at_home = {layer: carried(layer, layer, _unpaired(no_alignment), "none") for layer in domains}
    rows = []
    for a, source in domains.items():
        for b, target in domains.items():
            if a == b:
                found = {("itself", float("nan")): at_home[a]}
            else:
                ways = aligners(source, target, bare, components)
                if "procrustes" in names:
                    keys = list(range(len(group)))
                    pairs = [(keys, group, one.states[:, None]) for one in (source, target)]
                    ways["procrustes", float("nan")] = _paired(*pairs)
                found = {way: carried(a, b, aligner, way[0]) for way, aligner in ways.items()}
            bound = at_home[b]
            for (name, k), one in found.items():
                rows.append(
                    (a, b, name, k, one.value, one.low, one.high, bound.value, bound.low, bound.high, 0.5, one.n)
                )
    return pd.DataFrame(
        rows,
        columns=[
            "source_layer", "target_layer", "alignment", "components", "auroc", "low", "high", "target_trained",
            "target_trained_low", "target_trained_high", "chance", "n_items",
        ],
    )  # fmt: skip
