"""Several processes on one run: the tables of one process, and nobody hangs when one of them stops."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import PartialState

from interventions import HeadReinforcement
from probes import HeadDivergence
from slitlamp.cli import main
from slitlamp.errors import InputError, RunFolderError
from slitlamp.experiments import Dataset, Experiment, load_dataset, load_run, processes, storage
from slitlamp.experiments.config import ModelConfig
from slitlamp.experiments.folder import Unit
from slitlamp.experiments.models import load_model
from slitlamp.experiments.processes import Processes
from slitlamp.experiments.runner import Runner
from slitlamp.tracing.store.reading import open_store
from slitlamp.vlm import VLM

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")

Make = Callable[[str], Experiment]
LIMIT = 150
"""Seconds after which a test takes processes for hanging."""


def contents(folder: Path) -> dict[str, bytes]:
    """What a run found: everything in its folder but environment.json, which holds times and the number of processes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "environment.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def untimed(folder: Path) -> dict[str, bytes]:
    """The contents without the figure of how long everything took, and the report that shows it."""
    return {name: data for name, data in contents(folder).items() if not re.search("generation_time|report.html", name)}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def make(vlm: VLM, captions: Dataset, pope: Dataset, tmp_path: Path) -> Make:
    def experiment(name: str) -> Experiment:
        return Experiment(
            model=vlm,
            dataset=[captions.take(3), pope.take(2)],
            conditions={"baseline": [], "vhr": [HeadReinforcement(alpha=3.0)]},
            controls=False,
            probes=[HeadDivergence(n_resamples=100)],
            max_new_tokens={"captions": 6, "pope": 2},
            batch_size=2,
            n_resamples=100,
            output=tmp_path / name,
            progress=False,
        )

    return experiment


def together(work: Callable[[int], Any], size: int, folder: Path) -> list[tuple[int, str]]:
    """Do the work in forked processes that are told of each other as by a launcher; their exit codes and errors.

    Nothing ends the others when one of them ends, as a launcher would do: they have to notice by themselves.
    """
    port = free_port()

    def target(rank: int) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        PartialState._reset_state()  # of whatever ran in the parent before
        error = ""
        try:
            work(rank)
        except Exception as failure:  # noqa: BLE001  it goes to the parent
            error = f"{type(failure).__name__}: {failure}"
        (folder / f"error-{rank}").write_text(error)
        os._exit(1 if error else 0)

    for rank in range(size):
        (folder / f"error-{rank}").unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=target, args=(rank,)) for rank in range(size)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork in a process that may have threads
        for child in children:
            child.start()
    found = []
    for rank, child in enumerate(children):
        child.join(LIMIT)
        if child.exitcode is None:
            child.kill()
            pytest.fail(f"process {rank} hangs")
        text = folder / f"error-{rank}"
        found.append((child.exitcode, text.read_text() if text.exists() else ""))
    return found


def stop_at(unit: int, how: Callable[[], Any]) -> None:
    """In this process only (a fork), do something just before its n-th unit."""
    ordinary, count = Runner._do, 0

    def counted(self: Runner, *rest: Any) -> Any:
        nonlocal count
        count += 1
        if count == unit:
            how()
        return ordinary(self, *rest)

    Runner._do = counted  # type: ignore[method-assign]


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def n_parts(folder: Path) -> int:
    return len(list((folder / "parts").rglob("*.safetensors")))


