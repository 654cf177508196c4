"""The other notebooks run as they are stored, with their own folder as working directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["04_outliers_and_sinks", "05_steer_it", "06_compose_and_compare", "07_your_own_model"]
)
def test_it_runs_as_stored(name: str, runs_as_stored: Callable[[str, Path], None]) -> None:
    runs_as_stored(name, NOTEBOOKS)
