"""docs/calibration.md names a planted truth and a null of every probe, and no test that is not there."""

from __future__ import annotations

import ast
import re
from importlib.metadata import entry_points
from pathlib import Path

HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "docs" / "calibration.md").read_text(encoding="utf-8")


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`([\w./]+\.py)::(\w+)`", TEXT)
    assert len(named) > 30
    for file, name in named:
        tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
        assert name in {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}, f"{file}::{name}"


def test_every_probe_has_a_planted_truth_and_a_null_of_its_own() -> None:
    rows = re.findall(r"^\| (\w+) \| `([^`]+)` \| `([^`]+)` \| (.+) \|$", TEXT, re.MULTILINE)
    ours = {one.name for one in entry_points(group="slitlamp.probes") if one.value.startswith("probes:")}
    assert sorted(name for name, *_ in rows) == sorted(ours)
    tests = [test for _, planted, null, _ in rows for test in (planted, null)]
    assert len(set(tests)) == len(tests)
    assert all(re.search(r"\d", rate) for *_, rate in rows)
