"""Cross-validated classifiers of every layer: grouped folds, the penalty chosen inside the fold, controls, permutations.

One layer is in memory at a time. Folds, penalties, control labelings and permutations of a layer are fitted as one batch
(`probes.logistic_solver`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from torch import Tensor

from probes.folds import Folds, check_classes, grouped_folds
from probes.layer_fits import fit_layer, nested_training_sets
from probes.linear_directions import (
    DEFAULT_STRENGTHS,
    LinearFit,
    as_strengths,
    difference_of_means,
    fit_logistic,
)
from probes.logistic_solver import as_features
from probes.mlp_fits import MlpOptions
from slitlamp.errors import InputError, unknown
from slitlamp.evaluation.permutation import exceedance_p

__all__ = [
    "DEFAULT_STRENGTHS",
    "CrossValidated",
    "Folds",
    "LinearFit",
    "MlpOptions",
    "Method",
    "auroc",
    "cross_validated",
    "difference_of_means",
    "fit_logistic",
    "grouped_folds",
]

Method = Literal["logistic", "difference_of_means", "mlp"]
METHODS: tuple[str, ...] = ("logistic", "difference_of_means", "mlp")

_REDRAWS = 200

Layers = Callable[[int], Tensor] | Sequence[Tensor] | Tensor


@dataclass(frozen=True)
class CrossValidated:
    """Classifiers of every layer, each sample scored by the fold that did not see its group. All on the CPU.

    Attributes:
        method: how they were fitted.
        labels: bool [sample].
        folds: which samples were held out together.
        scores: [layer, sample] out-of-fold log-odds (difference of means: projections), with one intercept common to the
            folds: each fold's own depends on the labels it holds out, and would turn chance into an AUROC below 1/2.
        probabilities: [layer, sample] out of fold, of the positive class, with the fold's own intercept.
        auroc: [layer] of `scores`, all folds together. Without a signal it is not centred on 1/2 exactly: .483 in
            simulations with chosen penalties (320 samples), as the folds are each other's complement, and it varies more
            than independent scores would (sd .046 against .033). Permutations have the same, so `p` is not affected.
        strengths: [layer, fold] the penalty chosen inside each training fold; NaN for other methods than "logistic".
        final_strengths: [layer] the penalty of the fit on everything: least mean loss over all inner folds.
        directions: [layer, d] of the fit on everything, in raw feature units: `x @ directions[l] + intercepts[l]` are its
            scores; higher means positive. NaN for "mlp".
        intercepts: [layer].
        converged: bool [layer], whether all fits on true labels came to an end before `max_iter`.
        control_auroc: [layer, control] the same of labels drawn at random per type.
        null_auroc: [layer, permutation] the same of labels permuted across groups.
    """

    method: str
    labels: Tensor
    folds: Folds
    scores: Tensor
    probabilities: Tensor
    auroc: Tensor
    strengths: Tensor
    final_strengths: Tensor
    directions: Tensor
    intercepts: Tensor
    converged: Tensor
    control_auroc: Tensor
    null_auroc: Tensor

    @property
    def selectivity(self) -> Tensor:
        """[layer] AUROC minus the mean AUROC of the control labelings (Hewitt and Liang, 2019); NaN without controls."""
        if not self.control_auroc.shape[1]:
            return torch.full_like(self.auroc, float("nan"))
        return self.auroc - self.control_auroc.mean(dim=1)

    @property
    def p(self) -> Tensor:
        """[layer] share of permutations with at least this AUROC (`exceedance_p`); NaN without permutations."""
        return torch.from_numpy(exceedance_p(self.auroc, self.null_auroc))

    @property
    def p_any_layer(self) -> Tensor:
        """[layer] the same against the largest AUROC over the layers of each permutation: holds for all layers at once."""
        if not self.null_auroc.shape[1]:
            return torch.full_like(self.auroc, float("nan"))
        most = self.null_auroc.amax(dim=0)
        return torch.from_numpy(exceedance_p(self.auroc, most.expand(len(self.auroc), -1)))


def cross_validated(
    layer_states: Layers,
    labels: ArrayLike,
    groups: ArrayLike,
    *,
    method: Method = "logistic",
    strengths: Sequence[float] = DEFAULT_STRENGTHS,
    n_folds: int = 5,
    seed: int = 0,
    controls: int = 0,
    types: ArrayLike | None = None,
    permutations: int = 0,
    standardise: bool = True,
    n_layers: int | None = None,
    mlp: MlpOptions | None = None,
    tol: float = 1e-4,
    max_iter: int = 200,
    device: torch.device | str | None = None,
) -> CrossValidated:
    """Score every sample at every layer by a classifier that saw no sample of its group.

    The penalty of fold f is the one with the least mean log loss over the inner folds, which are the other outer folds:
    the fit without f and g, tested on g, for every g. It serves fold g as well (tested on f), so all inner folds together
    take n_folds (n_folds - 1) / 2 fits per penalty. Ties go to the stronger penalty.

    Args:
        layer_states: of each layer [sample, d]: a sequence, a tensor [layer, sample, d], or a function of the place of the
            layer (with `n_layers`), which is called once per layer so that one is in memory at a time.
        labels: bool [sample].
        groups: [sample]: samples of one group (image) are held out together.
        method: "logistic", "difference_of_means" (probabilities by a logistic fit of the training fold's scores) or "mlp".
        strengths: penalties lambda = 1 / C, see `fit_logistic`; one alone is taken as it is.
        n_folds, seed: of the folds; the seed also of controls, permutations and the MLP's weights.
        controls: number of control labelings: the labels of whole `types` drawn anew at the share of positives.
        types: [sample], such as the word; None for `groups`, where nothing can be carried over from training to test, so
            that the control must score 1/2.
        permutations: number of permutations of the labels across groups: the label sequences of whole groups are put in
            random order and laid over the samples again. Groups of equal size swap their labels; others shift, which
            keeps neighbours together. The whole procedure, with its choice of penalties, is done on each.
        standardise: by the training fold.
        n_layers: needed with a function.
        mlp: options of "mlp".
        tol, max_iter: of the logistic fits.
        device: where to compute; by default where the states are.

    Raises:
        InputError: shapes that do not fit, parameters that cannot be used, or a fold that lacks a class.
    """
    if method not in METHODS:
        raise unknown("method of fitting", method, METHODS)
    label, group = np.asarray(labels), np.asarray(groups)
    if label.ndim != 1 or not np.isin(label, (0, 1)).all():
        raise InputError(f"labels are [sample] of true and false: found shape {label.shape}, {label.dtype}")
    label = label.astype(bool)
    folds = grouped_folds(group, label, n_folds, seed)
    checked = as_strengths(strengths, torch.zeros(1))
    if method == "logistic" and len(checked) > 1 and n_folds < 3:
        raise InputError(
            "to choose a penalty inside the training fold takes n_folds of at least 3; or give one strength"
        )
    train = nested_training_sets(folds, inner=method == "logistic" and len(checked) > 1)
    check_classes(torch.from_numpy(label), train)
    rng = np.random.default_rng([seed, 7])
    kinds = group if types is None else np.asarray(types)
    if kinds.shape != label.shape:
        raise InputError(f"types are [sample] like the labels: found {kinds.shape} for {label.shape}")
    drawn = [_redrawn(lambda: _control(label, kinds, rng), train, "control labeling") for _ in range(controls)]
    drawn += [_redrawn(lambda: permuted(label, group, rng), train, "permutation") for _ in range(permutations)]
    targets = torch.from_numpy(np.stack([label, *drawn]))
    fits = []
    for states in _layers(layer_states, n_layers):
        x = as_features(torch.as_tensor(states) if device is None else torch.as_tensor(states).to(device))
        if len(x) != len(label):
            raise InputError(f"a layer has {len(x)} samples for {len(label)} labels")
        fits.append(
            fit_layer(x, targets, folds, method, checked, standardise, seed, mlp or MlpOptions(), tol, max_iter)
        )
        del states, x  # else this layer would stay in memory while the next one is made
    if not fits:
        raise InputError("cross_validated needs at least one layer")
    areas = torch.tensor(np.stack([auroc(one["scores"].numpy(), targets.numpy()) for one in fits]))
    stacked = {key: torch.stack([one[key] for one in fits]) for key in fits[0] if key != "scores"}
    return CrossValidated(
        method=method,
        labels=torch.from_numpy(label),
        folds=folds,
        scores=torch.stack([one["scores"][0] for one in fits]),
        auroc=areas[:, 0],
        control_auroc=areas[:, 1 : controls + 1],
        null_auroc=areas[:, controls + 1 :],
        **stacked,
    )


def auroc(scores: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Area under the ROC curve [...] of scores [..., sample] and labels bool [..., sample] or [sample]; ties count half."""
    score, label = np.broadcast_arrays(np.asarray(scores), np.asarray(labels, dtype=bool))
    positive = label.sum(axis=-1).astype(np.float64)
    negative = label.shape[-1] - positive
    ranks = np.where(label, rankdata(score, axis=-1), 0.0).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        area: NDArray[np.float64] = (ranks - positive * (positive + 1) / 2) / (positive * negative)
    return area


# -- labelings --------------------------------------------------------------------------------------------------------


def _control(label: NDArray[np.bool_], kinds: NDArray[Any], rng: np.random.Generator) -> NDArray[np.bool_]:
    """A label per type, true with the share of positives."""
    names, index = np.unique(kinds, return_inverse=True)
    drawn: NDArray[np.bool_] = (rng.random(len(names)) < label.mean())[index]
    return drawn


def permuted(label: NDArray[np.bool_], group: NDArray[Any], rng: np.random.Generator) -> NDArray[np.bool_]:
    """The label sequences of the groups in random order, laid over the samples group by group."""
    index = np.unique(group, return_inverse=True)[1]
    order = np.argsort(index, kind="stable")
    shuffled = rng.permutation(index.max() + 1)[index]
    permuted = np.empty_like(label)
    permuted[order] = label[np.argsort(shuffled, kind="stable")]
    return permuted


def _redrawn(draw: Callable[[], NDArray[np.bool_]], train: Tensor, what: str) -> NDArray[np.bool_]:
    """The first draw in which every training set has both classes, as it has with the true labels."""
    sets = train.numpy()
    for _ in range(_REDRAWS):
        drawn = draw()
        positive = (sets & drawn).sum(axis=1)
        if ((positive > 0) & (positive < sets.sum(axis=1))).all():
            return drawn
    raise InputError(
        f"no {what} in {_REDRAWS} draws left both classes in every fold: too few groups or types for so many folds"
    )


def _layers(layer_states: Layers, n_layers: int | None) -> Iterator[Tensor]:
    if callable(layer_states) and not isinstance(layer_states, Tensor):
        if n_layers is None:
            raise InputError("layer_states as a function needs n_layers")
        for layer in range(n_layers):
            yield layer_states(layer)
    else:
        yield from layer_states
