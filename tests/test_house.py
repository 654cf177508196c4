"""The rules of the house that no linter knows: what lies where, how imports run, how big things are."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import slitlamp

ROOT = Path(__file__).resolve().parent.parent
MB = 1_000_000


def tracked_files() -> list[Path]:
    """The files in git and those about to be: not ignored, and still there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_hugging_face_datasets_is_not_shadowed_at_the_root() -> None:
    """transformer_lens imports Hugging Face's `datasets`; with the root first on sys.path it must still find it."""
    code = "import sys, datasets; print(sys.path[0] == '', callable(datasets.load_dataset), datasets.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, has_load_dataset, where = done.stdout.split(maxsplit=2)
    assert (first, has_load_dataset) == ("True", "True")
    assert not Path(where.strip()).is_relative_to(ROOT / "datasets")


def test_no_python_under_datasets_and_experiments() -> None:
    """Neither folder is a package: the first would shadow another's, the second is YAML that anybody may copy."""
    python = [
        p for p in tracked_files() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in {"datasets", "experiments"}
    ]
    assert python == []


def test_imports_go_one_way(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The contracts in pyproject.toml; `make lint` shows the same with the chain of imports that breaks one."""
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    report = capsys.readouterr().out
    assert status == 0, report
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert f"{len(contracts)} kept, 0 broken" in report


def test_no_file_is_too_big() -> None:
    big = {str(p.relative_to(ROOT)): p.stat().st_size for p in tracked_files() if p.stat().st_size > 12 * MB}
    assert big == {}


def test_shipped_weights_and_data_stay_small() -> None:
    """What every `pip install` and every clone carries that is not code: weights, pictures, tables, templates."""
    folders = ("slitlamp", "probes", "interventions", "datasets", "experiments")
    kept_here = ROOT / "experiments" / "results"  # figures for readers of the repository, not in the wheel
    shipped = [
        p
        for p in tracked_files()
        if p.relative_to(ROOT).parts[0] in folders and p.suffix != ".py" and not p.is_relative_to(kept_here)
    ]
    assert any(p.suffix == ".safetensors" for p in shipped)
    assert sum(p.stat().st_size for p in shipped) < 20 * MB


def test_no_weights_in_pickle() -> None:
    pickles = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
    assert [p for p in tracked_files() if p.suffix in pickles] == []


def test_one_version_everywhere() -> None:
    assert f"## [{slitlamp.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {slitlamp.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_constraints_pin_every_requirement_exactly() -> None:
    """Every direct requirement is pinned, and nothing ties the environment to one build of torch."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert all("+" not in version for version in pins.values())
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-")) or name in {"triton", "torchvision"}]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {requirement.split(">=")[0].lower() for requirement in wanted}
    assert names - {name.lower() for name in pins} == set()
