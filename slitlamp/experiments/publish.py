"""A small copy of a run to keep beside its configuration: figures, small tables, configuration and environment."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from slitlamp.errors import RunFolderError
from slitlamp.experiments import storage
from slitlamp.experiments.folder import CONFIG, ENVIRONMENT, FIGURES, TABLES
from slitlamp.experiments.run import Run
from slitlamp.experiments.summary import summary

MAX_ROWS = 500
"""Longest table that is kept; longer ones hold items or tokens and are made again by the run."""
SWEEP = "dose_response"
IN_SWEEP = {"chair", "differences", "mention_index", "pope", "recall_curve"}
"""Figures that are left out where there is one of scores against strength, which shows the same of many conditions better."""
README = "README.md"
_COLOURS = 128


def publish(run: Run, folder: str | Path, captions: Mapping[str, str] | None = None) -> Path:
    """Copy what a reader needs of a finished run into `folder/<name of the run>`, in place of an earlier copy.

    Figures are kept as PNG of 128 colours, of a sweep of one strength those that show it; tables of up to 500 rows as CSV;
    README.md says what was found and shows the figures. The README.md of `folder` lists all copies in it, in place of an earlier
    list.

    Args:
        run: of which the copy is.
        folder: where it goes.
        captions: by the name of a figure: what is drawn, on what and how often.

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
    if any(path.stem == SWEEP for path in figures):
        figures = [path for path in figures if path.stem not in IN_SWEEP]
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
    storage.write_bytes(
        target / README, _page(run, target.name, [path.stem for path in figures], captions or {}).encode()
    )
    storage.write_bytes(Path(folder) / README, _index(Path(folder)).encode())
    return target


def _page(run: Run, name: str, figures: list[str], captions: Mapping[str, str]) -> str:
    """What a run found, and its figures with their captions."""
    environment = run.environment
    one = next(iter(environment["models"].values())) if "models" in environment else environment
    made = f"`slitlamp run {name}`, {seconds_of(environment)} s on {one['device']}, seed {one['seed']}."
    lines = [f"# {run.config.get('title') or name}", "", made, "", *(f"- {plain(line)}" for line in summary(run))]
    for figure in figures:
        lines += ["", f"![{figure}]({figure}.png)"]
        lines += ["", plain(captions[figure])] if captions.get(figure) else []
    return "\n".join(lines) + "\n"


def _index(folder: Path) -> str:
    """The table of all copies in a folder."""
    lines = ["# Results", "", "Copies of runs, made by `slitlamp publish`: what was found, figures, tables.", ""]
    lines += ["| experiment | title | seconds |", "|---|---|---|"]
    for config in sorted(folder.glob(f"*/{CONFIG}")):
        name = config.parent.name
        title = yaml.safe_load(config.read_text(encoding="utf-8")).get("title") or ""
        lines.append(
            f"| [{name}]({name}/{README}) | {plain(title)} | {seconds_of(storage.read_json(config.parent / ENVIRONMENT))} |"
        )
    return "\n".join(lines) + "\n"


def seconds_of(environment: dict[str, Any]) -> int:
    """How long a run took, by its environment."""
    return round(environment["timing"]["total"])


def plain(text: str) -> str:
    """As Markdown shows it: no character of it is markup."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)


def _small(path: Path) -> bytes:
    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    stream = io.BytesIO()
    reduced.save(stream, format="PNG", optimize=True)
    return stream.getvalue()
