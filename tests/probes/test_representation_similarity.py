"""Similarities by hand and by other formulas, planted equal and unrelated geometries, and the matching at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.cross_decomposition import CCA
from sklearn.neighbors import NearestNeighbors

from probes import RepresentationSimilarity
from probes.similarity import linear_cka, measured, mutual_knn, procrustes, random_matching, svcca, unbiased_cka
from slitlamp.errors import InputError, UnknownNameError
from slitlamp.reports.style import NARROW
from slitlamp.tracing import Part
from slitlamp.vlm import VLM

ALL = [linear_cka, unbiased_cka, svcca, procrustes, mutual_knn]


def pair(n: int = 60, d: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=rng, dtype=torch.float64)
    return x, 0.7 * x[:, :4] + torch.randn(n, 4, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("measure", ALL)
def test_rotation_scale_and_shift_change_nothing(measure: Any) -> None:
    x, _ = pair()
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    assert measure(x, 3 * x @ rotation + 2) == pytest.approx(1, abs=1e-9)
    assert measure(*pair()) == pytest.approx(measure(*pair()[::-1]), abs=1e-9)
    assert measure(*pair()) < 0.9


def test_cka_is_the_cosine_of_centred_gram_matrices() -> None:
    x, y = pair()
    centre = np.eye(60) - 1 / 60
    grams = [centre @ (one @ one.T).numpy() @ centre for one in (x, y)]
    cosine = (grams[0] * grams[1]).sum() / (np.linalg.norm(grams[0]) * np.linalg.norm(grams[1]))
    assert linear_cka(x, y) == pytest.approx(cosine)


def test_unbiased_cka_is_zero_on_average_where_cka_is_not() -> None:
    """Unrelated states of 20 items in 30 dimensions: the mean of 100 unbiased values is within three errors of 0."""
    rng = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, 20, 30, generator=rng, dtype=torch.float64) for _ in range(100)]
    found = np.array([unbiased_cka(*one) for one in draws])
    assert abs(found.mean()) < 3 * found.std() / 10
    assert np.mean([linear_cka(*one) for one in draws]) > 0.4


def test_svcca_equals_scikit_learn_when_all_variance_is_kept() -> None:
    x, y = pair()
    fit = CCA(n_components=4, tol=1e-12, max_iter=5000).fit(x.numpy(), y.numpy())
    a, b = fit.transform(x.numpy(), y.numpy())
    wanted = np.mean([np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(4)])
    assert svcca(x, y, 1.0) == pytest.approx(wanted, abs=1e-6)
    noisy = torch.cat(
        [x, 1e-4 * torch.randn(60, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))], 1
    )
    assert svcca(noisy, y, 0.99) == pytest.approx(svcca(x, y, 0.99), abs=1e-3)  # the small component is left out


def test_procrustes_equals_scipy() -> None:
    x, _ = pair()
    y = x + pair(seed=3)[0]
    a, b = (one - one.mean(dim=0) for one in (x, y))
    a, b = (one / one.norm() for one in (a, b))
    rotation, _ = orthogonal_procrustes(a.numpy(), b.numpy())
    distance = np.linalg.norm(a.numpy() @ rotation - b.numpy())
    assert procrustes(x, y) == pytest.approx(1 - distance**2 / 2)


def test_mutual_neighbours_equal_scikit_learn() -> None:
    x, y = pair()
    near = []
    for one in (x, y):
        centred = (one - one.mean(dim=0)).numpy()
        model = NearestNeighbors(n_neighbors=6, metric="cosine").fit(centred)
        near.append([set(row) - {i} for i, row in enumerate(model.kneighbors(centred)[1])])
    wanted = np.mean([len(a & b) / 5 for a, b in zip(*near, strict=True)])
    assert mutual_knn(x, y, 5) == pytest.approx(wanted)
    with pytest.raises(InputError, match="more items than neighbours"):
        mutual_knn(x[:5], y[:5], 5)


def test_jackknife_by_hand_and_null_of_the_matching() -> None:
    """The mean of x as "similarity" of single items: the jackknife's error is the standard error of the mean."""
    x = torch.arange(8.0)[:, None]
    found = measured(x, x, lambda a, b: float(a.mean()), np.arange(8), [torch.arange(8)] * 3)
    error = np.std(np.arange(8), ddof=1) / 8**0.5
    assert found.high - found.value == pytest.approx(2.364624 * error, rel=1e-5)  # t of 7 degrees of freedom
    assert (found.null, found.p) == (3.5, 1.0)


def test_items_of_an_image_are_matched_together() -> None:
    """Two items of each image, in mixed order: in every matching both go to the two of one image, each image once."""
    group = np.array([0, 2, 1, 0, 1, 2, 3, 3])
    seen = set()
    for seed in range(20):
        order = random_matching(group, np.random.default_rng(seed)).numpy()
        assert sorted(order) == list(range(8))
        went = [{int(group[one]) for one in order[group == image]} for image in range(4)]
        assert all(len(one) == 1 for one in went)
        seen.add(tuple(one.pop() for one in went))
    assert len(seen) > 5  # and not always the same


