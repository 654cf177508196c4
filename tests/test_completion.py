"""What the shell offers after a Tab, asked as a shell asks, and that it does not wait for torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slitlamp import completion
from slitlamp.experiments.config import Config


def offered(folder: Path, *words: str) -> list[str]:
    """What zsh or bash would be given for a command line that ends in `words`."""
    asked = {"_SLITLAMP_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("slitlamp", *words))}
    environment = {**os.environ, **asked, "COMP_CWORD": str(len(words))}
    program = "from slitlamp.cli import main; import sys; sys.argv = ['slitlamp']; main()"
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    ).stdout.split()


def test_commands_experiments_lists_and_keys(tmp_path: Path) -> None:
    assert {"run", "report"} == set(offered(tmp_path, "r"))
    assert "ima_fig2" in offered(tmp_path, "run", "ima_fig2")
    assert offered(tmp_path, "list", "inter") == ["interventions"]
    assert offered(tmp_path, "run", "demo", "--set", "batch") == ["batch_size="]
    assert offered(tmp_path, "inspect", "org") == ["organism", "organism/seed1"]


def test_runs_are_folders_with_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/one", "runs/two", "other"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/one/config.yaml").touch()
    assert completion.runs("") == ["runs/one"]
    assert completion.runs("runs/") == ["runs/one", "runs/two/"]
    assert completion.runs("o") == ["other/"]


def test_paths_of_a_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "mine.txt", "mine.json"):
        (tmp_path / name).touch()
    assert completion.experiments("mi") == ["mine.yaml"]
    assert completion.models("mi") == ["mine.json"]
    assert completion.experiments("") != []
    assert completion.experiments("nowhere/mi") == []


def test_every_key_of_a_configuration_is_offered() -> None:
    assert completion.settings("") == [f"{name}=" for name in Config.model_fields]


def test_completion_needs_no_torch() -> None:
    program = (
        "import sys; from slitlamp import completion as c; "
        "c.experiments(''), c.runs(''), c.models(''), c.settings(''), c.lists(''), c.dtypes(''); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
