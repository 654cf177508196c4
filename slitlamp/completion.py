"""What the shell offers after a Tab: names of experiments, runs, models, keys. Nothing here loads torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

LISTS = ("probes", "interventions", "datasets", "families", "experiments")
DTYPES = ("float32", "bfloat16", "float16")


def experiments(incomplete: str) -> list[str]:
    """Experiments that come with slitlamp, and YAML files."""
    from slitlamp.experiments.places import data_folders

    names = {path.stem for folder in data_folders("experiments") for path in folder.glob("*.yaml")}
    return [*_starting(sorted(names), incomplete), *_paths(incomplete, (".yaml", ".yml"))]


def runs(incomplete: str) -> list[str]:
    """Folders that hold a run, here, below `runs` or on the way that was begun."""
    from slitlamp.experiments.folder import CONFIG

    near = sorted(str(path.parent) for pattern in ("*", "runs/*") for path in Path().glob(f"{pattern}/{CONFIG}"))
    return [*_starting(near, incomplete), *(one for one in _paths(incomplete) if one.rstrip("/") not in near)]


def models(incomplete: str) -> list[str]:
    """The embedded models, configuration files and folders."""
    return [*_starting(("organism", "organism/seed1"), incomplete), *_paths(incomplete, (".json",))]


def lists(incomplete: str) -> list[str]:
    """What can be listed."""
    return _starting(LISTS, incomplete)


def dtypes(incomplete: str) -> list[str]:
    """Kinds of numbers."""
    return _starting(DTYPES, incomplete)


def settings(incomplete: str) -> list[str]:
    """Keys of a configuration, as `--set` takes them."""
    from slitlamp.experiments.config import Config

    return _starting((f"{name}=" for name in Config.model_fields), incomplete)


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _paths(incomplete: str, endings: tuple[str, ...] = ()) -> list[str]:
    """Folders, and files of some endings, that a begun path may lead to."""
    folder = Path(incomplete).parent if not incomplete.endswith("/") else Path(incomplete)
    if not incomplete or not folder.is_dir():
        return []
    found = sorted(path for path in folder.iterdir() if path.is_dir() or path.suffix in endings)
    return _starting((f"{path}/" if path.is_dir() else str(path) for path in found), incomplete)
