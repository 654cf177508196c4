"""Words of a caption coloured by a value, as HTML with a legend. Every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from markupsafe import Markup, escape
from matplotlib.colors import to_hex

from slitlamp.reports.style import TOKEN_NAMES, WORDS, contrast_ink
from slitlamp.reports.wording import number


@dataclass(frozen=True)
class Scale:
    """The range of values that the colours span."""

    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Scale:
        """From the finite values; 0 to 1 where there is none."""
        finite = [float(value) for value in values if math.isfinite(value)]
        return Scale(min(finite), max(finite)) if finite else Scale(0.0, 1.0)

    def place(self, value: float) -> float:
        """Where a value lies, 0 to 1; values outside are put at the ends; 0 where all values are the same."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low))) if self.high > self.low else 0.0

    def colours(self, value: float) -> tuple[str, str]:
        """Background and text colour, as hexadecimal RGB."""
        background = WORDS(self.place(value))
        return to_hex(background), contrast_ink(background)


def coloured_words(
    words: pd.DataFrame, caption: str | None = None, *, value: str = "t_vhd", unit: str = "T-VHD"
) -> Markup:
    """The words of a caption on backgrounds of their values.

    Args:
        words: columns word and `value`, in order; label, and start and end (characters of `caption`), are used if there.
        caption: the whole text, for exact spacing; words are separated by spaces without it.
        value: the column of values; NaN is shown without a colour.
        unit: what the value is, for the tooltip.
    """
    scale = Scale.of([float(one) for one in words[value]])
    exact = (
        caption is not None
        and {"start", "end"} <= set(words.columns)
        and bool(words[["start", "end"]].notna().all().all())
    )
    parts: list[Markup] = []
    place = 0
    for i, row in enumerate(words.to_dict("records")):
        text = str(row["word"])
        if exact and caption is not None:
            start, end = int(row["start"]), int(row["end"])
            parts.append(escape(caption[place:start]))
            text, place = caption[start:end] or text, max(place, end)
        elif i:
            parts.append(Markup(" "))
        parts.append(_word(text, float(row[value]), str(row.get("label") or "other"), scale, unit))
    if exact and caption is not None:
        parts.append(escape(caption[place:]))
    return Markup('<p class="words" dir="auto">{}</p>').format(Markup("").join(parts))


def _word(text: str, value: float, label: str, scale: Scale, unit: str) -> Markup:
    kind = label if label in TOKEN_NAMES else "other"
    mark = Markup('<sup aria-hidden="true">✗</sup>') if kind == "hallucinated" else Markup("")
    note = TOKEN_NAMES[kind] if kind != "other" else ""
    if not math.isfinite(value):
        title = "; ".join(part for part in (f"{unit} not measured", note) if part)
        return Markup('<span class="word {}" title="{}">{}{}</span>').format(kind, title, text, mark)
    background, ink = scale.colours(value)
    title = "; ".join(part for part in (f"{unit} {number(value, 2)}", note) if part)
    return Markup('<span class="word {}" style="background:{};color:{}" title="{}">{}{}</span>').format(
        kind, background, ink, title, text, mark
    )


def words_legend(words: pd.DataFrame, *, value: str = "t_vhd", unit: str = "T-VHD") -> Markup:
    """The legend: the bar of colours with its ends, and what the marks on words mean."""
    scale = Scale.of([float(one) for one in words[value]])
    stops = ", ".join(to_hex(WORDS(step / 8)) for step in range(9))
    bar = Markup(
        '<span class="scale"><span>{} {}</span><span class="bar" style="background:linear-gradient(90deg, {})"></span>'
        "<span>{}</span></span>"
    ).format(unit, number(scale.low, 1), stops, number(scale.high, 1))
    labels = set(words["label"]) if "label" in words else set()
    marks = [
        Markup('<span class="key"><span class="word {}">{}{}</span></span>').format(
            kind, TOKEN_NAMES[kind], Markup("<sup>✗</sup>") if kind == "hallucinated" else ""
        )
        for kind in ("object", "hallucinated")
        if kind in labels
    ]
    return Markup('<p class="legend">{} {}</p>').format(bar, Markup(" ").join(marks))
