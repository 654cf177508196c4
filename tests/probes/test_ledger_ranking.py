"""The ranking of the token ledger on constructed rows whose answers are known, and on rows in which there is nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, norm, spearmanr
from sklearn.metrics import roc_auc_score

from probes import TokenLedger
from probes.ledger_combination import combined_scores, folds_of, out_of_fold
from probes.ledger_ranking import Detection, agreement_table, ranking_table, redundancy_table
from probes.ledger_signals import SIGNALS, chosen_signals
from slitlamp.errors import InputError
from slitlamp.reports.token_ledger import ledger_headline
from slitlamp.tracing import Part

Array = NDArray[Any]


def planted(
    columns: dict[str, Array], false: Array, image: Array, states: Array | None = None, **parameters: Any
) -> TokenLedger:
    """A ledger that has taken in these values of signals."""
    names = [name for name in SIGNALS if name in columns]
    chosen = [*names, *(["truthful_score"] if states is not None else [])]
    ordered = [name for name in SIGNALS if name in chosen]
    values = np.stack([columns.get(name, np.full(len(false), np.nan)) for name in ordered], axis=1)
    probe = TokenLedger(signals=ordered, **{"n_resamples": 300, **parameters})
    text = np.array([f"i{one}" for one in image])
    state = {
        "constants.signal": np.array(ordered),
        "rows.item": text,
        "rows.image": text,
        "rows.token": columns.get("position", np.tile(np.arange(10), len(false))[: len(false)]).astype(np.int64),
        "rows.mention": np.ones(len(false), dtype=np.int64),
        "rows.word": text,
        "rows.label": np.where(false, "hallucinated", "object"),
        "rows.category": text,
        "rows.frequency": columns.get("frequency", np.full(len(false), np.nan)),
        "rows.values": values.astype(np.float64),
    }
    probe.load_state(state | ({} if states is None else {"rows.state": states}))
    return probe


def ranking(probe: TokenLedger) -> pd.DataFrame:
    return probe.result().tables["ranking"].set_index("signal")


def test_label_plus_noise_has_the_auroc_of_the_closed_form() -> None:
    """x = label + N(0, s): AUROC = Phi(1 / (s sqrt 2)). 4,000 tokens: standard error .008 and less, margin four of them."""
    rng = np.random.default_rng(10)  # not the seed of the random number
    false, image = rng.random(4000) < 0.3, np.repeat(np.arange(400), 10)
    columns = {
        "surprisal": false + rng.normal(scale=0.5, size=4000),
        "margin": -1.0 * false + rng.normal(scale=2.0, size=4000),  # declared sign -1
        "entropy": -1.0 * false + rng.normal(scale=1.0, size=4000),  # against its declared sign of +1
        "random": np.zeros(4000),  # drawn by the ledger
    }
    table = ranking(planted(columns, false, image))
    for name, expected in (("surprisal", norm.cdf(2 / 2**0.5)), ("margin", norm.cdf(0.5 / 2**0.5))):
        assert table.loc[name, "auroc"] == pytest.approx(expected, abs=0.03)
        assert table.loc[name, "low"] < expected < table.loc[name, "high"]
        assert table.loc[name, "agrees"] == "yes"
    assert table.loc["entropy", "auroc"] == pytest.approx(1 - norm.cdf(1 / 2**0.5), abs=0.03)
    assert table.loc["entropy", "agrees"] == "no"
    assert table.loc["random", "low"] < 0.5 < table.loc["random", "high"]
    assert list(table.index) == ["surprisal", "margin", "random", "entropy"]  # best first
    assert (table["n_tokens"] == 4000).all()
    assert (table["n_images"] == 400).all()
    assert (table["n_hallucinated"] == false.sum()).all()


def test_every_signal_is_compared_with_the_best_on_the_same_tokens() -> None:
    """Entropy is surprisal with very little noise, margin knows nothing: the first is not told from the best, the other is."""
    rng = np.random.default_rng(11)
    false, image = rng.random(600) < 0.4, np.repeat(np.arange(120), 5)
    best = false + rng.normal(size=600)
    columns = {
        "surprisal": best,
        "entropy": best + rng.normal(scale=0.1, size=600),
        "margin": rng.normal(size=600),
        "frequency": np.where(np.arange(600) == 0, np.nan, rng.random(600)),  # not known for every token
        "random": np.zeros(600),
    }
    tables = planted(columns, false, image).result().tables
    table = tables["ranking"].set_index("signal")
    first = table.index[0]
    other = "entropy" if first == "surprisal" else "surprisal"
    assert {first, other} == {"surprisal", "entropy"}
    for name in (other, "margin"):
        expected = table.loc[name, "auroc"] - table.loc[first, "auroc"]
        assert table.loc[name, "to_best"] == pytest.approx(expected, abs=1e-12)
    assert table.loc[other, "to_best_low"] <= 0 <= table.loc[other, "to_best_high"]
    assert table.loc["margin", "to_best_high"] < 0
    assert table.loc[[first, "frequency", "random"], "to_best"].isna().all()
    (line, *_) = ledger_headline(tables)
    assert f"not told from {table.loc[other, 'title']} (" in line
    assert table.loc["margin", "title"] not in line


def test_two_redundant_signals_have_their_known_correlation() -> None:
    """Bivariate normal with r = .8: Spearman is 6 / pi asin(r / 2) = .786."""
    rng = np.random.default_rng(1)
    false, image = rng.random(3000) < 0.3, np.repeat(np.arange(300), 10)
    first, other = rng.normal(size=3000), rng.normal(size=3000)
    columns = {"surprisal": first, "entropy": 0.8 * first + 0.6 * other, "margin": rng.normal(size=3000)}
    table = redundancy_table(
        planted(columns, false, image).ledger(), chosen_signals(list(columns)), n_resamples=300, seed=0
    )
    pairs = table.set_index(["signal_a", "signal_b"])
    same = pairs.loc[("surprisal", "entropy")]
    assert same["spearman"] == pytest.approx(spearmanr(columns["surprisal"], columns["entropy"]).statistic, abs=1e-12)
    assert same["low"] < 6 / np.pi * np.arcsin(0.4) < same["high"]
    none = pairs.loc[("surprisal", "margin")]
    assert none["low"] < 0 < none["high"]


def test_intervals_keep_images_whole() -> None:
    """Every token four times in its image is no new knowledge: the intervals stay what they were."""
    rng = np.random.default_rng(2)
    false, image = rng.random(200) < 0.4, np.repeat(np.arange(50), 4)
    columns = {"surprisal": false + rng.normal(size=200), "entropy": rng.normal(size=200)}
    once = planted(columns, false, image).result().tables
    four = {name: np.repeat(values, 4) for name, values in columns.items()}
    often = planted(four, np.repeat(false, 4), np.repeat(image, 4)).result().tables
    for name, keys in (("ranking", ["auroc", "low", "high"]), ("redundancy", ["spearman", "low", "high"])):
        np.testing.assert_allclose(often[name][keys], once[name][keys], atol=2e-3)


def null_rows(seed: int, n_images: int = 60) -> tuple[dict[str, Array], Array, Array]:
    """Signals and labels that both differ between images, and have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(n_images), 4)
    share = rng.beta(1, 2, size=n_images)[image]
    false = rng.random(len(image)) < share
    columns = {
        name: rng.normal(size=n_images)[image] + rng.normal(size=len(image))
        for name in ("surprisal", "margin", "t_vhd")
    }
    return columns, false, image


