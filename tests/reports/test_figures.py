from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from slitlamp.errors import InputError, UnknownNameError
from slitlamp.reports import FIGURES, captions, conditions, figure, figure_names, heads, scene, summaries
from slitlamp.reports.data import RunData
from slitlamp.reports.figures import to_png, to_svg
from slitlamp.reports.showcase import read_scenes
from slitlamp.reports.style import MAP, NARROW, WIDE, WORDS, condition_styles, contrast_ink, new_figure, short_names


def labelled(ax: Axes, label: str) -> list[matplotlib.artist.Artist]:
    return [artist for artist in ax.get_children() if artist.get_label() == f"_{label}"]


def table(run: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(run / "tables" / f"{name}.parquet")


@pytest.fixture
def scores(demo_run: Path) -> pd.DataFrame:
    return table(demo_run, "conditions")


def test_conditions_panel_draws_the_values_of_the_table(scores: pd.DataFrame) -> None:
    rows = scores[scores["metric"] == "chair_i"]
    ax = conditions.conditions_panel(scores, "chair_i", reference="baseline")
    values = labelled(ax, "value")
    assert [float(one.get_xdata()[0]) for one in values] == pytest.approx(list(rows["value"]))
    assert [float(one.get_ydata()[0]) for one in values] == [0, 1, 2, 3, 4]
    bars = [tuple(one.get_xdata()) for one in labelled(ax, "interval")]
    assert bars == [pytest.approx(pair) for pair in zip(rows["low"], rows["high"], strict=True)]
    (line,) = labelled(ax, "reference")
    assert line.get_xdata()[0] == pytest.approx(0.242)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(rows["condition"])
    low, high = ax.get_xlim()
    assert low < rows["low"].min() < rows["high"].max() < high
    assert ax.get_xlabel()
    assert ax.get_title(loc="left") == "CHAIR_i"


def test_missing_values_and_intervals_are_left_out(scores: pd.DataFrame) -> None:
    rows = scores[scores["metric"] == "chair_i"].reset_index(drop=True)
    rows.loc[1, ["value", "low", "high"]] = np.nan
    rows.loc[2, ["low", "high"]] = np.nan
    ax = conditions.conditions_panel(rows, "chair_i")
    assert len(labelled(ax, "value")) == 4
    assert len(labelled(ax, "interval")) == 3
    assert len(ax.get_yticklabels()) == 5
    nothing = rows.assign(value=np.nan, low=np.nan, high=np.nan)
    assert np.isfinite(conditions.conditions_panel(nothing, "chair_i").get_xlim()).all()


@pytest.mark.parametrize(("measure", "chance"), [("accuracy", 0.5), ("f1", 2 / 3), ("yes_ratio", 0.5)])
def test_pope_panel_has_the_line_of_chance_inside_its_limits(scores: pd.DataFrame, measure: str, chance: float) -> None:
    rows = scores[scores["dataset"].str.contains("pope")]
    ax = conditions.pope_panel(rows, measure)
    (line,) = labelled(ax, "chance")
    assert line.get_xdata()[0] == pytest.approx(chance)
    assert ax.get_xlim()[0] < chance < ax.get_xlim()[1]
    expected = sorted(rows.loc[rows["metric"] == measure, "value"])
    assert sorted(float(one.get_xdata()[0]) for one in labelled(ax, "value")) == pytest.approx(expected)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["random", "popular", "adversarial", "all"]


def test_differences_panel_has_zero_and_thick_bars_where_it_is_excluded(demo_run: Path) -> None:
    rows = table(demo_run, "differences")
    rows = rows[(rows["reference"] == "baseline") & (rows["dataset"] == "emoji_scenes/captions")]
    ax = conditions.differences_panel(rows, "chair_i")
    (zero,) = labelled(ax, "zero")
    assert zero.get_xdata()[0] == 0
    assert ax.get_xlim()[0] < 0 < ax.get_xlim()[1]
    drawn = rows[rows["metric"] == "chair_i"]
    excluded = ((drawn["low"] > 0) | (drawn["high"] < 0)).tolist()
    assert [bar.get_linewidth() > 2 for bar in labelled(ax, "interval")] == excluded
    assert 0 < sum(excluded) < len(excluded)
    (better,) = labelled(ax, "better")
    assert better.get_text() == "← better"


def test_head_map_holds_every_head_and_marks_those_that_are_picked(demo_run: Path) -> None:
    rows = table(demo_run, "head_divergence_heads")
    ax = heads.head_map(rows)
    grid = np.asarray(ax.collections[0].get_array()).reshape(6, 8)
    assert grid == pytest.approx(rows["vhd"].to_numpy().reshape(6, 8))
    (marks,) = labelled(ax, "picked")
    assert len(marks.get_offsets()) == (rows["selected"] >= 0.5).sum() == 24
    column, row = np.floor(np.asarray(marks.get_offsets())).astype(int).T
    assert set(zip(row, column, strict=True)) == {(r.layer, r.head) for r in rows[rows["selected"] >= 0.5].itertuples()}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("head", "layer")


def test_head_intervals_hold_every_head_and_the_median_of_every_layer(demo_run: Path) -> None:
    rows = table(demo_run, "head_divergence_heads")
    ax = heads.head_intervals(rows)
    drawn = np.concatenate([np.asarray(one.get_ydata(), float) for one in labelled(ax, "value")])
    assert np.sort(drawn) == pytest.approx(np.sort(rows["vhd"]))
    medians = [float(one.get_ydata()[0]) for one in labelled(ax, "median")]
    assert medians == pytest.approx(list(rows.groupby("layer")["vhd"].median()))


def test_t_vhd_histogram_shows_shares_that_sum_to_one(demo_run: Path) -> None:
    tokens, means = table(demo_run, "head_divergence_tokens"), table(demo_run, "head_divergence_t_vhd")
    tokens.loc[0, "t_vhd_4"] = np.nan
    ax = heads.t_vhd_histogram(tokens, "t_vhd_4", means[means["k"] == 4])
    patches = list(ax.get_legend_handles_labels()[0])
    assert [patch.get_data().values.sum() for patch in patches] == pytest.approx([1, 1, 1])
    assert len({str(patch.get_linestyle()) for patch in patches}) == 3
    drawn = sorted(float(one.get_xdata()[0]) for one in labelled(ax, "mean"))
    assert drawn == pytest.approx(sorted(means.loc[means["k"] == 4, "mean"]))
    labels = ax.get_legend_handles_labels()[1]
    assert any(label.startswith("hallucinated object, ") for label in labels)


def test_recall_curve_draws_every_condition_and_the_matched_recall(demo_run: Path) -> None:
    rows = table(demo_run, "recall_curve").dropna()
    ax = captions.recall_curve(rows, matched=0.654)
    curves = labelled(ax, "curve")
    assert len(curves) == 5
    first = rows[rows["condition"] == "baseline"]
    assert np.asarray(curves[0].get_xdata()) == pytest.approx(first["recall"].to_numpy())
    assert np.asarray(curves[0].get_ydata()) == pytest.approx(first["chair_i"].to_numpy())
    assert labelled(ax, "matched")[0].get_xdata()[0] == 0.654
    assert ax.get_ylim()[0] == 0


def test_mention_index_draws_shares_bands_and_the_overall_level(demo_run: Path) -> None:
    mentions = table(demo_run, "chair_mentions")
    shares = summaries.mention_index_shares(mentions)
    ax = captions.mention_index(shares, overall=0.242, bands=("baseline",))
    assert len(labelled(ax, "curve")) == 5
    assert len(labelled(ax, "band")) == 1
    assert labelled(ax, "overall")[0].get_ydata()[0] == 0.242
    base = mentions[mentions["condition"] == "baseline"].groupby("index")["hallucinated"].mean()
    assert np.asarray(labelled(ax, "curve")[0].get_ydata()) == pytest.approx(base.to_numpy())
    assert ax.get_ylim()[0] == 0
    n = mentions[(mentions["condition"] == "baseline") & (mentions["index"] == 1)]
    assert ax.get_xticklabels()[0].get_text() == f"1\n{len(n)}"


def test_mention_index_leaves_rare_orders_out() -> None:
    rows = [("a", f"{image}", index, index > 1) for image in range(30) for index in range(1, 3 if image < 25 else 2)]
    mentions = pd.DataFrame(rows, columns=["condition", "image_id", "index", "hallucinated"])
    shares = summaries.mention_index_shares(mentions)
    assert list(shares["value"]) == [0.0, 1.0]
    assert list(shares["n"]) == [30, 25]
    assert list(summaries.mention_index_shares(mentions, 26)["index"]) == [1]
    trend = summaries.mention_index_trend(mentions, "a")
    assert trend is not None
    assert trend[0] == 2
    assert trend[1].value == 1
    assert summaries.mention_index_trend(mentions, "a", 26) is None
    assert summaries.mention_index_trend(mentions, "b") is None


def test_attention_lights_the_patch_that_has_it() -> None:
    image = Image.new("RGB", (64, 64), (200, 200, 200))
    weights = np.zeros((8, 8))
    weights[2, 5] = 0.3
    ax = scene.attention_panel(image, weights)
    drawn = np.asarray(ax.images[0].get_array())
    assert drawn.shape == (64, 64, 3)
    assert drawn[16:24, 40:48].min() == pytest.approx(200 / 255)
    drawn[16:24, 40:48] = 0
    assert drawn.max() < 0.25 * 200 / 255 + 1e-9
    with pytest.raises(InputError, match="not negative"):
        scene.attention_panel(image, -weights)


def test_words_panel_writes_every_word_and_colours_those_with_a_value(demo_run: Path) -> None:
    one = read_scenes(RunData(demo_run))[0]
    ax = scene.words_panel(one.words)
    assert [text.get_text().removesuffix(" ✗") for text in labelled(ax, "word")] == list(one.words["word"])
    assert len(labelled(ax, "background")) == one.words["t_vhd"].notna().sum()
    assert len(labelled(ax, "mark_hallucinated")) == 1
    assert len(labelled(ax, "mark_object")) == 2
    right = ax.get_xlim()[1]
    assert all(text.get_position()[0] < right for text in labelled(ax, "word"))


def test_caption_words_has_a_map_for_every_named_object(demo_run: Path) -> None:
    one = read_scenes(RunData(demo_run))[0]
    drawn = scene.caption_words(one)
    assert len(drawn.axes) == 2 + len(one.mentions) == 5
    assert [ax.get_title(loc="left") for ax in drawn.axes[2:]] == ["fork", "knife ✗", "cup"]
    assert len(scene.caption_words(one, with_words=False).axes) == 3


def test_functions_draw_on_the_axes_they_are_given(scores: pd.DataFrame) -> None:
    ax = new_figure().add_subplot()
    assert conditions.conditions_panel(scores, "chair_i", ax) is ax


def test_missing_columns_and_rows_are_errors(scores: pd.DataFrame) -> None:
    with pytest.raises(InputError, match="low"):
        conditions.conditions_panel(scores.drop(columns="low"), "chair_i")
    with pytest.raises(InputError, match="empty"):
        heads.head_map(pd.DataFrame({"layer": [], "head": [], "vhd": []}))


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", list(FIGURES))
def test_every_figure_of_a_run(demo_run: Path, name: str, width: float) -> None:
    drawn = figure(demo_run, name, width=width)
    assert drawn.get_figwidth() == pytest.approx(width)
    for ax in drawn.axes:
        assert ax.get_xlabel() or ax.get_ylabel() or ax.get_title(loc="left") or ax.texts or not ax.axison


def test_drawing_leaves_no_global_state(demo_run: Path) -> None:
    before = dict(matplotlib.rcParams)
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure(demo_run, "head_divergence")
    figure(demo_run, "t_vhd_histogram")
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def test_svg_and_png_are_the_same_bytes_each_time(demo_run: Path) -> None:
    one, two = figure(demo_run, "chair"), figure(demo_run, "chair")
    svg = to_svg(one)
    assert svg == to_svg(two)
    assert b"<dc:date>" not in svg
    assert to_png(one, 50) == to_png(two, 50)


def test_unknown_and_unavailable_figures(make_run: Callable[..., Path]) -> None:
    run = make_run(without=("head_divergence", "showcase"))
    assert "head_divergence" not in figure_names(run)
    with pytest.raises(UnknownNameError, match="'pope'"):
        figure(run, "popee")
    with pytest.raises(InputError, match=r"no data for the figure 'head_divergence'.*chair"):
        figure(run, "head_divergence")


def test_styles_differ_without_colour() -> None:
    names = ["baseline", "vhr", *(f"control {i}" for i in range(4))]
    roles = {name: "control" if name.startswith("control") else "treatment" for name in names} | {
        "baseline": "reference"
    }
    styles = condition_styles(names, roles)
    assert len({(one.marker, one.filled) for one in styles.values()}) == len(names)
    assert all(styles[name].filled != name.startswith("control") for name in names)


def test_colour_maps_get_steadily_darker_or_lighter() -> None:
    for colours in (matplotlib.colormaps[MAP], WORDS):
        light = [np.dot(colours(x)[:3], (0.2126, 0.7152, 0.0722)) for x in np.linspace(0, 1, 11)]
        steps = np.diff(light)
        assert (steps > 0).all() or (steps < 0).all()


def test_ink_can_be_read_on_every_colour_of_words() -> None:
    def luminance(colour: object) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for x in np.linspace(0, 1, 21):
        background, ink = to_hex(WORDS(x)), contrast_ink(WORDS(x))
        dark, light = sorted((luminance(background), luminance(ink)))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_short_names_stay_different() -> None:
    names = ["a" * 40, "a" * 41, "a" * 42, "b", "  spaces\n here "]
    short = short_names(names, 20)
    assert len(set(short.values())) == len(names)
    assert max(map(len, short.values())) <= 20
    assert short["  spaces\n here "] == "spaces here"


@pytest.mark.parametrize("name", list(FIGURES))
def test_every_figure_has_a_caption_with_n_and_sentences(demo_run: Path, name: str) -> None:
    data = RunData(demo_run)
    note, sentences = FIGURES[name].note(data), FIGURES[name].shows(data)
    assert "n = " in note
    assert note.endswith(".")
    assert sentences
    for text in (note, *sentences):
        assert not set("{}") & set(text)
        assert text[0] == text[0].upper()
        assert "nan" not in text


def test_attention_panels_of_one_maximum_can_be_compared() -> None:
    image = Image.new("RGB", (4, 4), "white")
    weights = np.array([[0.1, 0.2], [0.0, 0.4]])
    own, same = (scene.attention_panel(image, weights, vmax=vmax).images[0].get_array() for vmax in (None, 0.8))
    assert own.max() == pytest.approx(1)
    dark = own.min()
    assert same.max() == pytest.approx((1 + dark) / 2)
    assert scene.attention_panel(image, weights, vmax=0.1).images[0].get_array().max() == pytest.approx(1)