def test_equal_states_of_an_image_are_no_similarity_of_models() -> None:
    """Six questions about each of ten images, whose states depend on the image alone, and two models that have nothing in
    common: neighbours are those of the image in both, so that most are shared, and as many when images are matched at random.
    """
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(10), 6)
    first, other = (rng.normal(size=(10, 4))[image] + 1e-3 * rng.normal(size=(60, 4)) for _ in range(2))
    names = np.array([f"q{i}" for i in range(60)])
    probes = []
    for states in (first, other):
        probe = RepresentationSimilarity(k=5, measures=["mutual_knn"])
        probe.load_state(
            {
                "constants.layer": np.array([0]), "rows.item": names, "rows.group": np.array([f"i{i}" for i in image]),
                "rows.state": states[:, None].astype(np.float32),
            }
        )  # fmt: skip
        probes.append(probe)
    found = RepresentationSimilarity.compare(
        {Part(name, "c", "d"): one for name, one in zip("ab", probes, strict=True)}
    )
    assert found is not None
    row = found.tables["models"].iloc[0]
    assert row["value"] > 0.95
    assert row["null"] > 0.95
    assert row["p"] > 0.05
    assert row["high"] <= 1


def test_unrelated_states_are_significant_as_often_as_they_should_be() -> None:
    """100 pairs at level 1/10 with 9 matchings: more than 19 has p < .2 %."""
    small = 0
    for seed in range(100):
        x, y = pair(25, seed=seed)[0], pair(25, seed=1000 + seed)[0]
        rng = np.random.default_rng(seed)
        orders = [torch.from_numpy(rng.permutation(25)) for _ in range(9)]
        small += measured(x, y, linear_cka, np.arange(25) % 5, orders).p <= 0.1
    assert small <= 19


def holding(states: Any, layers: list[int]) -> RepresentationSimilarity:
    probe = RepresentationSimilarity(k=3)
    names = np.array([f"i{i}" for i in range(len(states))])
    probe.load_state(
        {"constants.layer": np.array(layers), "rows.item": names, "rows.group": names, "rows.state": np.asarray(states)}
    )
    return probe


def test_planted_layers_and_models() -> None:
    """Layer 1 is layer 0 rotated, layer 2 unrelated; the second model holds a rotated layer 2 and items in another order."""
    rng = np.random.default_rng(0)
    base, other = rng.normal(size=(2, 50, 4)).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0].astype(np.float32)
    first = holding(np.stack([base, base @ rotation, other], axis=1), [0, 1, 2])
    result = first.result()
    table = result.tables["layers"].set_index(["measure", "layer_a", "layer_b"])
    for measure in ("cka", "cka_unbiased", "svcca", "procrustes", "mutual_knn"):
        same, apart = table.loc[(measure, 0, 1)], table.loc[(measure, 0, 2)]
        assert same["value"] == pytest.approx(1, abs=1e-4)
        assert same["p"] == 1 / 20
        assert apart["value"] <= apart["null_high"] + 0.1
    second = holding(np.stack([other @ rotation, rng.normal(size=(50, 4))], axis=1).astype(np.float32)[::-1], [0, 5])
    second._gathered["rows.item"] = [first._get("item")[::-1]]
    parts = {Part("a", "c", "d"): first, Part("b", "c", "d"): second}
    joined = RepresentationSimilarity.compare(parts)
    assert joined is not None
    models = joined.tables["models"].set_index(["measure", "layer_a", "layer_b"]).sort_index()
    assert models.loc[("cka", 2, 0), "value"] == pytest.approx(1, abs=1e-4)
    assert models.loc[("cka", 2, 5), "value"] < 0.5
    assert "layers 2 and 0" in joined.summary
    assert RepresentationSimilarity.compare({Part("a", "c", "d"): first}) is None
    from slitlamp.reports.representation_similarity import FIGURES

    for tables, name in ((result.tables, "layers"), (joined.tables, "models")):
        for width in (6.6, NARROW):
            figure = FIGURES[name].draw(tables, width)
            assert figure is not None
            assert len(figure.axes) == 5
            assert "50 items" in FIGURES[name].caption(tables)
    drawn = FIGURES["models"].draw(joined.tables)
    assert drawn is not None
    values = np.asarray(drawn.axes[0].collections[0].get_array()).ravel()
    np.testing.assert_allclose(values, models.loc["cka", "value"].to_numpy(float))
    assert FIGURES["models"].draw(result.tables) is None


@pytest.mark.parametrize("position", ["last", "image_mean", "text_mean"])
def test_states_are_those_that_were_asked_for(position: Any, llava: VLM, image: Any) -> None:
    """Against Hugging Face's hidden states of every row by itself; the text after the image is also what was generated."""
    prompts, generated = ["<image> is there a dog ?", "describe this <image> ."], [[6, 7], [8]]
    probe = RepresentationSimilarity(position=position, layers=[0, 1])
    llava.measure(probe, llava.encode([image(0), image(1)], prompts).with_continuation(generated))
    for row in range(2):
        alone = llava.encode([image(row)], [prompts[row]]).with_continuation([generated[row]])
        hidden = llava.model(**alone.inputs(), output_hidden_states=True).hidden_states
        wanted = {"image_mean": alone.image_mask[0], "text_mean": alone.text_after_image_mask[0]}.get(position)
        for layer in (0, 1):
            states = hidden[layer + 1][0]
            last = len(states) - len(generated[row]) - 1
            expected = states[last] if wanted is None else states[wanted].mean(dim=0)
            np.testing.assert_allclose(probe._get("state")[row, layer], expected.detach(), rtol=1e-3, atol=1e-5)


def test_unusable_parameters_are_refused(llava: VLM) -> None:
    for parameters, match in (
        ({"measures": ["ckaa"]}, "cka"),
        ({"position": "cls"}, "last"),
        ({"site": "resid"}, "resid_post"),
    ):
        with pytest.raises(UnknownNameError, match=match):
            RepresentationSimilarity(**parameters).sites(llava.anatomy)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="n_parts"):
        RepresentationSimilarity(n_parts=1).sites(llava.anatomy)
    with pytest.raises(InputError, match="at least four"):
        unbiased_cka(*pair(3))