def test_where_there_is_nothing_nothing_is_found_but_for_the_stated_share() -> None:
    """40 null data sets of three signals. A finding in one of them is a false discovery rate of 1, so that about one in
    twenty may have any; of 120 intervals about one in twenty may miss chance (percentile intervals are a little short).
    """
    found = missed = correlated = 0
    for seed in range(40):
        columns, false, image = null_rows(seed)
        ledger, signals = planted(columns, false, image).ledger(), chosen_signals(list(columns))
        table = ranking_table(ledger, signals, Detection(0.01, 200, seed=0))
        found += bool((table["agrees"] != "open").any())
        missed += int(((table["low"] > 0.5) | (table["high"] < 0.5)).sum())
        missed += int(((table["partial_low"] > 0.5) | (table["partial_high"] < 0.5)).sum())
        pairs = redundancy_table(ledger, signals, n_resamples=200, seed=0)
        correlated += int(((pairs["low"] > 0) | (pairs["high"] < 0)).sum())
    assert found <= binom.ppf(0.999, 40, 0.06)
    assert missed <= binom.ppf(0.999, 240, 0.06)
    assert correlated <= binom.ppf(0.999, 120, 0.06)


def test_signals_and_states_of_noise_make_no_detector_together() -> None:
    """12 null data sets: a combination called better than chance is as rare as stated (in cross-validation chance lies a
    little below .5, so that it is rarer still).
    """
    found = 0
    for seed in range(12):
        columns, false, image = null_rows(seed, n_images=40)
        states = np.random.default_rng(seed).normal(size=(len(image), 12))
        tables = planted(columns, false, image, states, n_resamples=100, n_folds=3).result().tables
        found += bool((tables["combination"]["low"] > 0.5).any())
    assert found <= binom.ppf(0.999, 12, 0.06)


