"""The one style sheet of all figures: seaborn ticks, Okabe-Ito colours, and a second cue (marker, line, hatch) beside colour."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, ParamSpec, TypeVar

import matplotlib
import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK: Final = "#1a1a1a"
GREY: Final = "#767676"
FAINT: Final = "#d9d9d9"
# Okabe and Ito (2008), without the yellow that vanishes on white; black is kept for the reference.
BLUE: Final = "#0072B2"
VERMILLION: Final = "#D55E00"
GREEN: Final = "#009E73"
ORANGE: Final = "#E69F00"
PURPLE: Final = "#CC79A7"
SKY: Final = "#56B4E9"

WIDE: Final = 6.6
"""Width of a figure in inches for a page."""
NARROW: Final = 3.5
"""Width of a figure in inches for a phone; the text keeps its size."""

MAP: Final = "cividis"
"""Colour map of heat maps: its lightness rises evenly, so it survives grey print and colour blindness."""
WORDS: Final = LinearSegmentedColormap.from_list(
    "slitlamp_words", ["#ffffff", "#fde6c4", "#f0a35c", "#b34a17", "#5c1f07"]
)
"""Colour map of words: the least is white (the page), the most dark brown; lightness falls evenly."""

TOKEN_LABELS: Final = ("object", "hallucinated", "other")
TOKEN_NAMES: Final = {"object": "object in the image", "hallucinated": "hallucinated object", "other": "other words"}
TOKEN_COLOURS: Final = {"object": BLUE, "hallucinated": VERMILLION, "other": GREY}
TOKEN_LINES: Final[dict[str, Any]] = {"object": "-", "hallucinated": (0, (5, 2)), "other": (0, (1, 1.5))}
TOKEN_HATCHES: Final = {"object": "", "hallucinated": "////", "other": ""}
TOKEN_MARKERS: Final = {"object": "o", "hallucinated": "X", "other": "s"}

_RC: Final[dict[str, Any]] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "axes.edgecolor": "#4d4d4d",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.unicode_minus": True,
    # Names are the user's: a dollar sign in one is a dollar sign, never mathematics.
    "text.parse_math": False,
    "svg.hashsalt": "slitlamp",
    "svg.fonttype": "path",
    "path.simplify": True,
}

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def style() -> Iterator[None]:
    """Draw under the style sheet; matplotlib's settings are as before afterwards."""
    settings: dict[Any, Any] = {**seaborn.axes_style("ticks"), **_RC}
    with matplotlib.rc_context(settings):
        yield


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function under the style sheet."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with style():
            return function(*args, **kwargs)

    return wrapper


def new_figure(width: float = WIDE, height: float = 3.0) -> Figure:
    """An empty figure (inches) with an Agg canvas, unknown to pyplot: nothing to close, no window, no global state."""
    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
    return figure


def axes_or_new(ax: Axes | None, width: float = WIDE, height: float = 3.0) -> Axes:
    """The given axes, or the only ones of a new figure."""
    return new_figure(width, height).add_subplot() if ax is None else ax


@dataclass(frozen=True)
class ConditionStyle:
    """How one condition is drawn everywhere in a run: colour, marker and line style all tell it apart."""

    colour: str
    marker: str
    line: Any
    filled: bool

    @property
    def face(self) -> str:
        """Fill colour of the marker: white for controls, so that they differ from treatments without colour."""
        return self.colour if self.filled else "white"


_TREATMENTS: Final = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "D"), (PURPLE, "^"), (ORANGE, "P"), (SKY, "X"))
_CONTROLS: Final = ((ORANGE, "v"), (GREEN, "^"), (PURPLE, "s"), (SKY, "D"), (VERMILLION, "<"), (BLUE, ">"))
_TREATMENT_LINES: Final[tuple[Any, ...]] = ("-", (0, (6, 1.5)), (0, (4, 1.5, 1, 1.5)))
_CONTROL_LINES: Final[tuple[Any, ...]] = ((0, (2, 1.2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5, 1, 1.5)), (0, (7, 3)))


def condition_styles(names: Sequence[str], roles: Mapping[str, str] | None = None) -> dict[str, ConditionStyle]:
    """One style per condition, in order; `roles` maps names to reference, treatment or control.

    Without roles the first condition is the reference and the others are treatments.
    """
    roles = roles or {name: "reference" if i == 0 else "treatment" for i, name in enumerate(names)}
    styles: dict[str, ConditionStyle] = {}
    n_treatments = n_controls = 0
    for name in names:
        role = roles.get(name, "treatment")
        if role == "reference":
            styles[name] = ConditionStyle(INK, "d", "-", True)
        elif role == "control":
            colour, marker = _CONTROLS[n_controls % len(_CONTROLS)]
            styles[name] = ConditionStyle(colour, marker, _CONTROL_LINES[n_controls % len(_CONTROL_LINES)], False)
            n_controls += 1
        else:
            colour, marker = _TREATMENTS[n_treatments % len(_TREATMENTS)]
            styles[name] = ConditionStyle(colour, marker, _TREATMENT_LINES[n_treatments % len(_TREATMENT_LINES)], True)
            n_treatments += 1
    return styles


def short_names(names: Sequence[str], limit: int = 22) -> dict[str, str]:
    """Names cut to `limit` characters for axes and legends, still different from each other."""
    short: dict[str, str] = {}
    used: set[str] = set()
    for name in names:
        flat = " ".join(str(name).split()) or "(no name)"
        cut = flat if len(flat) <= limit else flat[: limit - 1].rstrip() + "…"
        number = 2
        while cut in used:
            tail = f"… {number}"
            cut, number = flat[: limit - len(tail)].rstrip() + tail, number + 1
        used.add(cut)
        short[str(name)] = cut
    return short


def contrast_ink(background: Sequence[float]) -> str:
    """Black or white, whichever is easier to read on a colour (red, green, blue in 0..1; WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in list(background)[:3]]
    luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
    return "#000000" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "#ffffff"
