import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from slitlamp.organism import training
from slitlamp.organism.stages import STAGES
from slitlamp.organism.training import TrainingConfig, learning_rate, train_organism

TINY = {
    "width": 16,
    "vision_steps": 6,
    "text_steps": 3,
    "joint_steps": 8,
    "refine_steps": 4,
    "vision_batch": 2,
    "text_batch": 2,
    "joint_batch": 2,
    "refine_batch": 2,
    "checkpoints": (0.0, 0.5),
    "save_every": 2,
    "log_every": 1,
    "data_workers": 0,
}
CHILD = """
import json, sys
from slitlamp.organism import training
from slitlamp.organism.stages import STAGES
from slitlamp.organism.training import TrainingConfig, train_organism
numbers = json.loads(sys.argv[2])
numbers["checkpoints"] = tuple(numbers["checkpoints"])
train_organism(sys.argv[1], TrainingConfig(**numbers))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    train_organism(output, TrainingConfig(**TINY))
    return output


def test_a_run_writes_what_it_promises(undisturbed: Path) -> None:
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == [
        "step-00000",
        "step-00004",
        "step-00008",
    ]
    rows = [json.loads(line) for line in (undisturbed / "log.jsonl").read_text().splitlines()]
    lengths = {"vision": 6, "text": 3, "joint": 8, "refine": 4}
    expected = [(stage, step + 1) for stage, length in lengths.items() for step in range(length)]
    assert [(row["stage"], row["step"]) for row in rows] == expected
    for folder in (undisturbed / "final", undisturbed / "checkpoints" / "step-00004"):
        LlavaForConditionalGeneration.from_pretrained(folder)


def test_vision_is_frozen_in_the_joint_stage_and_language_is_not(undisturbed: Path) -> None:
    start = load_file(undisturbed / "checkpoints" / "step-00000" / "model.safetensors")
    end = load_file(undisturbed / "final" / "model.safetensors")
    changed = {name for name in start if not start[name].equal(end[name])}
    assert not any("vision_tower" in name for name in changed)
    assert any("language_model" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)


def assert_same_run(found: Path, expected: Path) -> None:
    a, b = (load_file(run / "final" / "model.safetensors") for run in (found, expected))
    assert a.keys() == b.keys()
    assert all(a[name].equal(b[name]) for name in a)
    rows = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (found, expected)]
    for row in itertools.chain(*rows):
        del row["scenes_per_second"]
    assert rows[0] == rows[1]


def test_a_killed_run_ends_like_an_undisturbed_one(undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(output), json.dumps(TINY)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = output / "log.jsonl"
    deadline = time.monotonic() + 120
    while child.poll() is None and not (log.exists() and '"stage": "joint", "step": 5,' in log.read_text()):
        assert time.monotonic() < deadline, "the child did not reach the step"
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    train_organism(output, TrainingConfig(**TINY))
    assert_same_run(output, undisturbed)


@pytest.mark.parametrize(("stage", "step"), [("vision", 1), ("vision", 5), ("text", 3), ("joint", 7), ("refine", 3)])
def test_an_interrupted_run_ends_like_an_undisturbed_one(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, step: int
) -> None:
    output = tmp_path / "run"
    write = training._Trainer._log

    def stop(self: training._Trainer, at: str, done: int, *rest: Any) -> None:
        write(self, at, done, *rest)
        if (at, done) == (stage, step):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, "_log", stop)
        with pytest.raises(KeyboardInterrupt):
            train_organism(output, TrainingConfig(**TINY))
    assert not (output / "final").exists()
    train_organism(output, TrainingConfig(**TINY))
    assert_same_run(output, undisturbed)


def test_a_finished_run_is_left_alone(undisturbed: Path) -> None:
    before = (undisturbed / "final" / "model.safetensors").stat().st_mtime_ns
    assert train_organism(undisturbed, TrainingConfig(**TINY)) == undisturbed / "final"
    assert (undisturbed / "final" / "model.safetensors").stat().st_mtime_ns == before


def test_another_configuration_is_refused(undisturbed: Path) -> None:
    with pytest.raises(ValueError, match="joint_lr, seed"):
        train_organism(undisturbed, TrainingConfig(**TINY | {"seed": 9, "joint_lr": 1.0}))
    with pytest.raises(FileExistsError, match="resume"):
        train_organism(undisturbed, TrainingConfig(**TINY), resume=False)


def test_a_short_run_keeps_the_proportions() -> None:
    config = TrainingConfig()
    short = config.scaled(456)
    assert sum(short.stage_steps(stage) for stage in STAGES) == 456
    for stage in STAGES:
        assert short.stage_steps(stage) == pytest.approx(config.stage_steps(stage) / 10, abs=1)
    assert [config.scaled(4).stage_steps(stage) for stage in STAGES] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="at least 4"):
        config.scaled(3)


@pytest.mark.parametrize("numbers", [{"seed": -1}, {"joint_batch": 0}, {"checkpoints": (1.0,)}])
def test_impossible_numbers_are_refused(numbers: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="found"):
        TrainingConfig(**numbers)


def test_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, 100, 2.0, 0.03) for step in range(100)]
    assert rates[2] == rates[3] == 2.0
    assert rates[0] == pytest.approx(2 / 3)
    assert all(a > b for a, b in itertools.pairwise(rates[3:]))
    assert rates[-1] < 0.01
