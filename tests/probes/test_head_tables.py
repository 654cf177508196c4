"""The tables of head divergence against hand-worked cases, plain loops, planted truths and nulls."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from probes.head_ablation import head_targets
from probes.head_agreement import agreement_of_means, chance_overlap, pairwise_agreement, top_heads
from probes.head_consistency import consistency_tables
from probes.head_contrasts import contrast_tables, outlier_table
from probes.head_prior import prior_tables, prior_values
from probes.head_tokens import Bootstrap, areas, means_by_label, sentences, with_mention
from slitlamp.errors import InputError

BOOTSTRAP = Bootstrap(n_resamples=200, seed=0)


# -- agreement of maps ------------------------------------------------------------------------------------------------


def maps_of(n: int, n_heads: int = 12, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(n, n_heads))


def jaccard(one: np.ndarray[Any, Any], two: np.ndarray[Any, Any], k: int) -> float:
    sets = [set(np.argsort(-each)[:k]) for each in (one, two)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_agreement_equals_a_loop_over_pairs() -> None:
    """Six maps of three items: pairs of different items, and of the same item, by scipy and Python's sets."""
    maps, groups = maps_of(6), np.array(["a", "a", "b", "b", "b", "c"])
    for same in (False, True):
        pairs = [(i, j) for i, j in combinations(range(6), 2) if (groups[i] == groups[j]) == same]
        found = pairwise_agreement(maps, groups, k=3, same_item=same, n_resamples=20)
        assert found.spearman.value == pytest.approx(np.mean([spearmanr(maps[i], maps[j]).statistic for i, j in pairs]))
        assert found.overlap.value == pytest.approx(np.mean([jaccard(maps[i], maps[j], 3) for i, j in pairs]))
        assert (found.n_maps, found.n_items) == (6, 3)


def test_agreement_across_two_kinds_of_maps() -> None:
    maps, others = maps_of(3), maps_of(4, seed=1)
    groups, other_groups = np.array(["a", "b", "c"]), np.array(["b", "c", "c", "d"])
    for same in (False, True):
        pairs = [(i, j) for i in range(3) for j in range(4) if (groups[i] == other_groups[j]) == same]
        found = pairwise_agreement(maps, groups, others, other_groups, k=3, same_item=same, n_resamples=20)
        expected = np.mean([spearmanr(maps[i], others[j]).statistic for i, j in pairs])
        assert found.spearman.value == pytest.approx(expected)
    means = agreement_of_means(maps, groups, others, other_groups, k=3, n_resamples=20)
    assert means.spearman.value == pytest.approx(spearmanr(maps.mean(axis=0), others.mean(axis=0)).statistic)
    assert means.overlap.value == pytest.approx(jaccard(maps.mean(axis=0), others.mean(axis=0), 3))


def test_chance_overlap_by_hand_and_by_simulation() -> None:
    """Two of three heads twice: one shared head always, or both: shares 2/3 and 1/3, Jaccard 1/3 and 1."""
    assert chance_overlap(3, 2) == pytest.approx(2 / 3 * 1 / 3 + 1 / 3)
    assert chance_overlap(5, 5) == pytest.approx(1)
    maps = maps_of(4000, 48)
    simulated = np.mean([jaccard(maps[2 * i], maps[2 * i + 1], 6) for i in range(2000)])
    assert chance_overlap(48, 6) == pytest.approx(simulated, abs=0.006)  # four standard errors of 2000 draws


