"""The ledger as a probe: what becomes a row, what is refused, its figures and its headline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from tiny_models.blip import build_instructblip
from tiny_models.mllama import build as build_mllama

from probes import TokenLedger
from slitlamp.errors import InputError, UnknownNameError, UnsupportedError
from slitlamp.reports.drawing import Tables
from slitlamp.reports.ledger_maps import correlation_grid, telling_item
from slitlamp.reports.style import NARROW, WIDE
from slitlamp.reports.token_ledger import FIGURES, ledger_headline, ranked
from slitlamp.tracing import Part
from slitlamp.vlm import VLM


def table(labels: list[str], **columns: Any) -> pd.DataFrame:
    return pd.DataFrame(
        {"token": range(len(labels)), "word": [f"w{i}" for i in range(len(labels))], "label": labels, **columns}
    )


@pytest.fixture(scope="module")
def batch(llava: VLM, image: Any) -> Any:
    prompts = ["<image> is there a dog ?", "<image> what ?"]
    encoded = llava.encode(images=[image(0), image(1)], prompts=prompts, ids=["a", "b"])
    return encoded.with_continuation([[6, 7, 8], [9, 10]])


def test_rows_without_labels_are_left_out_and_nothing_but_them_is_refused(llava: VLM, batch: Any) -> None:
    probe = TokenLedger(signals=["surprisal"])
    llava.measure(probe, batch, [None, table(["object", "other"])])
    assert probe.ledger()[["item", "token"]].values.tolist() == [["b", 0]]
    for labels in (None, [None, None]):
        with pytest.raises(InputError, match="labels"):
            llava.measure(TokenLedger(), batch, labels)


def test_a_batch_in_which_nothing_is_named_counts_for_nothing(llava: VLM, batch: Any) -> None:
    probe = TokenLedger()
    llava.measure(probe, batch, [table(["other"] * 3), table(["other"] * 2)])
    with pytest.raises(InputError, match="nothing to put"):
        probe.result()
    llava.measure(probe, batch, [table(["object", "other", "hallucinated"]), table(["other"] * 2)])
    assert probe.ledger()["word"].tolist() == ["w0", "w2"]


def test_columns_that_older_labels_lack_are_missing_values(llava: VLM, batch: Any) -> None:
    probe = TokenLedger(signals=["surprisal", "frequency", "position"], n_resamples=20)
    llava.measure(probe, batch, [table(["object", "hallucinated", "object"]), table(["hallucinated", "other"])])
    tables = probe.result().tables
    assert tables["ledger"]["frequency"].isna().all()
    assert tables["ledger"]["category"].tolist() == [""] * 4
    assert set(tables["ranking"]["signal"]) == {"surprisal", "position"}  # what nobody knows is not ranked


def test_answers_are_rows_of_their_image(llava: VLM, batch: Any) -> None:
    probe = TokenLedger(signals=["surprisal", "margin"], n_resamples=20)
    grouped = batch.grouped(["photo", "photo"])
    llava.measure(probe, grouped, [table(["correct", "other", "other"]), table(["wrong", "other"])])
    ledger = probe.ledger()
    assert ledger[["image", "label"]].values.tolist() == [["photo", "correct"], ["photo", "wrong"]]
    ranking = probe.result().tables["ranking"]
    assert (ranking["n_hallucinated"] == 1).all()
    assert (ranking["n_images"] == 1).all()


def test_only_what_the_signals_need_is_run(llava: VLM) -> None:
    labels_alone = TokenLedger(signals=["position", "frequency"])
    assert labels_alone.views(llava.anatomy) == {}
    assert [site.label for site in labels_alone.sites(llava.anatomy)] == ["state_before"]
    probe = TokenLedger(signals=["pmi"])
    assert set(probe.views(llava.anatomy)) == {"without"}
    assert [site.label for site in probe.sites(llava.anatomy)] == ["logits"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"signals": ["surprise"]}, "surprisal"),
        ({"signals": []}, "one or more"),
        ({"signals": ["pmi", "pmi"]}, "different"),
        ({"top_k": 0}, "top_k"),
        ({"n_outliers": 0}, "n_outliers"),
        ({"noise_step": 1000}, "noise_step"),
        ({"fpr": 0.0}, "fpr"),
        ({"n_folds": 1}, "n_folds"),
        ({"truth_layer": 3}, "truth_layer"),
        ({"lens_layers": [0, -4]}, "lens_layers"),
        ({"vision_layer": 7}, "vision_layer"),
    ],
)
def test_parameters_that_cannot_be_used_are_refused_before_anything_runs(
    llava: VLM, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises((InputError, UnknownNameError), match=message):
        TokenLedger(**parameters).sites(llava.anatomy)


def test_families_without_image_tokens_say_which_signals_to_choose() -> None:
    crossing, queries = build_mllama(), build_instructblip()
    with pytest.raises(UnsupportedError, match="attention, heads"):
        TokenLedger().sites(crossing.anatomy)
    with pytest.raises(UnsupportedError, match="Q-Former"):
        TokenLedger(signals=["attention_outliers"]).sites(queries.anatomy)
    for vlm in (crossing, queries):
        assert TokenLedger(signals=["surprisal", "pmi", "truthful_score"]).sites(vlm.anatomy)


@pytest.fixture(scope="module")
def measured() -> TokenLedger:
    """Forty captions of made-up values in which some signals know something."""
    from probes.ledger_signals import SIGNALS

    rng = np.random.default_rng(7)
    image = np.repeat(np.arange(40), 4)
    false = rng.random(160) < 0.35
    values = {name: one.sign * 0.3 * place * false for place, (name, one) in enumerate(SIGNALS.items())}
    text = np.array([f"item{one}" for one in image])
    probe = TokenLedger(n_resamples=60, noise_step=999)
    probe.load_state(
        {
            "constants.signal": np.array(list(values)),
            "rows.item": text,
            "rows.image": text,
            "rows.token": np.tile(np.arange(4), 40),
            "rows.mention": np.tile(np.arange(1, 5), 40),
            "rows.word": np.tile(["dog", "<b>$x$</b>", "traffic light", "cat"], 40),
            "rows.label": np.where(false, "hallucinated", "object"),
            "rows.category": text,
            "rows.frequency": rng.random(160),
            "rows.values": np.stack(list(values.values()), axis=1) + rng.normal(size=(160, len(values))),
            "rows.state": rng.normal(size=(160, 8)).astype(np.float32),
        }
    )
    return probe


@pytest.fixture(scope="module")
def tables(measured: TokenLedger) -> Tables:
    return measured.result().tables


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", [name for name in FIGURES if name != "comparison"])
def test_every_figure_is_drawn_and_fits_its_width(tables: Tables, name: str, width: float) -> None:
    figure = FIGURES[name].draw(tables, width)
    assert isinstance(figure, Figure)
    assert FIGURES[name].caption(tables).endswith(".")
    figure.canvas.draw()
    right = width * figure.dpi
    for axes in figure.axes:
        for label in [axes.xaxis.label, *axes.get_yticklabels(), axes.title]:
            box = label.get_window_extent()
            assert label.get_text() == "" or (box.x0 > -2 and box.x1 < right + 2), label.get_text()


def test_the_ranking_figure_shows_the_tables_numbers(tables: Tables) -> None:
    rows = ranked(tables)
    assert rows is not None
    figure = FIGURES["ranking"].draw(tables)
    assert figure is not None
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[0] == "all signals"
    assert names[-1] == "random number"
    filled = [
        float(line.get_xdata()[0])
        for line in figure.axes[0].get_lines()
        if line.get_label() == "_value" and line.get_markerfacecolor() != "white"
    ]
    np.testing.assert_allclose(filled, rows["auroc"].iloc[:-1])  # the random number's marker is hollow


def test_nothing_is_drawn_of_what_is_not_there(tables: Tables) -> None:
    assert all(drawing.draw({}) is None for drawing in FIGURES.values())
    assert FIGURES["comparison"].draw(tables) is None
    true_only = {name: one.copy() for name, one in tables.items()}
    true_only["ledger"]["label"] = "object"
    assert FIGURES["roc"].draw(true_only) is None
    alone = {name: one for name, one in tables.items() if name in ("ledger", "ranking")}
    assert FIGURES["ranking"].draw(alone) is not None


def test_the_comparison_is_drawn_from_its_own_tables(measured: TokenLedger) -> None:
    parts = {Part(model, "baseline", "captions"): measured for model in ("one", "two", "three")}
    result = TokenLedger.compare(parts)
    assert result is not None
    figure = FIGURES["comparison"].draw(result.tables)
    assert figure is not None
    assert "one and two" in FIGURES["comparison"].caption(result.tables)
    assert all(drawing.draw(result.tables) is None for name, drawing in FIGURES.items() if name != "comparison")


def test_the_headline_says_the_numbers_of_the_tables(tables: Tables) -> None:
    lines = ledger_headline(tables)
    assert len(lines) == 3
    best = tables["ranking"][tables["ranking"]["family"] != "null"].iloc[0]
    assert best["title"] in lines[0]
    assert f"{best['auroc']:.2f}".removeprefix("0") in lines[0]
    assert "160 named objects" in lines[0]
    assert ledger_headline({}) == []


def test_signals_that_agree_stand_together_in_the_map() -> None:
    names = ["a", "x", "b", "y"]
    value = {frozenset("ab"): 0.9, frozenset("xy"): -0.9}
    pairs = [(one, other) for i, one in enumerate(names) for other in names[i + 1 :]]
    redundancy = pd.DataFrame(pairs, columns=["signal_a", "signal_b"])
    redundancy["spearman"] = [value.get(frozenset(pair), 0.0) for pair in pairs]
    redundancy["low"], redundancy["high"] = redundancy["spearman"] - 0.1, redundancy["spearman"] + 0.1
    order, grid, clear = correlation_grid(redundancy, {"a": 1, "b": 1, "x": 1, "y": -1})
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset("ab"), frozenset("xy")}
    assert grid[order.index("x"), order.index("y")] == 0.9  # turned by the expected signs
    assert not clear[order.index("a"), order.index("x")]


def test_the_caption_shown_has_most_objects_of_both_kinds() -> None:
    ledger = pd.DataFrame(
        {
            "item": ["a"] * 5 + ["b"] * 4 + ["c"] * 2,
            "label": ["object"] * 4 + ["hallucinated"] + ["object", "hallucinated"] * 2 + ["hallucinated"] * 2,
        }
    )
    assert telling_item(ledger) == "b"
