"""What is stored in the notebooks: outputs of one clean run, small, without anything that changes from run to run."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
NOTEBOOKS = FOLDER.parents[1] / "notebooks"
LARGEST = 800_000


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_is_run_by_one_of_the_two_modules(notebooks: dict[str, Any]) -> None:
    halves = "".join((FOLDER / f"test_{half}_half.py").read_text() for half in ("first", "second"))
    assert sorted(re.findall(r'"(\d\d_\w+)"', halves)) == list(notebooks)


def test_cells_were_run_once_and_in_order_without_errors(notebooks: dict[str, Any]) -> None:
    for name, notebook in notebooks.items():
        counts = [cell.execution_count for cell in code_cells(notebook)]
        assert counts == list(range(1, len(counts) + 1)), name
        outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
        assert not [one for one in outputs if one.output_type == "error"], name
        assert not [one for one in outputs if one.get("name") == "stderr"], f"{name}: warnings or progress bars"


def test_nothing_is_stored_that_changes_from_run_to_run(notebooks: dict[str, Any]) -> None:
    for name, notebook in notebooks.items():
        assert set(notebook.metadata) == {"kernelspec", "language_info"}, name
        assert notebook.metadata.language_info == {"name": "python"}, name
        assert notebook.metadata.kernelspec.name == "python3", name
        assert [cell.metadata for cell in code_cells(notebook)] == [{}] * len(code_cells(notebook)), name
        text = (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
        assert len(text) < LARGEST, name
        written = re.sub(r'"image/png": "[^"]*"', "", text)
        assert not re.search(r"/(tmp|home|root|Users)/|0x[0-9a-f]{8}", written), f"{name}: a path or an address"


def test_everything_that_is_shown_has_words_before_and_after(
    notebooks: dict[str, Any], kinds: Callable[[Any], list[list[tuple[str, ...]]]]
) -> None:
    for name, notebook in notebooks.items():
        shows = iter(kinds(notebook))
        pictured = [cell.cell_type == "code" and bool(next(shows)) for cell in notebook.cells]
        words = [cell.cell_type == "markdown" for cell in notebook.cells]
        for place, shown in enumerate(pictured):
            if shown:
                # a figure and the table of its numbers may stand together
                before = next(words[at] for at in range(place - 1, -1, -1) if not pictured[at])
                after = next(words[at] for at in range(place + 1, len(words)) if not pictured[at])
                assert before, f"{name}, cell {place}"
                assert after, f"{name}, cell {place}"


def test_helper_functions_are_short(notebooks: dict[str, Any]) -> None:
    for name, notebook in notebooks.items():
        for cell in code_cells(notebook):
            tree = ast.parse(re.sub(r"(?m)^%.*$", "", cell.source))
            for function in [one for one in tree.body if isinstance(one, ast.FunctionDef)]:
                assert len(ast.unparse(function).splitlines()) <= 12, f"{name}: {function.name}"


def test_links_lead_somewhere(notebooks: dict[str, Any]) -> None:
    pages = {
        name: "\n".join(cell.source for cell in one.cells if cell.cell_type == "markdown")
        for name, one in notebooks.items()
    }
    pages["README"] = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    for name, page in pages.items():
        for target in re.findall(r"\]\(([^)#:]+)\)", page):
            assert (NOTEBOOKS / target).exists(), f"{name}: {target}"
        for path in re.findall(r"`(experiments/[^`*]+)`", page):
            assert (NOTEBOOKS.parent / path).exists(), f"{name}: {path}"


def test_the_table_of_contents_names_every_notebook(notebooks: dict[str, Any]) -> None:
    readme = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\w+)\.ipynb\)", readme) == list(notebooks)
