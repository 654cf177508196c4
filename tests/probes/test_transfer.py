"""Alignments: by hand, against scikit-learn and scipy, and on planted rotations and shifts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes, sqrtm
from scipy.stats import ortho_group
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from probes.transfer import (
    coral,
    no_alignment,
    pair_anchors,
    principal_directions,
    procrustes,
    standardised,
    subspace_alignment,
)
from slitlamp.errors import InputError


@pytest.fixture
def domains() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(2, 6, 6))
    return rng.normal(size=(60, 6)) @ mix[0] + 3, rng.normal(size=(80, 6)) @ mix[1] - 1


def test_no_alignment_and_standardising_by_hand() -> None:
    source, target = np.array([[0.0, 5.0], [4.0, 5.0]]), np.array([[10.0, 1.0], [12.0, 3.0]])
    plain = no_alignment(source, target)
    assert plain.source(source).tolist() == source.tolist()
    assert plain.target(target).tolist() == target.tolist()
    scaled = standardised(source, target)
    assert scaled.source(source).tolist() == [[-1, 0], [1, 0]]  # mean 2, sd 2; the constant dimension is only centred
    assert scaled.target(target).tolist() == [[-1, -1], [1, 1]]


def test_subspace_alignment_is_the_formula_on_scikit_learns_components(domains: tuple[np.ndarray, np.ndarray]) -> None:
    """Fernando et al.: X_s B_s (B_s^T B_t) and X_t B_t. Signs of eigenvectors are free, so products are compared."""
    source, target = domains
    found = subspace_alignment(source, target, 3)
    x_s, x_t = (StandardScaler().fit_transform(one) for one in domains)
    b_s, b_t = (PCA(3).fit(one).components_.T for one in (x_s, x_t))
    ours, theirs = found.source(source) @ found.target(target).T, (x_s @ b_s @ b_s.T @ b_t) @ (x_t @ b_t).T
    np.testing.assert_allclose(ours, theirs, atol=1e-9)
    assert found.source(source).shape == (60, 3)


def test_principal_directions_of_few_and_of_many_samples_agree(domains: tuple[np.ndarray, np.ndarray]) -> None:
    """Six samples of six dimensions take the other way; the projector onto the subspace has no sign."""
    for x in (domains[0], domains[0][:6]):
        basis = principal_directions(x, 2)
        np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-9)
        theirs = PCA(2).fit(x).components_
        np.testing.assert_allclose(basis @ basis.T, theirs.T @ theirs, atol=1e-9)


def test_coral_is_the_formula_with_scipys_roots(domains: tuple[np.ndarray, np.ndarray]) -> None:
    source, target = domains
    x_s, x_t = (StandardScaler().fit_transform(one) for one in domains)
    c_s, c_t = (np.cov(one, rowvar=False) + np.eye(6) for one in (x_s, x_t))
    expected = x_s @ np.linalg.inv(sqrtm(c_s).real) @ sqrtm(c_t).real
    found = coral(source, target)
    np.testing.assert_allclose(found.source(source), expected, atol=1e-8)
    np.testing.assert_allclose(found.target(target), x_t, atol=1e-12)


def test_coral_without_ridge_gives_the_source_the_targets_covariance(domains: tuple[np.ndarray, np.ndarray]) -> None:
    source, target = domains
    found = coral(source, target, ridge=1e-9)
    np.testing.assert_allclose(
        np.cov(found.source(source), rowvar=False), np.cov(found.target(target), rowvar=False), atol=1e-5
    )


def test_procrustes_is_scipys_and_finds_a_planted_rotation(domains: tuple[np.ndarray, np.ndarray]) -> None:
    source, _ = domains
    rotation = ortho_group.rvs(6, random_state=1)
    target = 2.5 * (source - source.mean(axis=0)) @ rotation + 7
    found = procrustes(source, target, source[:20], target[:20])
    np.testing.assert_allclose(found.source(source), found.target(target), atol=1e-9)
    a, b = (one[:20] - one[:20].mean(axis=0) for one in (source, target))
    theirs, scale = orthogonal_procrustes(a, b)
    matrix = found.source.matrix
    assert matrix is not None
    np.testing.assert_allclose(matrix, theirs * scale / np.square(a).sum(), atol=1e-9)


def test_procrustes_between_unequal_widths_embeds_the_smaller() -> None:
    """The target is the source in another basis of a subspace of a wider space."""
    rng = np.random.default_rng(2)
    source = rng.normal(size=(50, 4))
    embedding = ortho_group.rvs(9, random_state=3)[:4]
    target = source @ embedding - 2
    there = procrustes(source, target, source[:30], target[:30])
    np.testing.assert_allclose(there.source(source), there.target(target), atol=1e-9)
    back = procrustes(target, source, target[:30], source[:30])
    np.testing.assert_allclose(back.source(target), back.target(source), atol=1e-9)


def test_procrustes_drops_what_the_anchors_do_not_span() -> None:
    """Three centred anchors span two directions; nothing else of the source can be placed."""
    rng = np.random.default_rng(4)
    source = rng.normal(size=(40, 6))
    found = procrustes(source, source, source[:3], source[:3])
    assert found.source.matrix is not None
    assert np.linalg.matrix_rank(found.source.matrix) == 2


def test_alignments_do_not_depend_on_the_order_of_samples(domains: tuple[np.ndarray, np.ndarray]) -> None:
    source, target = domains
    order = np.random.default_rng(5).permutation(len(source))
    for align in (standardised, coral, lambda s, t: subspace_alignment(s, t, 2)):
        one, other = align(source, target), align(source[order], target)
        gram = [found.source(source) @ found.target(target).T for found in (one, other)]
        np.testing.assert_allclose(*gram, atol=1e-8)


def test_pairs_are_first_occurrences_in_the_order_of_the_source() -> None:
    rows, others = pair_anchors(["b", "x", "a", "b"], ["a", "b", "b", "z"])
    assert rows.tolist() == [0, 2]
    assert others.tolist() == [1, 0]
    assert pair_anchors([], ["a"])[0].tolist() == []


def test_what_cannot_be_aligned_is_refused() -> None:
    rng = np.random.default_rng(0)
    narrow, wide = rng.normal(size=(9, 3)), rng.normal(size=(9, 4))
    for align in (no_alignment, standardised, coral, lambda s, t: subspace_alignment(s, t, 2)):
        with pytest.raises(InputError, match="equal widths"):
            align(narrow, wide)
    with pytest.raises(InputError, match="n_components"):
        subspace_alignment(narrow, narrow, 4)
    with pytest.raises(InputError, match="ridge"):
        coral(narrow, narrow, ridge=0)
    with pytest.raises(InputError, match="pairs"):
        procrustes(narrow, wide, narrow[:1], wide[:1])
    with pytest.raises(InputError, match="pairs"):
        procrustes(narrow, wide, narrow[:3], wide[:4])
    with pytest.raises(InputError, match="width"):
        procrustes(narrow, wide, wide[:4], wide[:4])
