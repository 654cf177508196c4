"""What a drawn figure looks like, read from its artists: texts and where they lie, numbers, and series told apart in grey."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import Collection, PathCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle, StepPatch
from matplotlib.text import Text
from numpy.typing import NDArray

TOLERANCE = 1.5
"""Pixels at 100 dpi by which texts may meet: extents hold the room above and below letters, and are rounded to pixels."""
SMALLEST = 7.0
GREY_STEP = 0.15


def texts(figure: Figure) -> list[Text]:
    """The texts that are drawn: those of ticks outside of the limits are not."""
    found: list[Text] = []

    def visit(artist: Artist) -> None:
        if not artist.get_visible():
            return
        if isinstance(artist, Text):
            found.append(artist)
        elif isinstance(artist, Axis):
            low, high = sorted(artist.get_view_interval())
            margin = 1e-6 * (high - low)
            for tick, place in zip(artist.get_major_ticks(), artist.get_majorticklocs(), strict=False):
                if low - margin <= place <= high + margin:
                    found.extend(one for one in (tick.label1, tick.label2) if one.get_visible())
            found.extend((artist.label, artist.offsetText))
        else:
            for child in artist.get_children():
                if not (isinstance(artist, Axes) and not artist.axison and isinstance(child, Axis)):
                    visit(child)

    visit(figure)
    return [one for one in found if one.get_text().strip()]


def problems(figure: Figure) -> list[str]:
    """Texts that are too small, leave the figure or lie on each other."""
    figure.canvas.draw()
    drawn = [(one, one.get_window_extent()) for one in texts(figure)]
    width, height = figure.bbox.size
    found = [
        f"{one.get_fontsize():.1f} points: {one.get_text()!r}" for one, _ in drawn if one.get_fontsize() < SMALLEST
    ]
    for one, box in drawn:
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1:
            found.append(f"outside: {one.get_text()!r}")
    upright = [
        (one, box) for one, box in drawn if one.get_rotation() % 90 == 0
    ]  # the box of a slanted text is not its area
    for (one, box), (other, its) in itertools.combinations(upright, 2):
        across = min(box.x1, its.x1) - max(box.x0, its.x0)
        down = min(box.y1, its.y1) - max(box.y0, its.y0)
        if across > TOLERANCE and down > TOLERANCE:
            found.append(f"{one.get_text()!r} lies on {other.get_text()!r}")
    return found


def numbers(ax: Axes) -> NDArray[np.float64]:
    """Every finite number that the artists of a panel hold: ends of lines and bars, points, cells."""
    found: list[NDArray[np.float64]] = []
    for artist in ax.get_children():
        if isinstance(artist, Line2D):
            found += [np.asarray(artist.get_xdata(orig=False), float), np.asarray(artist.get_ydata(orig=False), float)]
        elif isinstance(artist, StepPatch):
            found.append(np.asarray(artist.get_data().values, float))
        elif isinstance(artist, Rectangle):
            (x, y), width, height = artist.get_xy(), artist.get_width(), artist.get_height()
            found.append(np.array([x, y, x + width, y + height, width, height]))
        elif isinstance(artist, Collection):
            found += [np.asarray(path.vertices, float) for path in artist.get_paths()]
            if artist.get_array() is not None:
                found.append(np.ma.asarray(artist.get_array()).filled(np.nan).astype(float))
            if isinstance(artist, PathCollection):
                found.append(np.ma.asarray(artist.get_offsets()).filled(np.nan).astype(float))
    for image in ax.images:
        found.append(np.ma.asarray(image.get_array()).astype(float).filled(np.nan))
    flat = np.concatenate([one.ravel() for one in found]) if found else np.zeros(0)
    return flat[np.isfinite(flat)]


def outside_limits(ax: Axes) -> list[str]:
    """Points of lines that the limits of their panel cut off."""
    (left, right), (low, high) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
    found = []
    for line in ax.get_lines():
        if line.get_transform() != ax.transData:
            continue
        x, y = np.asarray(line.get_xdata(orig=False), float), np.asarray(line.get_ydata(orig=False), float)
        known = np.isfinite(x) & np.isfinite(y)
        x, y = x[known], y[known]
        across, down = 1e-6 * (right - left), 1e-6 * (high - low)
        if ((x < left - across) | (x > right + across) | (y < low - down) | (y > high + down)).any():
            found.append(str(line.get_label()))
    return found


def grey(colour: object) -> float:
    """How light a colour is in a grey print, 0 to 1."""
    return float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114)))  # type: ignore[arg-type]


def alike_in_grey(ax: Axes) -> list[str]:
    """Pairs of series of different colours that nothing but colour tells apart. Bars and bands belong to a marked series."""
    series: list[tuple[str, str, tuple[object, ...]]] = [*_lines(ax), *_bars(ax)]
    found = []
    for (name, colour, look), (other, its, second) in itertools.combinations(series, 2):
        if to_rgb(colour) != to_rgb(its) and look == second and abs(grey(colour) - grey(its)) < GREY_STEP:
            found.append(f"{name} and {other}")
    return found


def _lines(ax: Axes) -> Iterator[tuple[str, str, tuple[object, ...]]]:
    for line in ax.get_lines():
        dashes = str(line._dash_pattern) if len(line.get_xdata()) > 1 else ""  # type: ignore[attr-defined]
        marker = str(line.get_marker()) if line.get_marker() not in ("", "None", None, "none", " ") else ""
        interval = not marker and len(line.get_xdata()) == 2  # a bar or a line of reference
        if not interval:
            filled = bool(marker) and to_rgb(line.get_markerfacecolor()) != (1, 1, 1)
            yield str(line.get_label()), line.get_color(), ("line", dashes, marker, filled)


def _bars(ax: Axes) -> Iterator[tuple[str, str, tuple[object, ...]]]:
    for patch in ax.patches:
        if isinstance(patch, StepPatch) and not patch.get_fill():
            yield str(patch.get_label()), patch.get_edgecolor(), ("steps", str(patch._dash_pattern))  # type: ignore[attr-defined]
        elif isinstance(patch, PathPatch | Rectangle) and patch.get_hatch() is None and patch.get_label() == "_time":
            yield str(patch.get_label()), patch.get_facecolor(), ("bar",)