def test_the_tables_of_one_process(make: Make, tmp_path: Path) -> None:
    """Also when there are more processes than units of a data set, and each does something."""
    make("one").run()
    expected = contents(tmp_path / "one")
    assert any(name.startswith("tables/head_divergence") for name in expected)

    def work(rank: int) -> None:
        done: list[Unit] = []
        ordinary = Runner._do

        def noted(self: Runner, unit: Unit, *rest: Any) -> Any:
            done.append(unit)
            return ordinary(self, unit, *rest)

        Runner._do = noted  # type: ignore[method-assign]
        run = make("three").run()
        assert run.finished, "whoever returns, returns a finished run"
        (tmp_path / f"done-{rank}").write_text("\n".join(unit.file for unit in done))

    assert together(work, 3, tmp_path) == [(0, "")] * 3
    assert contents(tmp_path / "three") == expected
    shares = [(tmp_path / f"done-{rank}").read_text().splitlines() for rank in range(3)]
    n_units = 2 * (2 + 2)
    assert sorted(map(len, shares)) == [2, 3, 3]
    assert len({one for share in shares for one in share}) == n_units, "no unit is done twice"
    assert load_run(tmp_path / "three").environment["processes"] == 3

    assert together(lambda rank: make("three").run(), 2, tmp_path) == [(0, "")] * 2, "a finished run is taken as it is"
    assert contents(tmp_path / "three") == expected


