"""Figures of one captioned scene: the image, its words coloured by T-VHD, and attention over the image as a spotlight."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from numpy.typing import NDArray
from PIL import Image

from slitlamp.errors import InputError
from slitlamp.reports.draw import bare, is_narrow, need
from slitlamp.reports.showcase import Scene
from slitlamp.reports.style import BLUE, TOKEN_COLOURS, VERMILLION, WIDE, axes_or_new, new_figure, styled
from slitlamp.reports.wording import number
from slitlamp.reports.words import Scale

_DARKEST = 0.22
"""What is left of the light where there is no attention."""
MAX_MAPS = 6


@styled
def scene_panel(image: Image.Image, ax: Axes | None = None, *, title: str = "") -> Axes:
    """The image as the model was given it."""
    ax = axes_or_new(ax, width=2.4, height=2.4)
    ax.imshow(np.asarray(image.convert("RGB")), interpolation="nearest")
    ax.set_title(title, pad=3)
    return bare(ax)


@styled
def attention_panel(
    image: Image.Image,
    attention: NDArray[np.float64],
    ax: Axes | None = None,
    *,
    title: str = "",
    vmax: float | None = None,
) -> Axes:
    """The image lit by attention: the patch with the most attention in full light, the others in proportion.

    Args:
        image: the image.
        attention: [row, column], one weight per patch, not negative.
        ax: where to draw; a new figure if None.
        title: title of the panel.
        vmax: the weight of full light; give all panels the same to compare them. By default the largest of this one.
    """
    weights = np.asarray(attention, dtype=np.float64)
    if weights.ndim != 2 or not np.isfinite(weights).all() or weights.min() < 0:
        raise InputError(f"attention is a grid of finite weights that are not negative; found shape {weights.shape}")
    ax = axes_or_new(ax, width=2.4, height=2.4)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    most = weights.max() if vmax is None else vmax
    light = np.clip(weights / most, 0, 1) if most > 0 else weights
    light = np.asarray(
        Image.fromarray(light.astype(np.float32)).resize(image.size, Image.Resampling.NEAREST), dtype=np.float64
    )
    ax.imshow(pixels * (_DARKEST + (1 - _DARKEST) * light[..., None]), interpolation="nearest", vmin=0, vmax=1)
    ax.set_title(title, pad=3)
    return bare(ax)


@styled
def words_panel(words: pd.DataFrame, ax: Axes | None = None, *, value: str = "t_vhd", size: float = 9.5) -> Axes:
    """Words on backgrounds of their values, flowing over lines; objects underlined, hallucinated ones dotted and crossed.

    Args:
        words: columns word, label and `value`, in order.
        ax: where to draw, at its present size; a new figure if None.
        value: the column of values; NaN has no background.
        size: size of the letters in points.
    """
    need(words, "word", "label", value)
    ax = axes_or_new(ax, height=2.0)
    box = ax.get_window_extent()
    dpi = ax.figure.get_dpi()
    width, height = box.width / dpi * 72, box.height / dpi * 72
    font, scale = FontProperties(size=size), Scale.of([float(one) for one in words[value]])
    line, gap, x, y = size * 1.85, size * 0.6, 0.0, size * 1.5
    for row in words.to_dict("records"):
        kind = str(row["label"])
        text = str(row["word"]) + (" ✗" if kind == "hallucinated" else "")
        length = _length(text, font)
        if x and x + length > width:
            x, y = 0.0, y + line
        known = math.isfinite(float(row[value]))
        background, ink = scale.colours(float(row[value])) if known else ("none", "#1a1a1a")
        if known:
            ax.add_patch(_box(x - 1.5, y - size * 1.05, length + 3, size * 1.5, background))
        ax.text(x, y, text, fontproperties=font, color=ink, ha="left", va="baseline", label="_word")
        if kind in ("object", "hallucinated"):
            under, style = y + size * 0.6, "-" if kind == "object" else (0, (1.5, 1.2))
            ax.plot(
                [x, x + length],
                [under, under],
                color=TOKEN_COLOURS[kind],
                linewidth=1.6,
                linestyle=style,
                label=f"_mark_{kind}",
            )
        x += length + gap
    ax.set_xlim(0, width)
    ax.set_ylim(max(height, y + size), 0)
    ax.set_axis_off()
    return ax


def caption_words(scene: Scene, width: float = WIDE, *, with_words: bool = True) -> Figure:
    """The scene, its words coloured by T-VHD, and the attention of the chosen heads at the words that name objects.

    Args:
        scene: one scene of a run.
        width: inches.
        with_words: without it the words are left out (the report sets them as text).
    """
    maps = _maps(scene)
    narrow = is_narrow(width)
    columns = 2 if narrow else 4 if len(maps) == 4 else 3
    rows = math.ceil(len(maps) / columns)
    side = (width - 0.25 * (columns + 1)) / columns
    picture = min(side, width / 3.3) if not narrow else side
    text_width = width - 0.5 if narrow else width - picture - 0.8
    letters = sum(len(str(word)) + 2 for word in scene.words["word"])
    text_height = max(1.0, 0.25 * math.ceil(letters * 0.085 / text_width) + 0.35)
    top = 0.0
    if with_words:
        top = picture + 0.4 + text_height if narrow else max(picture, text_height) + 0.45
    two_lines = side < 1.7
    block = side + (0.72 if two_lines else 0.6)
    height = max(top + rows * block + 0.1, 1.0)
    figure = new_figure(width, height)
    figure.set_layout_engine("none")

    def place(left: float, upper: float, wide: float, high: float) -> Axes:
        return figure.add_axes((left / width, 1 - (upper + high) / height, wide / width, high / height))

    if with_words:
        if scene.image is not None:
            scene_panel(scene.image, place(0.25, 0.3, picture, picture), title="the image")
        if narrow:
            words_panel(scene.words, place(0.25, picture + 0.4, text_width, text_height))
        else:
            words_panel(scene.words, place(picture + 0.55, 0.2, text_width, max(picture, text_height)))
    for i, (title, note, grid, colour) in enumerate(maps):
        left, upper = 0.25 + (i % columns) * (side + 0.25), top + 0.3 + (i // columns) * block
        ax = place(left, upper, side, side)
        if scene.image is not None:
            attention_panel(scene.image, grid, ax)
        _texts(ax, title, note.replace(" (", "\n(") if two_lines else note, colour)
    return figure


@styled
def _texts(ax: Axes, title: str, note: str, colour: str) -> None:
    """Title over a map and note under it."""
    bare(ax).set_title(title, color=colour, pad=3)
    ax.text(0, -0.03, note, transform=ax.transAxes, ha="left", va="top", fontsize=8, linespacing=1.15)


def _maps(scene: Scene) -> list[tuple[str, str, NDArray[np.float64], str]]:
    """Title, note, grid and colour of every map: one per word that names an object, the first ones if there are many."""
    maps = []
    for row in scene.mentions.to_dict("records")[:MAX_MAPS]:
        grid, other = scene.grid(int(row["index"])), scene.grid(int(row["index"]), chosen=False)
        if grid is None:
            continue
        wrong = str(row["label"]) == "hallucinated"
        note = f"on the image {number(float(grid.sum()), 2)}"
        if other is not None:
            note += f" (others {number(float(other.sum()), 2)})"
        maps.append((f"{row['word']}{' ✗' if wrong else ''}", note, grid, VERMILLION if wrong else BLUE))
    return maps


def _length(text: str, font: FontProperties) -> float:
    """Width of a text in points, without drawing it."""
    clean = text.strip()
    if not clean:
        return 0.0
    outline = TextPath((0, 0), clean, prop=font, usetex=False).get_extents()
    return float(outline.width) * 1.03 + 0.15 * float(font.get_size_in_points())  # hinting widens letters on screens


def _box(x: float, y: float, width: float, height: float, colour: str) -> Rectangle:
    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="none", label="_background")
