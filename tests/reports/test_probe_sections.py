"""Figures that probes declare become figures of the run: in the report, by name, and drawn from the right tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure

from slitlamp.errors import UnknownNameError
from slitlamp.reports import figure, figure_names, probe_sections, write_report
from slitlamp.reports.causal import OUTCOMES, causal_panel
from slitlamp.reports.data import RunData
from slitlamp.reports.drawing import Drawing
from slitlamp.reports.figures import run_figures
from slitlamp.reports.style import new_figure

SEEN: list[dict[str, pd.DataFrame]] = []


def draw(tables: Any, width: float) -> Figure | None:
    SEEN.append(dict(tables))
    drawn = new_figure(width, 2)
    drawn.add_subplot().plot([0, 1])
    return drawn


def caption(tables: Any) -> str:
    return f"Over {len(tables['rows'])} rows."


DECLARED = {
    "dots": Drawing("Dots of it", caption, draw),
    "nothing": Drawing("Never drawn", caption, lambda tables, width: None),
}


def add_probe(run: Path, key: str, tables: dict[str, pd.DataFrame]) -> None:
    path = run / "environment.json"
    environment = json.loads(path.read_text())
    environment.setdefault("probes", {})[key] = len(environment.get("probes", {}))
    path.write_text(json.dumps(environment))
    for name, table in tables.items():
        table.to_parquet(run / "tables" / f"{key}_{name}.parquet")


def rows(*datasets: str) -> pd.DataFrame:
    return pd.DataFrame({"condition": "baseline", "dataset": list(datasets), "value": range(len(datasets))})


def said(*datasets: str) -> pd.DataFrame:
    return pd.DataFrame(
        {"condition": "baseline", "dataset": list(datasets), "summary": [f"Found in {one}." for one in datasets]}
    )


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> None:
    SEEN.clear()
    known = probe_sections.drawings
    monkeypatch.setattr(
        probe_sections, "drawings", lambda key: DECLARED if key.startswith(("my_probe", "token_ledger")) else known(key)
    )


@pytest.mark.usefixtures("declared")
def test_a_declared_figure_is_a_section_of_the_report(make_run: Callable[..., Path]) -> None:
    run = make_run()
    add_probe(run, "my_probe", {"rows": rows("one", "one", "two"), "summary": said("one", "two")})
    names = figure_names(run)
    assert names[-1] == "my_probe_dots"
    assert "my_probe_nothing" not in names
    page = write_report(run).read_text(encoding="utf-8")
    assert "Dots of it" in page
    assert "Over 2 rows. Shown: one, condition baseline." in page
    assert "Found in one." in page
    assert "Never drawn" not in page
    assert (run / "figures" / "my_probe_dots.svg").stat().st_size > 0
    assert SEEN[0]["rows"].columns.tolist() == ["value"]
    assert isinstance(figure(run, "my_probe_dots"), Figure)
    with pytest.raises(UnknownNameError, match="my_probe_dots"):
        figure(run, "my_probe_dot")


@pytest.mark.usefixtures("declared")
def test_the_token_ledger_comes_first(make_run: Callable[..., Path]) -> None:
    run = make_run()
    add_probe(run, "my_probe", {"rows": rows("one")})
    add_probe(run, "token_ledger", {"rows": rows("one")})
    names = figure_names(run)
    assert names[0] == "token_ledger_dots"
    assert names[-1] == "my_probe_dots"


@pytest.mark.usefixtures("declared")
def test_a_second_probe_of_a_name_has_its_own_tables(make_run: Callable[..., Path]) -> None:
    run = make_run()
    add_probe(run, "my_probe", {"rows": rows("one")})
    add_probe(run, "my_probe_2", {"rows": rows("one", "one")})
    data = RunData(run)
    assert len(probe_sections.probe_tables(data, "my_probe")["rows"]) == 1
    assert set(probe_sections.probe_tables(data, "my_probe")) == {"rows"}
    assert len(probe_sections.probe_tables(data, "my_probe_2")["rows"]) == 2


@pytest.mark.usefixtures("declared")
def test_titles_tell_two_probes_of_a_kind_apart(make_run: Callable[..., Path]) -> None:
    run = make_run()
    entries: list[object] = [
        {"MyProbe": {"layers": None, "at_word": "first_token", "seed": 0}},
        {"name": "MyProbe", "parameters": {"layers": [1, 2], "at_word": "first_token", "seed": 0}},
        {"MyProbe": {"layers": None, "at_word": "last", "seed": 0}},
        "Another",
    ]
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    (run / "config.yaml").write_text(
        yaml.safe_dump({**config, "probes": entries}, allow_unicode=True, sort_keys=False), encoding="utf-8"
    )
    environment = json.loads((run / "environment.json").read_text())
    keys = ["my_probe", "my_probe_2", "my_probe_3", "another"]
    environment["probes"] = {key: place for place, key in enumerate(keys)}
    (run / "environment.json").write_text(json.dumps(environment))
    titles = [
        "Dots of it (layers: not set, at word: first token)",
        "Dots of it (layers: 1 and 2, at word: first token)",
        "Dots of it (layers: not set, at word: last)",
    ]
    data = RunData(run)
    assert [run_figures(data)[f"{key}_dots"].title for key in keys[:3]] == titles
    assert probe_sections.difference(data, "another") == ""


@pytest.mark.usefixtures("declared")
def test_several_models_show_what_was_compared(make_run: Callable[..., Path]) -> None:
    run = make_run(
        ("baseline",), without=("conditions", "condition_info", "head_", "chair", "recall", "matched", "showcase")
    )
    mixed = rows("one").assign(model="a")
    add_probe(run, "my_probe", {"rows": mixed, "compare_rows": rows("one", "two", "three")})
    assert len(probe_sections.probe_tables(RunData(run), "my_probe")["rows"]) == 3
    assert figure_names(run) == ["my_probe_dots"]
    assert "Dots of it" in write_report(run).read_text(encoding="utf-8")


def test_a_causal_check_is_drawn_and_said(make_run: Callable[..., Path]) -> None:
    run = make_run()
    one = {"condition": "baseline", "dataset": "one", "target": "the 4 heads set to zero", "control": "4 random heads"}
    table = pd.DataFrame(
        [
            {
                **one, "outcome": outcome, "effect": 0.5, "low": 0.4, "high": 0.6, "control_effect": 0.1,
                "control_low": 0.05, "control_high": 0.15, "draws_min": 0.0, "draws_max": 0.3,
                "difference": 0.4, "difference_low": 0.3, "difference_high": 0.5,
                "ratio": 5.0, "ratio_low": 4.0, "ratio_high": 6.0, "draws_exceeded": 5, "n_draws": 5, "n_groups": 40,
                "n_tokens": 160, "p": 1 / 6, "finding": "more than every control",
            }
            for outcome in OUTCOMES
        ]
    )  # fmt: skip
    add_probe(run, "head_divergence", {"causal": table})
    page = write_report(run).read_text(encoding="utf-8")
    assert "Is it causal?" in page
    assert "5.0 times [4.0, 6.0], more than every control (5 of 5 draws exceeded, p 0.17)" in page
    drawn = figure(run, "head_divergence_causal")
    assert len(drawn.axes) == 4


def test_controls_of_a_target_stand_under_it_and_are_told_apart() -> None:
    names = [
        "a direction with a very long name that is added after some block",
        "the same direction taken out of the same block",
    ]
    kinds = {"random directions": 0.1, "directions of shuffled labels": 0.3}
    rows = [
        {
            "target": target, "control": kind, "effect": 0.5, "low": 0.4, "high": 0.6, "control_effect": value,
            "control_low": value - 0.05, "control_high": value + 0.05, "draws_min": 0.0, "draws_max": 0.6,
        }
        for target in names
        for kind, value in kinds.items()
    ]  # fmt: skip
    figure = new_figure(6.6, 2 * 0.9 + 1)
    panel = causal_panel(pd.DataFrame(rows), figure.add_subplot())
    points = [
        (one.get_label(), float(np.asarray(one.get_xdata())[0])) for one in panel.lines if one.get_marker() != "None"
    ]
    shown = [("what the probe points at", 0.5), *kinds.items()]
    assert points == shown * 2
    assert [list(one.get_xdata()) for one in panel.lines if one.get_label() == "_draws"] == [[0.0, 0.6]] * 4
    figure.canvas.draw()
    boxes = [one.get_window_extent() for one in panel.get_yticklabels()]
    assert not boxes[0].overlaps(boxes[1])
