"""`slitlamp doctor`: what it says, and that it notices what is wrong."""

from __future__ import annotations

from collections import namedtuple

import psutil
import pytest
import torch

from slitlamp import doctor
from slitlamp.errors import InputError
from slitlamp.experiments import registry
from slitlamp.vlm import VLM


def test_everything_is_looked_at_and_the_trial_agrees() -> None:
    found = doctor.examine()
    assert found.problems == []
    versions = dict(found.sections["Versions"])
    assert versions["torch"].startswith(torch.__version__.split("+")[0])
    assert "14: " in dict(found.sections["Probes and interventions"])["probes"]
    assert {"sdpa", "eager", "flash_attention_2"} <= set(dict(found.sections["Attention implementations"]))
    trial = dict(found.sections["Trial on the embedded model"])
    assert "the image shows" in trial["cpu"]
    assert len(trial) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()


def test_a_probe_that_cannot_be_loaded_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.find

    def find(kind: str, name: str) -> type:
        if name == "LogitLens":
            raise ImportError("no module named nowhere")
        return real(kind, name)

    monkeypatch.setattr(registry, "find", find)
    problems: list[str] = []
    doctor._plugins(problems)
    assert problems == ["the probe LogitLens cannot be loaded: no module named nowhere"]


def test_little_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "total available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(8e9, 0.5e9))
    problems: list[str] = []
    rows = dict(doctor._memory(problems))
    assert rows["memory"] == "0.5 GB free of 8.0 GB"
    assert problems[0].startswith("only 0.5 GB of memory are free")


def test_attention_that_does_not_agree_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._attention_weights
    drawn = iter([0.0, 0.01] * 9)
    monkeypatch.setattr(doctor, "_attention_weights", lambda vlm, generation: real(vlm, generation) + next(drawn))
    problems: list[str] = []
    doctor._trial(problems)
    assert "differs by 1.0e-02" in problems[0]


def test_a_model_that_does_not_run_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> VLM:
        raise InputError("no embedded model of seed 0")

    monkeypatch.setattr(VLM, "organism", refuse)
    problems: list[str] = []
    assert doctor._trial(problems) == []
    assert problems[0] == "the embedded model does not run on cpu: no embedded model of seed 0"