def test_another_number_of_processes_goes_on(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("one").run()
    monkeypatch.setattr(processes, "PATIENCE", 2.0)
    monkeypatch.setattr(processes, "BEAT", 0.1)

    def dies(rank: int) -> None:
        stop_at(2, killed)
        make("many").run()

    (zero, _), (one, _) = together(dies, 2, tmp_path)
    assert zero == -signal.SIGKILL
    assert one in (-signal.SIGKILL, 1), "killed itself, or was told that the first process is gone"
    assert 1 <= n_parts(tmp_path / "many") <= 2

    def last_dies(rank: int) -> None:
        if rank == 2:
            stop_at(2, killed)
        make("many").run()

    (zero, said), (one, also_said), (two, _) = together(last_dies, 3, tmp_path)
    assert (zero, one, two) == (1, 1, -signal.SIGKILL)
    assert "process 2 of 3 has given no sign of life" in said + also_said
    assert 2 < n_parts(tmp_path / "many") < 8

    make("many").run()
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_an_error_in_one_process_stops_the_others(make: Make, tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("the item cannot be used\nsecond line")

    def work(rank: int) -> None:
        if rank == 1:
            stop_at(1, fails)
        make("failed").run()

    (zero, said), (one, own) = together(work, 2, tmp_path)
    assert (zero, one) == (1, 1)
    assert own.startswith("ValueError: the item cannot be used")
    assert "process 1 of 2 failed (ValueError: the item cannot be used), so this one stops too" in said
    assert said.startswith("RunFolderError")
    assert not load_run(tmp_path / "failed").finished


def test_an_error_in_the_first_process_is_told(make: Make, tmp_path: Path) -> None:
    """Also before the folder is open: it belongs to another experiment."""
    make("other").run()

    def work(rank: int) -> None:
        experiment = make("other")
        plan = experiment.check()
        experiment.seed = 1  # behind the back of the check, as when another process had made the folder just now
        Runner(plan).run()

    (zero, own), (one, said) = together(work, 2, tmp_path)
    assert (zero, one) == (1, 1)
    assert "seed: the folder has 0, this run has 1" in own
    assert "process 0 of 2 failed (RunFolderError: the run folder" in said


def test_the_first_process_is_killed(make: Make, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if rank == 0:
            stop_at(1, killed)
        make("headless").run()

    (zero, _), (one, said) = together(work, 2, tmp_path)
    assert (zero, one) == (-signal.SIGKILL, 1)
    assert "process 0 of 2, which the others report to, has ended" in said


def test_a_process_that_does_not_come(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MEETING", 2.0)
    (zero, said), (one, _) = together(lambda rank: make("lonely").run() if rank == 0 else None, 2, tmp_path)
    assert (zero, one) == (1, 0)
    assert said.startswith("RunFolderError: the processes of this run did not find each other within 2 s")


def test_units_that_do_not_arrive_are_missed(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that the other process writes to and this one does not see: no table is made from a part of the items."""
    monkeypatch.setattr("slitlamp.experiments.runner.VISIBLE", 0.5)

    def work(rank: int) -> None:
        if rank == 1:
            storage.write_arrays = lambda *rest: None  # type: ignore[assignment]
        make("apart").run()

    (zero, own), (one, said) = together(work, 2, tmp_path)
    assert (zero, one) == (1, 1)
    assert "4 finished units are not in" in own
    assert "process 0 of 2 failed" in said


def test_each_process_has_a_device_of_its_own(model_folder: Path) -> None:
    pair = Processes(1, 2, torch.device("cpu", 0))
    assert load_model(ModelConfig(id=str(model_folder)), pair).device == torch.device("cpu")
    with pytest.raises(InputError, match="spreads one model over all devices, but 2 processes"):
        load_model(ModelConfig(id=str(model_folder), device_map="auto"), pair)
    with pytest.raises(InputError, match="write 'cuda', or leave it out"):
        load_model(ModelConfig(id=str(model_folder), device="cuda:0"), pair)
    with pytest.raises((AssertionError, RuntimeError, ImportError)):  # no such device here: it was asked for
        load_model(ModelConfig(id=str(model_folder)), Processes(1, 2, torch.device("xpu", 1)))


def test_a_model_spread_over_the_processes_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = make("spread")
    runner = Runner(experiment.check())
    runner._processes = Processes(0, 2)
    monkeypatch.setattr(type(runner.vlm.model), "tp_size", 2)
    with pytest.raises(ValueError, match="spread over the processes"):
        runner._facts({})


def test_one_process_where_several_were_meant(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with processes.started_together() as alone:
        assert (alone.rank, alone.size, alone.is_main) == (0, 1, True)
    assert re.search("started one: its --cpu needs MPI", caplog.text)


def launched(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, in two processes by `accelerate launch`."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", str(free_port())]
    told = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, *launch, *arguments]
    told |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=told, capture_output=True, text=True, timeout=2 * LIMIT)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_accelerate_launch(
    model_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command under the launcher that people use: one report, the bytes of one process."""
    data = {"task": "captions", "name": "scenes", "images": str(data_folder / "images")}
    data |= {"instances": str(data_folder / "instances.json"), "synonyms": str(data_folder / "synonyms.txt")}
    config = {"model": str(model_folder), "datasets": [data], "folders": [str(data_folder)], "batch_size": 1}
    config |= {
        "conditions": {"baseline": [], "vhr": ["HeadReinforcement"]},
        "controls": False,
        "probes": ["HeadDivergence"],
    }
    config |= {"max_new_tokens": 4, "n_resamples": 100}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    both = launched(["-m", "slitlamp.cli", "run", "mine.yaml", "--output", "two"], tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slitlamp.cli._silence_libraries", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main(["run", "mine.yaml", "--output", "one"])
    assert not ended.value.code
    assert both.stdout.count("report: two/report.html") == 1
    found = load_run(tmp_path / "two")
    assert found.environment["processes"] == 2
    tables = untimed(tmp_path / "one")
    assert "tables/conditions.parquet" in tables
    assert untimed(tmp_path / "two") == tables


@pytest.mark.slow
def test_several_processes_fill_one_store(tmp_path: Path) -> None:
    """The script of the documentation under the launcher: every item once, half of them by each process."""
    document = Path(__file__).parents[2] / "docs" / "scale.md"
    script = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)[-1]
    (tmp_path / "script.py").write_text(script)
    launched(["script.py"], tmp_path)
    store = open_store(tmp_path / "activations")
    assert sorted(store.ids) == sorted(item.id for item in load_dataset("emoji_scenes/captions").take(6).items)
    assert [len(shard.ids) for shard in store.shards()] == [3, 3]
    assert not store.verify()


def test_a_store_that_is_gone_is_named() -> None:
    class Gone:
        def add(self, key: str, value: int) -> int:
            raise RuntimeError("Broken pipe")

        def set(self, key: str, value: str) -> None:
            raise RuntimeError("Broken pipe")

        check = set

    process = Processes(1, 2, store=Gone())
    with pytest.raises(RunFolderError, match="process 0 of 2, which the others report to, has ended"):
        process.check()
    process.close()