def test_a_signal_that_only_follows_the_position_detects_nothing_at_equal_position() -> None:
    """Hallucination gets likelier along the caption, and the signal is the position with noise: AUROC far above .5, partial
    AUROC .5. A second signal knows the label itself, d' = 1: partial AUROC Phi(1 / sqrt 2) = .760.
    """
    rng = np.random.default_rng(8)
    position, image = np.tile(np.arange(20.0), 150), np.repeat(np.arange(150), 20)
    false = rng.random(3000) < 1 / (1 + np.exp(-(position - 10) / 3))
    columns = {
        "position": position,
        "surprisal": position + rng.normal(scale=2.0, size=3000),
        "entropy": 0.3 * position + false + rng.normal(size=3000),
        "margin": 0.05 * (position - 10) ** 2 - 0.2 * position + rng.normal(size=3000),  # bends along the caption
        "frequency": rng.random(3000),
    }
    table = ranking(planted(columns, false, image))
    assert table.loc["surprisal", "auroc"] > 0.8
    for name in ("surprisal", "margin"):
        assert table.loc[name, "low"] > 0.5
        assert table.loc[name, "partial_low"] < 0.5 < table.loc[name, "partial_high"]
    assert table.loc["entropy", "partial"] == pytest.approx(norm.cdf(1 / 2**0.5), abs=0.03)
    assert table.loc[["position", "frequency"], "partial"].isna().all()  # nothing is left of what is held fixed


def test_few_are_found_where_false_alarms_must_be_rare() -> None:
    """d' = 2 at 1 % false positives: Phi(2 - 2.326) = .372."""
    rng = np.random.default_rng(9)
    false, image = rng.random(6000) < 0.5, np.repeat(np.arange(600), 10)
    row = ranking(planted({"surprisal": 2.0 * false + rng.normal(size=6000)}, false, image)).loc["surprisal"]
    expected = norm.cdf(2 + norm.ppf(0.01))
    assert row["tpr_low"] < expected < row["tpr_high"]
    assert row["fpr"] == 0.01


def test_labels_of_held_out_tokens_reach_the_combination_on_no_way() -> None:
    """Turning all labels of a fold changes every score but those of that fold: neither the combination nor the probe whose
    score is part of it has seen them.
    """
    rng = np.random.default_rng(0)
    false, image = rng.random(160) < 0.4, np.repeat(np.arange(40), 4)
    columns, states = rng.normal(size=(160, 2)), rng.normal(size=(160, 30))
    folds = folds_of(false, image, 5, 0)
    assert folds is not None
    test = folds.test[0].numpy()
    before, after = (
        combined_scores(columns, states, labels, image, folds, n_folds=4, seed=0)
        for labels in (false, np.where(test, ~false, false))
    )
    np.testing.assert_array_equal(before[test], after[test])
    assert (before[~test] != after[~test]).all()


def test_out_of_fold_scores_come_from_other_images() -> None:
    """Images that are told apart by their states: a probe that has seen an image knows its label, one that has not does not."""
    rng = np.random.default_rng(3)
    image = np.repeat(np.arange(40), 5)
    false = (np.arange(40) % 2 == 0)[image]
    states = rng.normal(size=(40, 60))[image]
    scores = out_of_fold(states, false, image, n_folds=5, seed=0)
    assert roc_auc_score(false, scores) < 0.75  # 1 where the image itself was trained on
    direction = np.zeros(60)
    direction[0] = 8.0
    scores = out_of_fold(states + false[:, None] * direction, false, image, n_folds=5, seed=0)
    assert roc_auc_score(false, scores) > 0.8