def test_ties_and_constant_maps() -> None:
    assert top_heads(np.array([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [False, True, True, False]
    flat = np.ones((3, 4))
    found = pairwise_agreement(flat, np.array(["a", "b", "c"]), k=2, same_item=False, n_resamples=20)
    assert np.isnan(found.spearman.value)
    mixed = np.vstack([flat[:1], maps_of(2, 4)])
    found = pairwise_agreement(mixed, np.array(["a", "b", "c"]), k=2, same_item=False, n_resamples=20)
    assert found.spearman.value == pytest.approx(spearmanr(mixed[1], mixed[2]).statistic)


def test_random_maps_agree_as_chance_says() -> None:
    """The null: over 40 sets of random maps the 95 % interval misses chance seldom; more than 8 times has p < .001."""
    missed = np.zeros(2)
    for seed in range(40):
        maps, groups = maps_of(30, 48, seed), np.arange(30).astype(str)
        found = pairwise_agreement(maps, groups, k=6, same_item=False, n_resamples=300)
        missed += [
            not one.low <= chance <= one.high for one, chance in ((found.spearman, 0.0), (found.overlap, found.chance))
        ]
    assert missed.max() <= 8


def test_planted_consistency_is_found() -> None:
    """Items share one ranking at the first token; each has its own at its objects, the same for all of its objects."""
    rng = np.random.default_rng(0)
    shared, groups = rng.normal(size=48), np.arange(20).astype(str)
    own = rng.normal(size=(20, 48))
    first = (shared + 0.01 * rng.normal(size=(20, 48))).reshape(20, 6, 8)
    maps = np.repeat(own, 3, axis=0).reshape(60, 6, 8) + 0.01 * rng.normal(size=(60, 6, 8))
    tables = consistency_tables(
        first, groups, maps, np.repeat(groups, 3), np.tile([1, 2, 3], 20), k=6, bootstrap=BOOTSTRAP
    )
    table = tables["consistency"].set_index("comparison")
    assert table.loc["first token, between items", "low"] > 0.98
    assert table.loc["object mentions, within an item", "low"] > 0.98
    between = table.loc["object mentions, between items"]
    assert between["low"] < 0.05
    assert abs(between["spearman"]) < 0.05
    steps = tables["consistency_steps"]
    row = steps[(steps["step"] == 1) & (steps["other"] == 2)].set_index("same_item")
    assert row.loc[True, "spearman"] > 0.98
    assert abs(row.loc[False, "spearman"]) < 0.05


# -- contrasts and outliers ---------------------------------------------------------------------------------------------


def test_heads_that_change_between_contrasts() -> None:
    """Two contrasts agree in all heads but two, which swap the first and the last place."""
    base = np.arange(12.0).reshape(2, 6)
    swapped = base.copy()
    swapped[0, 0], swapped[1, 5] = 11.0, 0.0
    maps = np.stack([np.stack([base, swapped])] * 5)
    tables = contrast_tables(
        ["deleted", "zero"],
        maps,
        maps > 5,
        np.array([0, 1]),
        np.arange(5).astype(str),
        k=2,
        bootstrap=BOOTSTRAP,
    )
    other = tables["contrast_maps"].query("contrast == 'zero'")
    assert other.loc[other["changed"], ["layer", "head"]].values.tolist() == [[0, 0], [1, 5]]
    row = tables["contrasts"].set_index("level").loc["mean maps"]
    assert row["overlap"] == pytest.approx(1 / 3)
    assert row["spearman"] == pytest.approx(spearmanr(base.ravel(), swapped.ravel()).statistic)
    assert row["overlap_chance"] == pytest.approx(chance_overlap(12, 2))


def test_outlier_table_counts_heads_and_what_independence_would_give() -> None:
    counts = np.zeros((4, 1, 2, 3), dtype=np.int64)
    counts[:, 0, 0] = [[1, 2, 1], [1, 2, 1], [0, 2, 1], [0, 2, 1]]
    table = outlier_table(["deleted"], counts, np.array([3, 4]), np.arange(4).astype(str), 8, BOOTSTRAP)
    assert table["zeroed"].tolist() == [0.5, 0]
    assert table["expected"].tolist() == [2 / 8, 0]
    assert table["layer"].tolist() == [3, 4]
    assert table["low"].iloc[0] < 0.5 < table["high"].iloc[0]


# -- words and sentences ------------------------------------------------------------------------------------------------


def tokens_of(words: str, labels: dict[int, str], values: list[float], item: str = "a") -> pd.DataFrame:
    split = words.split()
    label = ["other"] * len(split)
    for place, one in labels.items():
        label[place] = one
    return pd.DataFrame(
        {"item": item, "group": item, "token": range(len(split)), "word": split, "label": label, "t_vhd_1": values}
    )


def test_sentences_by_hand() -> None:
    """Three sentences: a true object; a true and a hallucinated one; none."""
    tokens = tokens_of(
        "a dog . cat and cow! it rains", {1: "object", 3: "object", 5: "hallucinated"}, [1, 4, 1, 3, 0, 6, 2, 8]
    )
    found = sentences(tokens, ".!?", ["tokens", "objects"])
    whole = found[found["mean_over"] == "tokens"]
    assert whole[["sentence", "label", "n_tokens", "t_vhd_1"]].values.tolist() == [
        [0, "object", 3, 2.0],
        [1, "hallucinated", 3, 3.0],
        [2, "other", 2, 5.0],
    ]
    objects = found[found["mean_over"] == "objects"]
    assert objects[["label", "n_tokens", "t_vhd_1"]].values.tolist() == [["object", 1, 4.0], ["hallucinated", 2, 4.5]]


def test_sentences_of_two_captions_do_not_run_into_each_other() -> None:
    both = pd.concat(
        [tokens_of("a dog", {1: "object"}, [1, 2]), tokens_of("a cow", {1: "hallucinated"}, [3, 4], item="b")],
        ignore_index=True,
    )
    found = sentences(both, ".", ["tokens"])
    assert found[["item", "sentence", "label"]].values.tolist() == [["a", 0, "object"], ["b", 0, "hallucinated"]]


def simulated(n: int, effect: float, seed: int, drop: float = 0.0) -> pd.DataFrame:
    """Captions of four mentions; the later the more often hallucinated; T-VHD falls by `drop` a mention and by `effect`."""
    rng = np.random.default_rng(seed)
    place = np.tile(np.arange(4), n)
    bad = rng.random(4 * n) < 0.15 + 0.2 * place
    return pd.DataFrame(
        {
            "item": np.repeat(np.arange(n).astype(str), 4),
            "group": np.repeat(np.arange(n).astype(str), 4),
            "token": place,
            "word": "w",
            "label": np.where(bad, "hallucinated", "object"),
            "t_vhd_1": rng.normal(size=4 * n) - effect * bad - drop * place,
        }
    )


def test_planted_difference_is_found_and_the_place_is_told_from_it() -> None:
    """d' of 1.5 gives an area of .856; a fall along the caption alone gives one that vanishes once the place is taken out."""
    row = areas(with_mention(simulated(400, 1.5, 0)), BOOTSTRAP, "mention").iloc[0]
    assert row["low"] < 0.856 < row["high"]
    assert row["adjusted_low"] > 0.5
    row = areas(with_mention(simulated(400, 0.0, 0, drop=2.0)), BOOTSTRAP, "mention").iloc[0]
    assert row["low"] > 0.6
    assert row["adjusted_low"] < 0.5 < row["adjusted_high"]
    assert row["place_low"] > 0.6


def test_labels_at_random_give_intervals_that_hold_one_half() -> None:
    """The null for words and sentences: over 40 data sets the interval misses .5 about twice; more than 7 has p < .004."""
    missed = np.zeros(2)
    for seed in range(40):
        tokens = simulated(40, 0.0, seed)
        tokens["label"] = np.where(np.random.default_rng(seed + 100).random(160) < 0.4, "hallucinated", "object")
        row = areas(with_mention(tokens), Bootstrap(200, 0), "mention").iloc[0]
        missed[0] += not row["low"] <= 0.5 <= row["high"]
        missed[1] += not row["adjusted_low"] <= 0.5 <= row["adjusted_high"]
    assert missed.max() <= 7


def test_means_by_label_weigh_words_not_items() -> None:
    tokens = pd.concat(
        [tokens_of("x y z", {0: "object", 1: "object"}, [1, 2, 9]), tokens_of("x", {0: "object"}, [6], item="b")]
    )
    found = means_by_label(tokens, BOOTSTRAP, "tokens").set_index("label")
    assert found.loc["object", "mean"] == 3.0
    assert found.loc["object", ["n_tokens", "n_items"]].tolist() == [3, 2]


# -- language prior -----------------------------------------------------------------------------------------------------


def test_prior_values_by_hand() -> None:
    """p = (1/2, 1/2, 0) against q = (1/4, 3/4, 0): KL = ln 2 / 2 + ln(2/3) / 2 = .1438."""
    own = torch.tensor([[0.0, 0.0, -torch.inf]])
    free = torch.tensor([[0.25, 0.75, 0.0]]).log()
    found = prior_values(own, free, torch.tensor([1]))
    assert found["kl"].item() == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), abs=1e-6)
    assert found["log_p"].item() == pytest.approx(np.log(0.5))
    assert found["log_p_image_free"].item() == pytest.approx(np.log(0.75))
    assert found["top_image_free"].item() == 1


def test_prior_tables_share_and_its_chance() -> None:
    """Top tokens 1 1 2 2 with the image, 1 2 2 2 without: the same 3 of 4 times; by chance .5 x .25 + .5 x .75 = .5."""
    tokens = pd.DataFrame(
        {"group": list("aabb"), "token": [0, 1, 0, 1], "label": ["object", "other"] * 2, "kl": [1.0, 2.0, 3.0, 4.0],
         "log_p": [-1.0] * 4, "log_p_image_free": [-3.0] * 4, "top": [1, 1, 2, 2], "top_image_free": [1, 2, 2, 2]}
    )  # fmt: skip
    tables = prior_tables(tokens, BOOTSTRAP)
    row = tables["prior"].iloc[0]
    assert (row["same"], row["same_chance"], row["kl"], row["gain"]) == (0.75, 0.5, 2.5, 2.0)
    assert tables["prior"]["label"].tolist() == ["all", "object", "other"]
    assert tables["prior_place"]["kl"].tolist() == [2.0, 3.0]


def test_long_captions_are_binned() -> None:
    n = 40
    tokens = pd.DataFrame(
        {"group": "a", "token": range(n), "label": "other", "kl": 1.0, "log_p": -1.0, "log_p_image_free": -1.0,
         "top": 1, "top_image_free": 1}
    )  # fmt: skip
    places = prior_tables(tokens, BOOTSTRAP)["prior_place"]
    assert len(places) <= 16
    assert places["n_tokens"].sum() == n
    assert places["last"].iloc[-1] >= n - 1


# -- causal targets -----------------------------------------------------------------------------------------------------


def test_controls_match_the_targets_layer_by_layer() -> None:
    vhd = np.zeros((3, 8))
    vhd[0, :3], vhd[2, 5] = [9, 8, 7], 6
    targets = head_targets(
        vhd, np.array([1, 3, 5]), np.ones((3, 8, 4)), k=4, n_layers=6, seed=0, where="the first token"
    )
    assert len({edit.layer for edit in targets[0].target(None)}) == 2  # type: ignore[arg-type]
    drawn = []
    for control in targets[0].controls:
        values = {
            edit.layer: edit.function(torch.ones(1, 1, 8, 4), None)[0, 0, :, 0] == 0  # type: ignore[arg-type]
            for edit in control(None)  # type: ignore[arg-type]
        }
        assert {layer: int(one.sum()) for layer, one in values.items()} == {1: 3, 5: 1}
        assert not values[1][:3].any()  # heads other than the chosen ones
        assert not values[5][5]
        drawn.append(tuple(values[1].tolist()))
    assert len(set(drawn)) > 1


def test_controls_of_most_of_a_layer_take_all_the_others() -> None:
    """Six of eight heads chosen: each draw holds the two others and four of the chosen, and is never the chosen ones."""
    vhd = np.arange(8.0)[None]
    target = head_targets(vhd, np.array([0]), np.ones((1, 8, 4)), k=6, n_layers=1, seed=0, where="the first token")[0]
    assert "as far as there are" in target.control_name
    for control in target.controls:
        (edit,) = control(None)  # type: ignore[arg-type]
        zero = edit.function(torch.ones(1, 1, 8, 4), None)[0, 0, :, 0] == 0  # type: ignore[arg-type, union-attr]
        assert zero[:2].all()
        assert zero.sum() == 6
    with pytest.raises(InputError, match="all the heads of their layers"):
        head_targets(vhd, np.array([0]), np.ones((1, 8, 4)), k=8, n_layers=1, seed=0, where="the first token")
