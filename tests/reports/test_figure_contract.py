"""What every panel and every figure owes its reader, held for all of them at once.

Panels are found by looking for them: a new one without an example table fails here.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from figure_geometry import alike_in_grey, numbers, outside_limits, problems, texts
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.text import Text
from panel_examples import Example, examples

import slitlamp.reports
from slitlamp.errors import InputError
from slitlamp.reports import panels
from slitlamp.reports.figures import to_svg
from slitlamp.reports.style import NARROW, WIDE, new_figure

SHARED = ("slitlamp.reports.draw", "slitlamp.reports.style", "slitlamp.reports.panels")
"""Modules of what panels are made of."""


def found_panels() -> dict[str, Callable[..., Axes]]:
    """Every public function of the package that says it returns Axes."""
    found: dict[str, Callable[..., Axes]] = {}
    for module in pkgutil.iter_modules(slitlamp.reports.__path__, "slitlamp.reports."):
        if module.name in SHARED:
            continue
        for name, function in vars(importlib.import_module(module.name)).items():
            if name.startswith("_") or not inspect.isfunction(function) or function.__module__ != module.name:
                continue
            if inspect.signature(function).return_annotation in (Axes, "Axes"):
                assert name not in found, f"two panels are called {name}"
                found[name] = function
    return found


PANELS = found_panels()


def named(labels: list[Text]) -> bool:
    """Whether the ticks of an axis are names, which need no label: the other axis has the same, or their numbers."""
    return any(letter.isalpha() for label in labels for letter in label.get_text())


@pytest.fixture(scope="module")
def example_of() -> dict[str, Example]:
    return examples()


def call(name: str, example: Example, ax: Axes | None = None) -> Axes:
    return PANELS[name](*example.args, ax=ax, **example.kwargs)


def test_every_panel_has_an_example_and_is_offered_to_notebooks() -> None:
    assert set(PANELS) == set(examples())
    assert set(PANELS) == set(panels.__all__)
    assert all(getattr(panels, name) is function for name, function in PANELS.items())


@pytest.mark.parametrize("name", PANELS)
def test_axes_are_optional_and_documented(name: str) -> None:
    parameter = inspect.signature(PANELS[name]).parameters["ax"]
    assert parameter.default is None
    assert parameter.annotation == "Axes | None"
    assert inspect.getdoc(PANELS[name])


@pytest.mark.parametrize("name", PANELS)
def test_a_panel_draws_the_numbers_of_its_table(name: str, example_of: dict[str, Example]) -> None:
    example = example_of[name]
    ax = call(name, example)
    drawn = numbers(ax)
    for column in example.columns:
        wanted = example.scale * example.args[0][column].dropna().to_numpy(dtype=float)
        assert len(wanted)
        for value in wanted:
            assert np.isclose(drawn, value, rtol=1e-5, atol=1e-9).any(), f"{column} {value} is not drawn"
    for place in example.lines:
        across = [line for line in ax.get_lines() if {*line.get_xdata()} == {place} or {*line.get_ydata()} == {place}]
        assert across, f"no line at {place}"
    steps = [patch for patch in ax.patches if isinstance(patch, StepPatch)]
    sums = [float(np.sum(patch.get_data().values)) for patch in steps]
    if example.shares:
        assert sums == pytest.approx([1.0] * example.shares)
    assert not outside_limits(ax)


@pytest.mark.parametrize("name", PANELS)
def test_a_panel_draws_on_the_axes_it_is_given_under_the_style_sheet(name: str, example_of: dict[str, Example]) -> None:
    example = example_of[name]
    ax = new_figure().add_subplot()
    assert call(name, example, ax) is ax
    alone = call(name, example)
    assert alone is not ax
    for one in texts(alone.figure):  # type: ignore[arg-type]
        assert one.get_fontfamily() == ["DejaVu Sans"]
        assert not one.get_parse_math(), "a dollar sign in a name is a dollar sign"


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", PANELS)
def test_a_panel_can_be_read(name: str, width: float, example_of: dict[str, Example]) -> None:
    example = example_of[name]
    figure = new_figure(width, example.height)
    more = example.narrow if width == NARROW else {}
    ax = PANELS[name](*example.args, ax=figure.add_subplot(), **example.kwargs, **more)
    assert problems(figure) == []
    assert alike_in_grey(ax) == []
    if not example.bare:
        said = any((ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")))
        assert said or named(ax.get_yticklabels())


@pytest.mark.parametrize("name", PANELS)
def test_a_panel_is_the_same_bytes_each_time(name: str, example_of: dict[str, Example]) -> None:
    example = example_of[name]
    one, other = (call(name, example).figure for _ in range(2))
    assert isinstance(one, Figure)
    assert isinstance(other, Figure)
    assert to_svg(one) == to_svg(other)


@pytest.mark.parametrize("name", [name for name in PANELS if name not in ("scene_panel", "attention_panel")])
def test_a_table_without_rows_or_columns_is_an_error_that_says_so(name: str, example_of: dict[str, Example]) -> None:
    example = example_of[name]
    first, *others = example.args
    if not isinstance(first, pd.DataFrame):
        with pytest.raises(InputError, match="empty"):
            PANELS[name](type(first)(), *others, **example.kwargs)
        return
    with pytest.raises(InputError, match="empty"):
        PANELS[name](first.iloc[:0], *others, **example.kwargs)
    if name != "overlap_map":  # its columns are names of data
        with pytest.raises(InputError, match="needs the column"):
            PANELS[name](pd.DataFrame({"nothing": [1]}), *others, **example.kwargs)


def test_the_example_in_the_documentation_of_panels_is_true(tmp_path: Path) -> None:
    assert "panels.head_map(run.table(" in (panels.__doc__ or "")
    path = tmp_path / "heads.png"
    figure = call("head_map", examples()["head_map"]).figure
    figure.savefig(path, dpi=200)  # type: ignore[union-attr]
    assert path.stat().st_size > 0
