"""What a published copy of a run says of its figures."""

from __future__ import annotations

from pathlib import Path

from slitlamp.experiments.folder import FIGURES
from slitlamp.reports.data import RunData
from slitlamp.reports.figures import run_figures
from slitlamp.reports.style import WIDE


def figure_captions(folder: str | Path) -> dict[str, str]:
    """The captions of the figures that a run's report has drawn, by name: what is drawn, on what and how often.

    A file of a figure that the run has no data for has none.

    Raises:
        RunFolderError: the folder holds no finished run.
    """
    data = RunData(Path(folder))
    drawn = {path.stem for path in (data.folder / FIGURES).glob("*.png")}
    known = {name: one for name, one in run_figures(data).items() if name in drawn}
    return {name: one.note(data) for name, one in known.items() if one.draw(data, WIDE) is not None}
