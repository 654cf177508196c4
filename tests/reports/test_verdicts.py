"""Verdicts and interactions as they are drawn and said, from made-up numbers whose verdicts are plain."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from slitlamp.errors import InputError
from slitlamp.experiments.verdicts import BEATS_ALL, HARMS, NO_CONTROL, NOT_ALL, NOTHING
from slitlamp.reports import compose, figure, figure_names, interactions, verdicts, write_report
from slitlamp.reports.data import MANY, RunData
from slitlamp.reports.figures import run_figures
from slitlamp.reports.style import NARROW, WIDE, new_figure
from slitlamp.reports.wording import Estimate, number

NEW = ("verdicts", "interaction_matrix")


def labelled(ax: Axes, label: str) -> list[matplotlib.artist.Artist]:
    return [artist for artist in ax.get_children() if artist.get_label() == f"_{label}"]


@pytest.fixture
def data(composed_run: Path) -> RunData:
    return RunData(composed_run)


def test_the_run_is_one_of_every_verdict(data: RunData) -> None:
    one = next(one for one in verdicts.shown(data) if one.metric.name == "chair_i_matched")
    assert one.rows.set_index("treatment")["verdict"].to_dict() == {
        "vhr": BEATS_ALL, "boost": NOT_ALL, "vdd": NO_CONTROL, "m3id": NOTHING, "mask": HARMS,
    }  # fmt: skip
    assert one.rows["treatment"].tolist() == ["vhr", "boost", "vdd", "m3id", "mask"], "best first"


def test_a_verdict_panel_draws_both_differences_of_every_treatment(data: RunData) -> None:
    rows = verdicts.shown(data)[0].rows
    ax = verdicts.verdict_panel(rows, "chair_i")
    drawn = {(round(float(one.get_ydata()[0])), one.get_marker()): one for one in labelled(ax, "value")}
    for place, row in enumerate(rows.to_dict("records")):
        assert drawn[place, "o"].get_xdata()[0] == pytest.approx(row["value"])
        if row["n_controls"]:
            assert drawn[place, "v"].get_xdata()[0] == pytest.approx(row["control_value"])
    assert len(drawn) == len(rows) + (rows["n_controls"] > 0).sum()
    ends = [tuple(one.get_xdata()) for one in labelled(ax, "interval")]
    expected = [(row["low"], row["high"]) for row in rows.to_dict("records")]
    expected += [(row["control_low"], row["control_high"]) for row in rows.to_dict("records") if row["n_controls"]]
    np.testing.assert_allclose(sorted(ends), sorted(expected))
    thick = [one.get_linewidth() > 2 for one in labelled(ax, "interval")]
    assert thick == [low > 0 or high < 0 for low, high in ends]
    (zero,) = labelled(ax, "zero")
    assert zero.get_xdata()[0] == 0
    assert [label.get_text() for label in ax.get_yticklabels()] == rows["treatment"].tolist()
    stars = {one.xy[1] for one in labelled(ax, "star")}
    assert stars == {place for place, verdict in enumerate(rows["verdict"]) if verdict == BEATS_ALL} == {0}
    (better,) = labelled(ax, "better")
    assert better.get_text() == "← better"


def test_markers_tell_the_two_differences_apart_without_colour() -> None:
    looks = (verdicts.REFERENCE_LOOK, verdicts.CONTROL_LOOK)
    assert len({one.marker for one in looks}) == len({one.filled for one in looks}) == 2


def test_raw_and_equal_recall_stand_side_by_side_in_one_order(composed_run: Path) -> None:
    wide, narrow = (figure(composed_run, "verdicts", width=width) for width in (WIDE, NARROW))
    titles = ["CHAIR_i", "CHAIR_i at equal recall", "POPE F1 (adversarial)"]
    assert [ax.get_title(loc="left") for ax in wide.axes] == [ax.get_title(loc="left") for ax in narrow.axes] == titles
    for ax in narrow.axes:
        assert [label.get_text() for label in ax.get_yticklabels()] == ["vhr", "boost", "vdd", "m3id", "mask"]
    assert [bool(ax.get_yticklabels()[0].get_text()) for ax in wide.axes] == [True, False, False]
    rows = [ax.get_subplotspec().rowspan.start for ax in (*wide.axes, *narrow.axes)]
    assert rows == [0, 0, 0, 0, 1, 2]


def test_verdicts_in_words(data: RunData) -> None:
    raw, corrected, *_ = verdicts.verdict_findings(data)
    assert raw == (
        "On CHAIR_i, “vhr” beats the reference “baseline” and every control; “boost” beats the reference “baseline”, but not "
        "every control; “vdd” beats the reference “baseline”, but no control of it was run; “mask” makes it worse; of “m3id” "
        "nothing is shown."
    )
    assert corrected == (
        "Corrected for 5 treatments (Holm), of the 4 differences to the reference that exclude zero all of them stand (p < .050)."
    )
    assert verdicts.headline(data) == verdicts.verdict_findings(data)


def test_what_no_treatment_does_is_said_too(demo_run: Path) -> None:
    data = RunData(demo_run)
    assert verdicts.verdict_findings(data)[0] == (
        "On CHAIR_i, no treatment beats the reference “baseline” and every control; “vhr” beats the reference “baseline”, but "
        "not every control."
    )
    assert verdicts.headline(data) == [], "one treatment has sentences of its own at the top"


@pytest.mark.parametrize(("n", "said"), [(7, "of all 7 nothing"), (6, "“t4” and “t5” nothing")])
def test_a_long_list_of_what_shows_nothing_is_counted(
    data: RunData, n: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = verdicts.shown(data)[0]
    rows = pd.concat([one.rows.iloc[:1]] * n).assign(
        treatment=[f"t{i}" for i in range(n)], verdict=NOTHING, low=-1, high=1
    )
    monkeypatch.setattr(verdicts, "shown", lambda _: [one._replace(rows=rows)])
    assert said in verdicts.verdict_findings(data)[0]


@pytest.mark.parametrize(("p_holm", "stands"), [(0.2, False), (0.01, True)])
def test_a_correction_may_take_the_only_difference_away(
    data: RunData, p_holm: float, stands: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = verdicts.shown(data)[0]
    rows = one.rows.iloc[:3].assign(p_holm=[p_holm, 0.01, 0.5], low=[-2, -2, -2], high=[-1, 1, 1])
    monkeypatch.setattr(verdicts, "shown", lambda _: [one._replace(rows=rows)])
    assert verdicts.verdict_findings(data)[1] == (
        "Corrected for 3 treatments (Holm), the one difference to the reference that excludes zero "
        f"{'stands' if stands else 'does not stand'} (p < .050)."
    )


def test_verdict_tables_hold_every_number(data: RunData) -> None:
    tables = verdicts.verdict_tables(data)
    parts = verdicts.shown(data)
    assert len(tables) == len(parts) == 3
    for table, one in zip(tables, parts, strict=True):
        assert len(table.heads) == 6
        for (name, cells), row in zip(table.rows, one.rows.to_dict("records"), strict=True):
            assert name == row["treatment"]
            beyond = Estimate.of(row, "control_value", "control_low", "control_high").text(signed=True)
            assert [cell.text for cell in cells] == [
                *(row["verdict"], Estimate.of(row).text(signed=True), number(row["p_holm"])),
                *((beyond, row["control"]) if row["n_controls"] else ("–", "–")),
            ]
            assert cells[0].strong == (row["verdict"] == BEATS_ALL)


def test_a_matrix_has_single_effects_pairs_and_interactions_in_their_places(data: RunData) -> None:
    order, refused, found = interactions.matrices(data)
    assert order == ["vhr", "boost", "vdd", "mask", "m3id"]
    assert refused == {("vdd", "m3id")}
    assert [one.title for one in found] == ["CHAIR_i", "Recall", "POPE F1 (adversarial)"]
    one = found[0]
    ax = interactions.interaction_panel(order, one.single, one.both, one.interaction, "chair_i", refused=refused)
    texts = {tuple(np.floor(text.get_position()).astype(int)): text for text in labelled(ax, "number")}
    table = data.table("interactions")
    assert table is not None
    own = table[table["metric"] == "chair_i"].set_index(["first", "second"])
    for row, name in enumerate(order):
        assert texts[row, row].get_text() == number(one.single[name].value, signed=True) + "*" * (name != "m3id")
        for column in range(row + 1, len(order)):
            pair = (name, order[column])
            if pair in refused:
                assert (column, row) not in texts
                assert (row, column) not in texts
                continue
            beyond, both = texts[column, row], texts[row, column]  # x is the column, y the row
            assert beyond.get_text().rstrip("*") == number(own.loc[pair, "value"], signed=True)
            assert both.get_text().rstrip("*") == number(own.loc[pair, "both_value"], signed=True)
            assert (beyond.get_fontweight() == "bold") == beyond.get_text().endswith("*") == (pair == ("vhr", "boost"))
    hatched = labelled(ax, "refused")
    assert sorted(tuple(map(int, one.get_xy())) for one in hatched) == [(2, 4), (4, 2)]
    assert all(one.get_hatch() for one in hatched)
    assert len(labelled(ax, "single")) == 5


@pytest.mark.parametrize(("measure", "sign"), [("chair_i", -1), ("recall", 1)])
def test_blue_is_better_and_zero_in_the_middle(measure: str, sign: int) -> None:
    single = {"a": Estimate(0.2 * sign), "b": Estimate(-0.1 * sign)}
    ax = interactions.interaction_panel(["a", "b"], single, {("a", "b"): Estimate(0.0)}, {}, measure)
    cells = {tuple(map(int, one.get_xy())): np.array(one.get_facecolor()[:3]) for one in labelled(ax, "cell")}
    better, worse, none, missing = cells[0, 0], cells[1, 1], cells[0, 1], cells[1, 0]
    assert better == pytest.approx(to_rgb(interactions.BLUE), abs=0.01), "the largest is at the end of the scale"
    assert worse[0] > worse[2]
    assert np.ptp(none) < 0.02
    assert (missing == 1).all()


def test_numbers_are_legible_on_every_colour() -> None:
    """4.5 : 1, as the web's guidelines ask of small text."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for value in np.linspace(-1, 1, 21):
        single = {"a": Estimate(1.0), "b": Estimate(float(value))}
        ax = interactions.interaction_panel(["a", "b"], single, {}, {}, "recall")
        cell = next(one for one in labelled(ax, "cell") if one.get_xy() == (1, 1))
        text = next(one for one in labelled(ax, "number") if one.get_position() == (1.5, 1.5))
        dark, light = sorted(luminance(to_rgb(one)) for one in (cell.get_facecolor(), text.get_color()))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_numbers_fit_into_cells(composed_run: Path) -> None:
    for width in (WIDE, NARROW):
        drawn = figure(composed_run, "interaction_matrix", width=width)
        drawn.canvas.draw()
        for ax in drawn.axes:
            cell = ax.transData.transform((1, 0))[0] - ax.transData.transform((0, 0))[0]
            for text in labelled(ax, "number"):
                assert text.get_window_extent().width <= cell


