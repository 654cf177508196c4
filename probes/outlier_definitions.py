"""Three definitions of outlier tokens, massive activations, and the valley of a histogram of norms."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.signal import argrelmax
from scipy.stats import gaussian_kde, hypergeom
from torch import Tensor

BINS_PER_DOUBLING = 16
FIRST_POWER, LAST_POWER = -14, 22
N_BINS = (LAST_POWER - FIRST_POWER) * BINS_PER_DOUBLING
"""Norms from 2^-14 to 2^22 in bins of 4.4 %; smaller and larger ones are counted in the first and the last."""


def top_tokens(values: Tensor, k: int) -> Tensor:
    """bool [..., token]: the k largest; all of them where there are no more than k."""
    k = min(k, values.shape[-1])
    mask = torch.zeros_like(values, dtype=torch.bool)
    return mask.scatter(-1, values.topk(k, dim=-1).indices, True)


def norm_outliers(norms: Tensor, n_sd: float = 2.0) -> Tensor:
    """bool [..., token]: norms above the image's mean + `n_sd` standard deviations (of the population, ddof 0)."""
    values = norms.double()
    return values > values.mean(dim=-1, keepdim=True) + n_sd * values.std(dim=-1, keepdim=True, correction=0)


def sink_score(states: Tensor, dimensions: Tensor) -> Tensor:
    """phi(x) = max over sink dimensions d of |x_d / RMS(x)| (Kang et al., "See what you are told", ICLR 2025).

    Args:
        states: [..., d_model].
        dimensions: int64 [dimension], not empty.

    Returns:
        float32 [...].
    """
    values = states.float()
    rms = values.square().mean(dim=-1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return values[..., dimensions.to(values.device)].abs().amax(dim=-1) / rms


@dataclass(frozen=True, eq=False)
class Massive:
    """The largest values of one hidden state [position, d], and which are massive.

    Attributes:
        largest: the largest absolute value, and its `position` and `dimension`.
        median: of the absolute values of the whole hidden state.
        count: bool [d], the dimensions in which some position is massive.
    """

    largest: float
    position: int
    dimension: int
    median: float
    dimensions: Tensor


def massive_activations(states: Tensor, value: float = 100.0, times: float = 1000.0) -> Massive:
    """Values above `value` and at least `times` the median of the hidden state, in absolute size (Sun et al., "Massive
    activations in large language models", COLM 2024).

    Args:
        states: [position, d], of the real positions of one item.
        value, times: the two limits.
    """
    size = states.float().abs()
    place = int(size.argmax())
    position, dimension = divmod(place, size.shape[-1])
    median = float(size.median())
    above = (size > value) & (size >= times * median)
    return Massive(float(size.max()), position, dimension, median, above.any(dim=0))


def norm_histogram(norms: Tensor) -> NDArray[np.float64]:
    """How many of the norms [..., token] fall into each bin: float64 [..., `N_BINS`]."""
    power = norms.double().clamp(min=2.0**FIRST_POWER).log2()
    index = ((power - FIRST_POWER) * BINS_PER_DOUBLING).floor().long().clamp(0, N_BINS - 1)
    counts = torch.zeros(*norms.shape[:-1], N_BINS, dtype=torch.float64, device=norms.device)
    found: NDArray[np.float64] = (
        counts.scatter_add(-1, index, torch.ones_like(norms, dtype=torch.float64)).cpu().numpy()
    )
    return found


def bin_edges() -> NDArray[np.float64]:
    """The edges [`N_BINS` + 1] of the bins of norms."""
    edges: NDArray[np.float64] = 2.0 ** (FIRST_POWER + np.arange(N_BINS + 1) / BINS_PER_DOUBLING)
    return edges


def norm_valley(counts: ArrayLike, depth: float = 0.5, share: float = 0.002, least: int = 10) -> float:
    """The norm at the valley between the two modes of a histogram of norms; NaN where there is one mode only.

    Darcet et al. ("Vision transformers need registers", ICLR 2024) read the valley off by eye. Here [?]: a Gaussian kernel
    density of log2(norm), its width by Silverman's rule (eq. 3.31, with the smaller of sd and IQR / 1.34); of all valleys
    between neighbouring modes, the one that is deepest beside the lower of the two. It counts if the density there is below
    `depth` times that of the lower mode, and the smaller side holds a `share` of all tokens and at least `least` of them.

    Args:
        counts: [`N_BINS`], from `norm_histogram`.
        depth, share, least: what counts as a valley.
    """
    weights = np.asarray(counts, dtype=np.float64)
    total = weights.sum()
    used = np.flatnonzero(weights)
    if total < 2 * least or len(used) < 3:
        return float("nan")
    centres = FIRST_POWER + (used + 0.5) / BINS_PER_DOUBLING
    held = weights[used]
    mean = float((centres * held).sum() / total)
    sd = float(np.sqrt((held * (centres - mean) ** 2).sum() / total))
    quarter, three = np.interp([0.25 * total, 0.75 * total], held.cumsum(), centres)
    spread = min(sd, (three - quarter) / 1.34) or sd
    width = max(0.9 * spread * total**-0.2, 1 / BINS_PER_DOUBLING)
    grid = np.arange(centres[0] - 3 * width, centres[-1] + 3 * width, width / 8)
    # gaussian_kde scales the covariance of the data, which one kernel of this width must not depend on
    density = gaussian_kde(centres, bw_method=width / np.sqrt(_covariance(centres, held)), weights=held)(grid)
    modes = argrelmax(density)[0]
    best, valley = depth, float("nan")
    for left, right in itertools.pairwise(modes):
        lowest = left + int(density[left : right + 1].argmin())
        smaller = min(held[centres <= grid[lowest]].sum(), held[centres > grid[lowest]].sum())
        relative = density[lowest] / min(density[left], density[right])
        if relative < best and smaller >= max(share * total, least):
            best, valley = relative, float(2.0 ** grid[lowest])
    return valley


def _covariance(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """As `gaussian_kde` computes it from weighted data."""
    return float(np.cov(values, bias=False, aweights=weights / weights.sum()))


def expected_jaccard(first: int, second: int, n: int) -> float:
    """The mean Jaccard index of two independent random sets of these sizes out of n; NaN where both are empty."""
    if first + second == 0:
        return float("nan")
    common = np.arange(min(first, second) + 1)
    chance = hypergeom.pmf(common, n, first, second)
    return float((chance * common / (first + second - common)).sum())


def matched_tokens(values: ArrayLike, chosen: ArrayLike) -> NDArray[np.bool_]:
    """As many other tokens, each the nearest in value to one of the chosen: the largest of those first; fewer where fewer
    are left.

    Args:
        values: [token], what is to be alike.
        chosen: bool [token].
    """
    value, mask = np.asarray(values, dtype=np.float64), np.asarray(chosen, dtype=bool)
    free, found = ~mask, np.zeros_like(mask)
    for token in sorted(np.flatnonzero(mask), key=lambda one: -value[one]):
        if not free.any():
            break
        left = np.flatnonzero(free)
        nearest = left[np.abs(value[left] - value[token]).argmin()]
        free[nearest], found[nearest] = False, True
    return found


def random_tokens(n: int, count: int, rng: np.random.Generator, avoid: ArrayLike | None = None) -> NDArray[np.bool_]:
    """`count` of n tokens at random, outside `avoid` (bool [token]) where enough are left."""
    mask = np.zeros(n, dtype=bool)
    left = np.arange(n) if avoid is None else np.flatnonzero(~np.asarray(avoid, dtype=bool))
    pool = left if len(left) >= count else np.arange(n)
    mask[rng.choice(pool, size=min(count, n), replace=False)] = True
    return mask