def test_the_combination_adds_up_independent_signals() -> None:
    """Three signals, each label + N(0, 1): the sum has d' = sqrt 3, AUROC Phi(sqrt 3 / sqrt 2) = .890 against .760."""
    rng = np.random.default_rng(4)
    false, image = rng.random(1500) < 0.4, np.repeat(np.arange(300), 5)
    columns = {name: false + rng.normal(size=1500) for name in ("surprisal", "entropy", "attention_entropy")}
    columns["margin"] = rng.normal(size=1500)
    tables = planted(columns, false, image).result().tables
    rows = tables["combination"].drop_duplicates("combination").set_index("combination")
    assert rows.loc["all signals", "auroc"] == pytest.approx(norm.cdf(1.5**0.5), abs=0.02)
    assert rows.loc["output and baselines", "auroc"] == pytest.approx(norm.cdf(1.0), abs=0.03)  # two of the three
    assert rows.loc["all signals", "n_signals"] == 4
    found = roc_auc_score(false, tables["ledger"]["combined"])
    assert found == pytest.approx(rows.loc["all signals", "auroc"], abs=1e-12)
    pairs = tables["combination"].set_index(["combination", "against"])
    best = tables["ranking"].iloc[0]
    gain = pairs.loc[("all signals", best["title"])]
    assert gain["difference"] == pytest.approx(found - best["auroc"], abs=1e-12)
    assert gain["difference_low"] > 0.08
    assert gain["p"] < 0.01


def test_too_few_images_give_no_combination_and_no_error() -> None:
    columns = {"surprisal": np.arange(6.0), "entropy": np.arange(6.0)[::-1]}
    tables = planted(columns, np.array([True] + [False] * 5), np.array([0, 0, 1, 1, 2, 2])).result().tables
    assert "combination" not in tables
    assert tables["ledger"]["combined"].isna().all()
    assert tables["ranking"]["auroc"].notna().all()
    assert folds_of(np.array([True, False]), np.array(["a", "a"]), 5, 0) is None


def test_one_kind_of_object_alone_cannot_be_ranked() -> None:
    result = planted({"surprisal": np.arange(4.0)}, np.zeros(4, dtype=bool), np.arange(4)).result()
    assert result.tables["ranking"]["auroc"].isna().all()
    assert "No signal can be ranked" in result.summary


def test_no_object_at_all_is_an_error_that_says_so() -> None:
    with pytest.raises(InputError, match="nothing to put into the ledger"):
        planted({"surprisal": np.zeros(0)}, np.zeros(0, dtype=bool), np.zeros(0, dtype=int)).result()


def test_rankings_of_two_parts_agree_as_their_areas_do() -> None:
    rng = np.random.default_rng(5)
    false, image = rng.random(600) < 0.4, np.repeat(np.arange(150), 4)
    strengths = {"surprisal": 2.0, "entropy": 1.2, "mention": 0.8, "position": 0.4, "attention_entropy": 0.0}

    def part(seed: int, turned: bool) -> TokenLedger:
        draw = np.random.default_rng(seed)
        return planted(
            {name: (-1 if turned else 1) * d * false + draw.normal(size=600) for name, d in strengths.items()},
            false,
            image,
        )

    parts = {
        Part("one", "baseline", "captions"): part(1, False),
        Part("two", "baseline", "captions"): part(2, False),
        Part("three", "baseline", "captions"): part(3, True),
    }
    result = TokenLedger.compare(parts)
    assert result is not None
    assert len(result.tables["rankings"]) == 3 * len(strengths)
    agreement = result.tables["agreement"].set_index(["model_a", "model_b"])
    assert agreement.loc[("one", "two"), "spearman"] == pytest.approx(1.0)
    assert agreement.loc[("one", "three"), "spearman"] == pytest.approx(-1.0)
    assert (agreement["n_signals"] == len(strengths)).all()
    assert TokenLedger.compare(dict(list(parts.items())[:1])) is None


def test_agreement_of_unrelated_rankings_is_open() -> None:
    """Twelve signals in random orders: the interval over signals misses 0 about once in twenty."""
    rng = np.random.default_rng(6)
    names = [f"s{place}" for place in range(12)]
    missed = 0
    for _ in range(60):
        tables = [
            pd.DataFrame(
                {"model": model, "condition": "c", "dataset": "d", "family": "states"}
                | {"signal": names, "auroc": rng.random(12)}
            )
            for model in "ab"
        ]
        row = agreement_table(tables).iloc[0]
        missed += not row["low"] <= 0 <= row["high"]
    assert missed <= binom.ppf(0.999, 60, 0.06)