def test_interactions_in_words(data: RunData) -> None:
    said = interactions.interaction_findings(data)
    assert said[0] == (
        "Of the 9 pairs, 1 has an interaction in CHAIR_i whose interval excludes zero (about .5 would by chance): “vhr” with "
        "“boost” (+.040 [+.025, +.055], worse than the sum)."
    ).replace(", +.055", ",\N{NO-BREAK SPACE}+.055")
    assert said[1] == "Corrected for the number of pairs (Holm), “vhr+boost” stands."
    assert said[-1] == "“vdd” and “m3id” do not run together: ImageContrast and M3ID are both contrasts."
    assert any("none has an interaction in POPE F1 (adversarial)" in one for one in said)


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", NEW)
def test_figures_at_both_widths(composed_run: Path, name: str, width: float) -> None:
    assert figure(composed_run, name, width=width).get_figwidth() == pytest.approx(width)
    one, data = run_figures(RunData(composed_run))[name], RunData(composed_run)
    assert "n = " in one.note(data)
    assert one.note(data).endswith(".")
    for text in (one.note(data), *one.shows(data)):
        assert not set("{}") & set(text)
        assert "nan" not in text.lower()


def test_panels_draw_on_the_axes_they_are_given(data: RunData) -> None:
    axes = new_figure().subplots(1, 2)
    assert verdicts.verdict_panel(verdicts.shown(data)[0].rows, "chair_i", axes[0]) is axes[0]
    assert interactions.interaction_panel(["a"], {}, {}, {}, "f1", axes[1]) is axes[1]
    with pytest.raises(InputError, match="control_low"):
        verdicts.verdict_panel(verdicts.shown(data)[0].rows.drop(columns="control_low"), "chair_i")


