"""The figures of a run by name: how each is drawn, what is drawn, and what it shows in words."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from slitlamp.errors import InputError, unknown
from slitlamp.reports import (
    compose,
    dose,
    findings,
    head_layers,
    interactions,
    notes,
    probe_findings,
    probe_sections,
    skipping,
    verdicts,
)
from slitlamp.reports.data import RunData
from slitlamp.reports.drawing import Drawing
from slitlamp.reports.style import WIDE, style

PNG_DPI: Final = 200
Draw = Callable[[RunData, float], Figure | None]


@dataclass(frozen=True)
class RunFigure:
    """A figure of a run: its title, how it is drawn (None: no data), its caption, and sentences on what it shows."""

    title: str
    draw: Draw
    note: Callable[[RunData], str]
    shows: Callable[[RunData], list[str]]


FIGURES: Final[dict[str, RunFigure]] = {
    "verdicts": RunFigure(
        "Does it beat its control?", verdicts.verdicts, verdicts.verdicts_note, verdicts.verdict_findings
    ),
    "differences": RunFigure(
        "What each condition changes", compose.differences, notes.differences, findings.control_findings
    ),
    "pope": RunFigure("POPE: yes/no questions", compose.pope, notes.pope, findings.pope_findings),
    "chair": RunFigure("CHAIR: hallucinated objects in captions", compose.chair, notes.chair, findings.chair_findings),
    "recall_curve": RunFigure(
        "CHAIR at equal recall", compose.recall_curve, notes.recall_curve, findings.matched_findings
    ),
    "head_divergence": RunFigure(
        "Which heads read the image",
        compose.head_divergence,
        notes.head_divergence,
        probe_findings.head_figure_findings,
    ),
    "t_vhd_histogram": RunFigure(
        "T-VHD of true and hallucinated objects",
        compose.t_vhd_histogram,
        notes.t_vhd_histogram,
        probe_findings.t_vhd_figure_findings,
    ),
    "caption_words": RunFigure(
        "Captioned scenes, word by word", compose.caption_words, notes.caption_words, probe_findings.scene_findings
    ),
    "mention_index": RunFigure(
        "Hallucination by order of mention", compose.mention_index, notes.mention_index, findings.mention_findings
    ),
}
"""The figures of scores and head divergence, in the order of the report; those of probes are found in the run."""

SWEEPS: Final[dict[str, RunFigure]] = {
    "reinforced_layers": RunFigure(
        "How many layers to reinforce",
        head_layers.reinforced_layers,
        head_layers.reinforced_layers_note,
        lambda data: [],
    ),
    "skipped_operations": RunFigure(
        "Computation that image tokens can skip",
        skipping.skipped_operations,
        skipping.skipped_operations_note,
        lambda data: [],
    ),
    "skipped_from": RunFigure(
        "From which block on", skipping.skipped_from, skipping.skipped_from_note, lambda data: []
    ),
    "subnetwork_masks": RunFigure(
        "Subnetworks against masks of equal size", skipping.subnetworks, skipping.subnetworks_note, lambda data: []
    ),
    "interaction_matrix": RunFigure(
        "Two at a time",
        interactions.interaction_matrix,
        interactions.interaction_note,
        interactions.interaction_findings,
    ),
    "dose_response": RunFigure("How much of it", dose.dose_response, dose.dose_response_note, dose.dose_findings),
    "generation_time": RunFigure(
        "What each condition costs", head_layers.generation_time, head_layers.generation_time_note, lambda data: []
    ),
}
"""Figures of runs whose conditions are of a certain form; other runs do not lack them."""


def run_figures(data: RunData) -> dict[str, RunFigure]:
    """Every figure that a run can have, in the order of the report: the token ledger first, other probes last."""
    declared = {
        name: _declared(drawing, key, said, probe_sections.difference(data, key))
        for name, (drawing, key, said) in probe_sections.declared(data).items()
    }
    first = {name: one for name, one in declared.items() if name.startswith(probe_sections.FIRST)}
    return {**first, **FIGURES, **SWEEPS, **declared}


def _declared(drawing: Drawing, key: str, said: list[str], difference: str) -> RunFigure:
    """A probe's figure; its title says how the probe differs from others of its kind in the run."""
    return RunFigure(
        f"{drawing.title} ({difference})" if difference else drawing.title,
        lambda data, width: drawing.draw(probe_sections.tables_of(data, key), width),
        lambda data: drawing.caption(probe_sections.tables_of(data, key)) + probe_sections.part_text(data, key),
        lambda data: said,
    )


def figure(run_folder: str | Path, name: str, *, width: float = WIDE) -> Figure:
    """Draw one figure of a run from its tables.

    Args:
        run_folder: the folder of the run.
        name: one of `figure_names`.
        width: in inches; panels are stacked where it is narrow.

    Raises:
        UnknownNameError: there is no such figure.
        InputError: the run has no data for it.
    """
    data = RunData(Path(run_folder))
    known = run_figures(data)
    if name not in known:
        raise unknown("figure", name, known)
    drawn = known[name].draw(data, width)
    if drawn is None:
        available = ", ".join(figure_names(run_folder)) or "none"
        raise InputError(f"the run {run_folder} has no data for the figure {name!r}; figures of this run: {available}")
    return drawn


def figure_names(run_folder: str | Path) -> list[str]:
    """Names of the figures that a run has data for."""
    data = RunData(Path(run_folder))
    return [name for name, one in run_figures(data).items() if one.draw(data, WIDE) is not None]


def to_svg(drawn: Figure) -> bytes:
    """The figure as SVG whose bytes depend on nothing but the figure: no date, fixed identifiers, letters as outlines."""
    return _printed(FigureCanvasSVG(drawn).print_svg, {"Date": None, "Creator": None})


def to_png(drawn: Figure, dpi: int = PNG_DPI) -> bytes:
    """The figure as PNG without a software tag."""
    drawn.dpi = dpi
    return _printed(FigureCanvasAgg(drawn).print_png, {"Software": None})


def _printed(print_to: Callable[..., None], metadata: dict[str, str | None]) -> bytes:
    """What a canvas prints. `savefig` would draw everything twice: once for a bounding box that nothing here asks for."""
    buffer = io.BytesIO()
    with style(), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the report has it as text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        print_to(buffer, metadata=metadata)
    return buffer.getvalue()
