"""The figures of `TruthfulDirection`."""

from __future__ import annotations

from typing import Final

from slitlamp.reports.drawing import Drawing

FIGURES: Final[dict[str, Drawing]] = {}