def test_pairs_are_in_a_figure_of_their_own(data: RunData, composed_run: Path) -> None:
    drawn = figure(composed_run, "chair").axes[0]
    names = [label.get_text() for label in drawn.get_yticklabels()]
    assert names == data.drawn
    assert not any("+" in one for one in names)
    assert "vhr_random" in names


def test_of_many_conditions_controls_are_left_to_the_verdicts(data: RunData) -> None:
    info = [("baseline", "reference", None)]
    for number_ in range(MANY // 2):
        info += [(f"t{number_}", "treatment", None), (f"t{number_}_c", "control", f"t{number_}")]
    data._tables["condition_info"] = pd.DataFrame(info, columns=["condition", "role", "control_of"])
    assert len(info) > MANY
    assert data.drawn == ["baseline", *(f"t{number_}" for number_ in range(MANY // 2))]


def test_of_many_treatments_no_curves_are_drawn(demo_run: Path) -> None:
    assert {"recall_curve", "mention_index"} <= set(figure_names(demo_run))
    data = RunData(demo_run)
    info = [("baseline", "reference", None), *((f"t{number_}", "treatment", None) for number_ in range(MANY))]
    data._tables["condition_info"] = pd.DataFrame(info, columns=["condition", "role", "control_of"])
    assert len(data.drawn) > MANY
    assert compose.recall_curve(data, WIDE) is None
    assert compose.mention_index(data, WIDE) is None


def test_a_run_without_pairs_or_treatments_lacks_nothing(demo_run: Path) -> None:
    assert "interaction_matrix" not in figure_names(demo_run)
    with pytest.raises(InputError, match="no data for the figure 'interaction_matrix'"):
        figure(demo_run, "interaction_matrix")


def test_the_page_has_the_section_its_tables_and_the_pairs(composed_run: Path) -> None:
    page = write_report(composed_run).read_text(encoding="utf-8")
    for text in ("Does it beat its control?", "Two at a time", "strongest control", BEATS_ALL, "Table refused_pairs"):
        assert text in page
    assert page.index("Does it beat its control?") < page.index("What each condition changes")
