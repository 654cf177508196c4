"""How the figures of a probe are declared: a title, a caption, and a function of the probe's tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from slitlamp.reports.style import WIDE, style

Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Drawing:
    """A figure of a probe's tables.

    Attributes:
        title: what the figure is about.
        caption: (tables) -> what was measured, on what, how often, and how to read it.
        function: (tables, width in inches) -> the figure, or None where the tables hold nothing to draw. It stacks its
            panels where `width` is narrow (`slitlamp.reports.draw.is_narrow`).
    """

    title: str
    caption: Callable[[Tables], str]
    function: Callable[[Tables, float], Figure | None]

    def draw(self, tables: Tables, width: float = WIDE) -> Figure | None:
        """Draw it under the style sheet; None where the tables hold nothing to draw."""
        with style():
            return self.function(tables, width)
