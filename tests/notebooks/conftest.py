"""Running a notebook in a fresh kernel of this interpreter, and what its outputs are."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
SECONDS = 120
"""Of one processor, per notebook: on an idle core the time it takes, and the same on one that is shared."""
HANGS = 300
"""Seconds after which a cell is given up."""

Kinds = list[list[tuple[str, ...]]]
Check = Callable[[str, Path], None]


def processor_seconds() -> float:
    """Of all child processes that have ended, such as a kernel that was shut down."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read_notebook(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def kinds(notebook: Any) -> Kinds:
    """Per code cell, what kind each output is; neighbouring pieces of one stream are one output.

    What libraries write to stderr is left out: other machines are warned of other things.
    """
    found: Kinds = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            mine: list[tuple[str, ...]] = []
            for output in cell.outputs:
                if output.get("name") == "stderr":
                    continue
                kind = (output.output_type, output.get("name", ""), *sorted(output.get("data", {})))
                if output.output_type != "stream" or mine[-1:] != [kind]:
                    mine.append(kind)
            found.append(mine)
    return found


@pytest.fixture(name="kinds")
def kinds_fixture() -> Callable[[Any], Kinds]:
    return kinds


@pytest.fixture
def notebooks() -> dict[str, Any]:
    """The stored notebooks by name."""
    return {path.stem: read_notebook(path.stem) for path in sorted(NOTEBOOKS.glob("*.ipynb"))}


@pytest.fixture
def runs_as_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """(name, working directory) -> runs the notebook and compares it with what is stored.

    The kernel is this interpreter, from a kernel spec of our own, because none need be installed; what it writes to temporary
    places goes to a folder that must be empty in the end.
    """
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}

    def check(name: str, folder: Path) -> None:
        stored = read_notebook(name)
        fresh = read_notebook(name)
        client = NotebookClient(
            fresh, timeout=HANGS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        files = sorted(NOTEBOOKS.rglob("*"))
        before = processor_seconds()
        client.execute(env=environment)
        assert processor_seconds() - before < SECONDS
        assert kinds(fresh) == kinds(stored)
        assert list(temporary.iterdir()) == []
        assert sorted(NOTEBOOKS.rglob("*")) == files

    return check
