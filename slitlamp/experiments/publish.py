"""A small copy of a run to keep beside its configuration: figures, small tables, configuration and environment."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from PIL import Image

from slitlamp.errors import RunFolderError
from slitlamp.experiments import storage
from slitlamp.experiments.folder import CONFIG, ENVIRONMENT, FIGURES, TABLES
from slitlamp.experiments.run import Run

MAX_ROWS = 1000
"""Longest table that is kept; longer ones hold items or tokens and are made again by the run."""
_COLOURS = 128


def publish(run: Run, folder: str | Path) -> Path:
    """Copy what a reader needs of a finished run into `folder/<name of the run>`, in place of an earlier copy.

    Figures are kept as PNG of 128 colours, tables of up to 1,000 rows as CSV.

    Raises:
        RunFolderError: the run has not ended, or its report was not made.
    """
    if not run.finished:
        raise RunFolderError(f"the run in {run.folder} has not ended; run it again to finish it")
    figures = sorted((run.folder / FIGURES).glob("*.png"))
    if not figures:
        raise RunFolderError(
            f"the run in {run.folder} has no figures; make its report first: slitlamp report {run.folder}"
        )
    target = Path(folder) / run.folder.resolve().name
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for name in (CONFIG, ENVIRONMENT):
        shutil.copyfile(run.folder / name, target / name)
    for path in figures:
        storage.write_bytes(target / path.name, _small(path))
    for path in sorted((run.folder / TABLES).glob("*.parquet")):
        frame = storage.read_table(path)
        if len(frame) <= MAX_ROWS:
            text = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
            storage.write_bytes(target / TABLES / f"{path.stem}.csv", text.encode())
    return target


def _small(path: Path) -> bytes:
    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    stream = io.BytesIO()
    reduced.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
