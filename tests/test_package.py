"""`import slitlamp`: light, lazy, and sure that probes and interventions are its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import slitlamp

HOME = Path(slitlamp.__file__).resolve().parent.parent


def run_python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, as `python -c` in the folder `cwd`: that folder comes first on sys.path."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_import_costs_neither_torch_nor_pandas(tmp_path: Path) -> None:
    code = "import sys, slitlamp; print(sorted({'torch', 'transformers', 'pandas', 'numpy'} & set(sys.modules)))"
    done = run_python(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_resolves() -> None:
    values = {name: getattr(slitlamp, name) for name in slitlamp.__all__}
    assert set(slitlamp.__all__) <= set(dir(slitlamp))
    assert values["VLM"].__module__.startswith("slitlamp.")
    assert callable(values["load_dataset"])
    assert values["sites"].__name__ == "slitlamp.tracing.sites"


def test_a_typo_names_the_nearest_name() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'load_datasets'; did you mean 'load_dataset'"):
        _ = slitlamp.load_datasets  # type: ignore[attr-defined]
    assert not hasattr(slitlamp, "__wrapped__")


@pytest.mark.parametrize("name", ["probes", "interventions"])
@pytest.mark.parametrize("shape", ["package", "module"])
def test_a_hiding_package_is_named(tmp_path: Path, name: str, shape: str) -> None:
    stranger = tmp_path / name if shape == "package" else tmp_path / f"{name}.py"
    content = "raise RuntimeError('the stranger must not be imported')\n"
    if shape == "package":
        stranger.mkdir()
        (stranger / "__init__.py").write_text(content)
    else:
        stranger.write_text(content)
    done = run_python("import slitlamp", tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: slitlamp's package '{name}'")
    assert str(stranger.resolve()) in last


@pytest.mark.parametrize("name", ["probes", "interventions"])
def test_a_folder_without_init_hides_nothing(tmp_path: Path, name: str) -> None:
    """Python prefers a real package further down sys.path to a bare folder: no reason to refuse."""
    (tmp_path / name).mkdir()
    code = f"import importlib.util, slitlamp; print(importlib.util.find_spec({name!r}).origin)"
    done = run_python(code, tmp_path)
    assert done.stdout.strip() == str(HOME / name / "__init__.py"), done.stderr


def test_a_bare_folder_is_named_where_our_own_package_is_not_on_the_path(tmp_path: Path) -> None:
    """slitlamp alone on the path, beside a stranger's folder: `import probes` would give that empty folder."""
    own, stranger = tmp_path / "own", tmp_path / "stranger"
    own.mkdir()
    (own / "slitlamp").symlink_to(HOME / "slitlamp")
    (stranger / "probes").mkdir(parents=True)
    # -S: without site-packages, where the true packages are found.
    code = f"import sys; sys.path[:0] = [{str(stranger)!r}, {str(own)!r}]; import slitlamp"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"is hidden by {(stranger / 'probes').resolve()}" in done.stderr
