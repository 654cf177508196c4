"""A run that is killed (SIGKILL) goes on where it stopped and ends with the bytes of an undisturbed one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from interventions import HeadReinforcement
from probes import HeadDivergence
from slitlamp.experiments import Dataset, Experiment, storage
from slitlamp.experiments.folder import RunFolder, Unit
from slitlamp.experiments.runner import Runner
from slitlamp.vlm import VLM

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a run folder but environment.json, which holds times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "environment.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def in_child(work: Callable[[], Any], *, kill_at: int, before: bool) -> int:
    """Do the work in a child that kills itself with SIGKILL at its n-th file, just before or after the file appears."""

    def target() -> None:
        replace, count = os.replace, 0

        def deadly(source: Any, goal: Any) -> None:
            nonlocal count
            count += 1
            if count == kill_at and before:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, goal)
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        storage.os.replace = deadly  # in the child only: it has a copy of everything
        work()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process that may have threads
        child = multiprocessing.get_context("fork").Process(target=target)
        child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def test_killed_again_and_again(vlm: VLM, captions: Dataset, pope: Dataset, tmp_path: Path) -> None:
    """The n-th process is killed at its (3 n)-th file, so that every kind of file is hit: units, tables, environment."""

    def experiment(name: str) -> Experiment:
        return Experiment(
            model=vlm,
            dataset=[captions.take(3), pope.take(1)],
            conditions={"baseline": [], "vhr": [HeadReinforcement(alpha=3.0)]},
            controls=False,
            probes=[HeadDivergence(n_resamples=100)],
            showcase=True,
            max_new_tokens={"captions": 6, "pope": 2},
            batch_size=2,
            n_resamples=100,
            output=tmp_path / name,
            progress=False,
        )

    experiment("undisturbed").run()
    expected = contents(tmp_path / "undisturbed")
    assert any(name.startswith("tables/head_divergence") for name in expected)

    exits = []
    while not exits or exits[-1] != 0:
        exits.append(in_child(experiment("killed").run, kill_at=3 * len(exits) + 1, before=len(exits) % 2 == 0))
        assert exits[-1] in (0, -signal.SIGKILL)
        assert len(exits) < 20, "the run does not come to its end"
    assert len(exits) > 6
    assert contents(tmp_path / "killed") == expected


def test_finished_units_are_not_done_again(
    vlm: VLM, captions: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def experiment() -> Experiment:
        return Experiment(
            model=vlm,
            dataset=captions,
            max_new_tokens=2,
            batch_size=2,
            n_resamples=100,
            output=tmp_path,
            progress=False,
        )

    # Files in order: config.yaml, environment.json, the first unit.
    assert in_child(experiment().run, kill_at=3, before=False) == -signal.SIGKILL
    done: list[int] = []
    ordinary = Runner._do

    def counted(self: Runner, unit: Unit, *rest: Any) -> Any:
        done.append(unit.chunk)
        return ordinary(self, unit, *rest)

    monkeypatch.setattr(Runner, "_do", counted)
    experiment().run()
    assert done == [1]


def test_a_damaged_unit_is_done_again(vlm: VLM, captions: Dataset, tmp_path: Path) -> None:
    def experiment(name: str) -> Experiment:
        return Experiment(
            model=vlm,
            dataset=captions,
            max_new_tokens=2,
            batch_size=2,
            n_resamples=100,
            output=tmp_path / name,
            progress=False,
        )

    experiment("good").run()
    assert in_child(experiment("bad").run, kill_at=3, before=False) == -signal.SIGKILL
    part = RunFolder(tmp_path / "bad").unit_path(Unit("baseline", captions.name, 0))
    part.write_bytes(part.read_bytes()[:20])
    experiment("bad").run()
    assert contents(tmp_path / "bad") == contents(tmp_path / "good")
