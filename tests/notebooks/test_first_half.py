"""The first notebooks run as they are stored, with the repository's root as working directory."""

# Two modules, because the tests of one module run in one process: the notebooks take both.

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["01_first_look", "02_which_heads_see", "03_does_it_know_it_is_lying", "08_your_own_probe"]
)
def test_it_runs_as_stored(name: str, runs_as_stored: Callable[[str, Path], None]) -> None:
    runs_as_stored(name, ROOT)
