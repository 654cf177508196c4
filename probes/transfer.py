"""How to carry a probe from one space of states to another: subspace alignment, CORAL, Procrustes.

All formulas give an `Alignment`: an affine map for each of the two domains into one common space, in which a probe trained on
mapped source states is applied to mapped target states. Only Procrustes takes spaces of unequal width. None reads a label.

ComnHallu (Duan et al., ICCV 2025, arXiv 2503.10602) is subspace alignment of hidden states; its authors' code is not public, so
the steps follow Fernando et al. (ICCV 2013), on which it is built [?].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slitlamp.errors import InputError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """x [..., d] to (x - mean) / scale @ matrix [..., k]; without a matrix the axes stay as they are."""

    mean: FloatArray
    scale: FloatArray
    matrix: FloatArray | None = None

    def __call__(self, x: ArrayLike) -> FloatArray:
        """The mapped states."""
        standard = (np.asarray(x, dtype=np.float64) - self.mean) / self.scale
        return standard if self.matrix is None else standard @ self.matrix


@dataclass(frozen=True)
class Alignment:
    """The maps of both domains into the common space."""

    source: Affine
    target: Affine


def no_alignment(source: ArrayLike, target: ArrayLike) -> Alignment:
    """Both domains as they are: the source's probe is applied to raw target states.

    Raises:
        InputError: domains of unequal width.
    """
    d = _width(source, target, "no alignment")
    identity = Affine(np.zeros(d), np.ones(d))
    return Alignment(identity, identity)


def standardised(source: ArrayLike, target: ArrayLike) -> Alignment:
    """Each domain standardised by its own mean and standard deviation, without rotation.

    It is the first step of subspace alignment and of CORAL, and stands beside them to show what the step after it adds.

    Raises:
        InputError: domains of unequal width.
    """
    _width(source, target, "standardising")
    return Alignment(_standard(source), _standard(target))


def subspace_alignment(source: ArrayLike, target: ArrayLike, n_components: int) -> Alignment:
    """Subspace alignment (Fernando et al. 2013, eq. 4): source @ B_s @ (B_s^T B_t), target @ B_t.

    B_s and B_t [d, n_components] are the leading eigenvectors of the covariances of the standardised domains.

    Args:
        source, target: states [sample, d], unlabelled.
        n_components: d', no more than the rank of either domain.

    Raises:
        InputError: domains of unequal width, or more components than a domain has.
    """
    d = _width(source, target, "subspace alignment")
    first, second = _standard(source), _standard(target)
    limit = min(d, len(np.asarray(source)) - 1, len(np.asarray(target)) - 1)
    if not 1 <= n_components <= limit:
        raise InputError(f"n_components must lie between 1 and {limit} (width and samples): found {n_components}")
    basis_s = principal_directions(first(source), n_components)
    basis_t = principal_directions(second(target), n_components)
    return Alignment(
        Affine(first.mean, first.scale, basis_s @ (basis_s.T @ basis_t)), Affine(second.mean, second.scale, basis_t)
    )


def coral(source: ArrayLike, target: ArrayLike, ridge: float = 1.0) -> Alignment:
    """CORAL (Sun et al., AAAI 2016, algorithm 1): source @ C_s^(-1/2) @ C_t^(1/2), with C = covariance + ridge * identity.

    Args:
        source, target: states [sample, d], unlabelled; standardised here, as in the paper.
        ridge: the paper's is 1.

    Raises:
        InputError: domains of unequal width, or a ridge that is not positive.
    """
    _width(source, target, "CORAL")
    if not ridge > 0:
        raise InputError(f"ridge must be positive: found {ridge}")
    first, second = _standard(source), _standard(target)
    white = _power(first(source), ridge, -0.5)
    coloured = _power(second(target), ridge, 0.5)
    return Alignment(Affine(first.mean, first.scale, white @ coloured), second)


def procrustes(source: ArrayLike, target: ArrayLike, source_anchors: ArrayLike, target_anchors: ArrayLike) -> Alignment:
    """The rotation (and one scale) that brings source anchors onto target anchors; widths may differ.

    R minimises |A_s R - A_t| over matrices with orthonormal rows or columns: R = U V^T of the singular value decomposition
    of A_s^T A_t (Schoenemann 1966). The anchors are centred on their own means for it. States are centred on the means of
    their own domains, which need no label: where anchors are other positions than the states, their means say nothing of
    the states'.

    Directions that the anchors do not span have no counterpart and are dropped (the decomposition would send them anywhere):
    few anchors carry few directions. The rank of the source's matrix says how many.

    Args:
        source: [sample, d_s], target: [sample, d_t], states of the domains.
        source_anchors: [pair, d_s], target_anchors: [pair, d_t], states of the same things in both.

    Raises:
        InputError: anchors that are not paired, fewer than two pairs, or other widths than the states.
    """
    states = [np.asarray(one, dtype=np.float64) for one in (source, target)]
    anchors = [np.asarray(one, dtype=np.float64) for one in (source_anchors, target_anchors)]
    if len(anchors[0]) != len(anchors[1]) or len(anchors[0]) < 2:
        raise InputError(
            f"Procrustes needs two or more pairs of anchors: found {len(anchors[0])} and {len(anchors[1])}"
        )
    for one, anchor in zip(states, anchors, strict=True):
        if one.shape[1] != anchor.shape[1]:
            raise InputError(f"anchors of width {anchor.shape[1]} for states of width {one.shape[1]}")
    a, b = (one - one.mean(axis=0) for one in anchors)
    left, singular, right = np.linalg.svd(a.T @ b, full_matrices=False)
    known = singular > singular[0] * max(a.shape) * np.finfo(np.float64).eps
    left, right = left[:, known], right[known]
    scale = singular.sum() / max(float(np.square(a @ left).sum()), np.finfo(np.float64).tiny)
    means = [one.mean(axis=0) for one in states]
    return Alignment(
        Affine(means[0], np.ones(len(means[0])), scale * left @ right), Affine(means[1], np.ones(len(means[1])))
    )


def pair_anchors(source: Iterable[Any], target: Iterable[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of two lists of keys that name the same thing: (rows of source, rows of target), in the order of the source.

    A key that occurs several times on a side stands for its first row there.
    """
    first: dict[Any, int] = {}
    for row, key in enumerate(target):
        first.setdefault(key, row)
    pairs: dict[Any, tuple[int, int]] = {}
    for row, key in enumerate(source):
        if key in first:
            pairs.setdefault(key, (row, first[key]))
    found = np.array(list(pairs.values()), dtype=np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def principal_directions(x: ArrayLike, n_components: int) -> FloatArray:
    """The leading eigenvectors [d, n_components] of the covariance of x [sample, d]."""
    states = np.asarray(x, dtype=np.float64)
    centred = states - states.mean(axis=0)
    n, d = centred.shape
    if n <= d:  # fewer samples than dimensions: the small matrix has the same spectrum
        return np.asarray(np.linalg.svd(centred, full_matrices=False)[2][:n_components].T)
    vectors = np.linalg.eigh(centred.T @ centred)[1]
    return np.asarray(vectors[:, ::-1][:, :n_components])


def _standard(x: ArrayLike) -> Affine:
    """Mean and standard deviation of each dimension of x [sample, d]; a constant one is not scaled."""
    states = np.asarray(x, dtype=np.float64)
    spread = states.std(axis=0)
    return Affine(states.mean(axis=0), np.where(spread > 1e-9 * (1 + np.abs(states).max(axis=0)), spread, 1.0))


def _power(x: FloatArray, ridge: float, exponent: float) -> FloatArray:
    """(covariance + ridge * identity) ** exponent, [d, d]."""
    values, vectors = np.linalg.eigh(np.cov(x, rowvar=False).reshape(x.shape[1], -1) + ridge * np.eye(x.shape[1]))
    return np.asarray(vectors * values**exponent @ vectors.T)


def _width(source: ArrayLike, target: ArrayLike, what: str) -> int:
    shapes = np.shape(source), np.shape(target)
    if any(len(one) != 2 or one[0] < 2 for one in shapes):
        raise InputError(f"{what} takes states [sample, d], two or more of each domain: found {shapes[0]}, {shapes[1]}")
    if shapes[0][1] != shapes[1][1]:
        raise InputError(
            f"{what} needs equal widths, found {shapes[0][1]} and {shapes[1][1]}: align through paired anchors (procrustes)"
        )
    return int(shapes[0][1])
