"""A wheel built from this repository is complete, installs into an empty environment and works there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pandas as pd
import pytest

import slitlamp

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("slitlamp", "probes", "interventions")
MB = 1_000_000
# Where a file of the repository lies in the wheel, when that is not the same place.
MOVED = {"datasets/emoji_scenes/": "slitlamp/data/emoji_scenes/", "experiments/": "slitlamp/data/experiments/"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command that must succeed; its whole output is the message when it does not."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with the hatchling of this environment (no network)."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def expected_names() -> set[str]:
    """Every file of the three packages, the data set and the experiments but their results, at its place in the wheel."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    expected = {name for name in listed if name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    for source, target in MOVED.items():
        expected |= {target + name.removeprefix(source) for name in listed if name.startswith(source)}
    return {name for name in expected if name and not name.startswith("slitlamp/data/experiments/results/")}


def test_the_wheel_holds_every_file_and_nothing_else(names: set[str]) -> None:
    info = f"slitlamp-{slitlamp.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == expected_names()


def test_the_wheel_installs_three_packages_only(names: set[str]) -> None:
    """No top-level `datasets` or `experiments`: the first would shadow Hugging Face's package."""
    tops = {name.split("/")[0] for name in names}
    assert tops == {*PACKAGES, f"slitlamp-{slitlamp.__version__}.dist-info"}
    assert [name for name in names if name.startswith("slitlamp/data/") and name.endswith(".py")] == []


@pytest.mark.parametrize(
    ("folder", "ending"),
    [
        ("slitlamp/", "py.typed"),
        ("slitlamp/organism/", ".safetensors"),
        ("slitlamp/organism/", "config.json"),
        ("slitlamp/organism/", "atlas.png"),
        ("slitlamp/reports/templates/", ".j2"),
        ("slitlamp/data/emoji_scenes/", ".png"),
        ("slitlamp/data/emoji_scenes/", ".json"),
        ("slitlamp/data/emoji_scenes/", ".jsonl"),
        ("slitlamp/data/emoji_scenes/", ".md"),
        ("slitlamp/data/experiments/", ".yaml"),
        ("slitlamp/data/experiments/masks/", ".safetensors"),
        ("slitlamp/data/experiments/masks/", ".md"),
    ],
)
def test_the_wheel_carries(names: set[str], folder: str, ending: str) -> None:
    """Named one by one as well: a file that is missing in the repository is missing in both lists above."""
    assert [name for name in names if name.startswith(folder) and name.endswith(ending)]


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 25 * MB


def test_the_metadata_says_what_the_project_says(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"slitlamp-{slitlamp.__version__}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        assert "MIT License" in archive.read(f"{info}/licenses/LICENSE").decode()
    assert (metadata["Name"], metadata["Version"]) == ("slitlamp", slitlamp.__version__)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    for line in (
        "[console_scripts]\nslitlamp = slitlamp.cli:main",
        "HeadDivergence = probes:HeadDivergence",
        "HeadReinforcement = interventions:HeadReinforcement",
    ):
        assert line in entry_points


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel installed in it; its dependencies are borrowed from this one.

    Installing torch and the rest anew would take minutes and test pip, not our wheel. A .pth line puts this
    environment's site-packages LAST on the new one's path: slitlamp can only come from the wheel, as the .pth files
    inside a folder that was added by a .pth line, the editable install's among them, are not read.
    """
    home = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", home, cwd=home)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=home)
    (site,) = (home / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A working directory that is no part of a repository."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def test_the_three_packages_come_from_the_wheel(environment: Path, elsewhere: Path) -> None:
    code = """
import importlib.metadata, importlib.util, sys
for name in ("slitlamp", "probes", "interventions"):
    print(importlib.util.find_spec(name).origin)
print(importlib.metadata.distribution("slitlamp").locate_file("slitlamp"))
print([entry for entry in sys.path if entry == ROOT])
""".replace("ROOT", repr(str(ROOT)))
    lines = run(environment / "bin" / "python", "-c", code, cwd=elsewhere).splitlines()
    assert lines.pop() == "[]"
    assert len(lines) == 4
    for line in lines:
        assert Path(line).is_relative_to(environment), line


def test_the_command_finds_each_plug_in_once(environment: Path, elsewhere: Path) -> None:
    """By entry point, and not a second time through the editable install in the borrowed folder."""
    command = environment / "bin" / "slitlamp"
    assert run(command, "--version", cwd=elsewhere).strip() == slitlamp.__version__
    lines = run(command, "list", "probes", cwd=elsewhere, COLUMNS="200").splitlines()
    assert [line.split()[0] for line in lines if line.startswith("HeadDivergence")] == ["HeadDivergence"]


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(environment: Path, elsewhere: Path) -> None:
    """Weights, data, configuration and templates come from the wheel, and everything written goes to the run folder."""
    # One thread: four images give two nothing to do, and spinning threads starve whatever else runs.
    run(environment / "bin" / "slitlamp", "demo", "--quick", cwd=elsewhere, OMP_NUM_THREADS="1")
    assert [path.name for path in elsewhere.iterdir()] == ["runs"]
    folder = elsewhere / "runs" / "demo-quick"
    for name in ("config.yaml", "environment.json", "predictions.parquet"):
        assert (folder / name).stat().st_size > 0
    assert len(pd.read_parquet(folder / "tables" / "conditions.parquet")) > 0
    assert {path.stem for path in (folder / "figures").glob("*.svg")} >= {"head_divergence", "pope", "chair"}
    html = (folder / "report.html").read_text()
    assert "HeadDivergence" in html
    # Self-contained: no address is fetched when the report is opened.
    assert not re.search(r"""(src|href)=["'](https?:)?//|url\(["']?(https?:)?//|@import""", html)
