"""How alike two sets of states of the same items are: linear CKA, SVCCA, Procrustes, mutual nearest neighbours.

All take x [item, d] and y [item, e] with rows of the same items, centre them, and give 1 for equal geometry. None is 0 for
unrelated states of few items: the value for items matched at random belongs beside each (`measured`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slitlamp.errors import InputError
from slitlamp.evaluation.jackknife import group_jackknife
from slitlamp.evaluation.permutation import exceedance_p
from slitlamp.evaluation.statistics import FloatArray

MEASURES = ("cka", "cka_unbiased", "svcca", "procrustes", "mutual_knn")


def linear_cka(x: Tensor, y: Tensor) -> float:
    """||Y'X||^2 / (||X'X|| ||Y'Y||), Frobenius norms of centred states (Kornblith et al., ICML 2019, eq. 6)."""
    a, b = x - x.mean(dim=0), y - y.mean(dim=0)
    return _share((b.T @ a).square().sum(), (a.T @ a).norm() * (b.T @ b).norm())


def unbiased_cka(x: Tensor, y: Tensor) -> float:
    """CKA with the unbiased estimate of HSIC (Song et al., JMLR 2012, eq. 5), which is 0 on average for unrelated states.

    Raises:
        InputError: fewer than four items.
    """
    if len(x) < 4:
        raise InputError(f"unbiased CKA needs at least four items: found {len(x)}")
    a, b = (one @ one.T for one in (x - x.mean(dim=0), y - y.mean(dim=0)))
    return _share(_hsic(a, b), (_hsic(a, a) * _hsic(b, b)).clamp_min(0).sqrt())


def _hsic(a: Tensor, b: Tensor) -> Tensor:
    n = len(a)
    a, b = a - torch.diag(a.diagonal()), b - torch.diag(b.diagonal())
    rows, columns = a.sum(dim=0), b.sum(dim=0)
    return ((a * b).sum() + rows.sum() * columns.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ columns)) / (
        n * (n - 3)
    )


def svcca(x: Tensor, y: Tensor, share: float = 0.99) -> float:
    """Mean canonical correlation of the components that hold `share` of the variance (Raghu et al., NeurIPS 2017)."""
    bases = []
    for one in (x, y):
        vectors, values, _ = torch.linalg.svd(one - one.mean(dim=0), full_matrices=False)
        held = values.square().cumsum(0) / values.square().sum().clamp_min(1e-30)
        bases.append(vectors[:, : int((held < share).sum()) + 1])
    return float(torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(max=1).mean())


def procrustes(x: Tensor, y: Tensor) -> float:
    """1 - d^2 / 2, d the distance after the best rotation of centred states of norm 1: ||X'Y|| nuclear (Ding et al., 2021)."""
    a, b = x - x.mean(dim=0), y - y.mean(dim=0)
    return _share(torch.linalg.svdvals(a.T @ b).sum(), a.norm() * b.norm())


def mutual_knn(x: Tensor, y: Tensor, k: int = 10) -> float:
    """Mean share of the k nearest items by cosine that both have (Huh et al., ICML 2024); chance is k / (items - 1).

    Raises:
        InputError: no more than k items.
    """
    if not 1 <= k < len(x):
        raise InputError(f"mutual_knn needs more items than neighbours: found {len(x)} items, k = {k}")
    near = []
    for one in (x, y):
        unit = torch.nn.functional.normalize(one - one.mean(dim=0), dim=1)
        cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
        near.append(torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, cosine.topk(k, dim=1).indices, True))
    return float((near[0] & near[1]).sum() / (k * len(x)))


def _share(value: Tensor, whole: Tensor) -> float:
    return float(value / whole) if float(whole) > 0 else float("nan")


def random_matching(group: NDArray[np.intp], rng: np.random.Generator) -> Tensor:
    """An order of items [item] that matches them at random, the items of a group to neighbours in another.

    Items of one image are alike. Were they matched one by one, that would be broken, and any real matching of images would
    look like more than chance.

    Args:
        group: [item], the number of the group of each item, from 0.
        rng: of the matching.
    """
    order = np.empty(len(group), dtype=np.int64)
    shuffled = rng.permutation(group.max() + 1)[group]
    order[np.argsort(group, kind="stable")] = np.argsort(shuffled, kind="stable")
    return torch.from_numpy(order)


@dataclass(frozen=True)
class Similarity:
    """A similarity, its jackknife interval over groups, and what randomly matched items give: mean, 95 % quantile, and p."""

    value: float
    low: float
    high: float
    null: float
    null_high: float
    p: float


def measured(
    x: Tensor,
    y: Tensor,
    measure: Callable[[Tensor, Tensor], float],
    part: FloatArray,
    permutations: list[Tensor],
    level: float = 0.95,
) -> Similarity:
    """Measure a similarity.

    A bootstrap would draw items twice, and a copy is its own neighbour; so the interval is the jackknife's, which leaves out one
    part at a time (`group_jackknife`).

    Args:
        x, y: states of the same items.
        measure: their similarity.
        part: [item], which part an item is left out with; whole images.
        permutations: orders of the items that match them at random.
        level: of the interval.
    """
    value = measure(x, y)
    parts, sizes = np.unique(part, return_counts=True)
    low = high = float("nan")
    if len(parts) > 2:  # of two, one alone is left, which has no geometry
        left = [measure(x[torch.from_numpy(part != one)], y[torch.from_numpy(part != one)]) for one in parts]
        interval = group_jackknife(value, left, sizes, level=level)
        low, high = interval.low, interval.high
    null = np.array([measure(x, y[order]) for order in permutations])
    mean, upper = (float(null.mean()), float(np.quantile(null, 0.95))) if len(null) else (np.nan, np.nan)
    return Similarity(value, low, high, mean, upper, float(exceedance_p(value, null)))
