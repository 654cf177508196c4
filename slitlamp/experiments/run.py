"""`Run`: the results of an experiment, read from its folder."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from slitlamp.errors import RunFolderError, unknown
from slitlamp.experiments import folder as names
from slitlamp.experiments import registry, storage
from slitlamp.reporters import html_of, reporter

_VIEWS = {"pope": "pope", "chair": "captions"}


class Run:
    """A run folder: tables, predictions, configuration and environment, figures and report.

    Nothing is kept in memory but what has been asked for, so a Run of a copied folder is the same as the one that
    `Experiment.run` returned.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / names.CONFIG).is_file():
            raise RunFolderError(f"{self.folder} is not a run folder: it has no {names.CONFIG}")

    @property
    def finished(self) -> bool:
        """Whether the experiment has ended; an unfinished one goes on when it is run again."""
        return bool(self.environment.get("finished"))

    @property
    def table_names(self) -> list[str]:
        """Names of the tables; `pope` and `chair` are the rows of `conditions` for these tasks."""
        stored = sorted(path.stem for path in (self.folder / names.TABLES).glob("*.parquet"))
        tasks = set(self.table("conditions")["task"]) if "conditions" in stored else set()
        return [*stored, *(name for name, task in _VIEWS.items() if task in tasks)]

    def table(self, name: str) -> pd.DataFrame:
        """A table by name. Raises UnknownNameError with the nearest names."""
        if name in _VIEWS:
            scores = self.table("conditions")
            return scores[scores["task"] == _VIEWS[name]].drop(columns="task").reset_index(drop=True)
        path = self.folder / names.TABLES / f"{name}.parquet"
        if not path.is_file():
            if not self.finished:
                raise RunFolderError(f"the run in {self.folder} has not ended; run it again to finish it")
            raise unknown("table", name, self.table_names)
        return storage.read_table(path)

    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables by name."""
        return {name: self.table(name) for name in self.table_names}

    @property
    def predictions(self) -> pd.DataFrame:
        """One row per condition, data set and item: what the model wrote."""
        path = self.folder / names.PREDICTIONS
        if not path.is_file():
            raise RunFolderError(f"the run in {self.folder} has not ended; run it again to finish it")
        return storage.read_table(path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration, as `slitlamp run` reads it."""
        loaded = yaml.safe_load((self.folder / names.CONFIG).read_text(encoding="utf-8"))
        return dict(loaded)

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, model, device, seed, and seconds per step."""
        path = self.folder / names.ENVIRONMENT
        return dict(storage.read_json(path)) if path.is_file() else {}

    @property
    def probe_keys(self) -> list[str]:
        """The probes of the run, by the name that their tables start with."""
        return list(dict.fromkeys(path.name.split(".")[0] for path in self._states()))

    def probe(self, key: str, *, condition: str | None = None, dataset: str | None = None) -> Any:
        """A probe of the run with all that it took in: to be asked for its result again, or to be used.

        Args:
            key: one of `probe_keys`.
            condition, dataset: of what it measured; by default the first.

        Raises:
            UnknownNameError: the run has no such probe, or it did not measure that condition or data set.
            RunFolderError: the run has not ended.
        """
        if not self.finished:
            raise RunFolderError(f"the run in {self.folder} has not ended; run it again to finish it")
        if key not in self.probe_keys:
            raise unknown("probe of this run", key, self.probe_keys)
        conditions, datasets = (self.config[f"probe_{name}"] for name in ("conditions", "datasets"))
        for kind, name, known in (("condition", condition, conditions), ("data set", dataset, datasets)):
            if name is not None and name not in known:
                raise unknown(f"{kind} that the probes of this run measured", name, known)
        entry = self.environment["probes"][key]
        (name, parameters), *_ = self.config["probes"][entry].items()
        probe = registry.create("probe", name, parameters)
        path = names.RunFolder(self.folder).state_path(key, condition or conditions[0], dataset or datasets[0])
        probe.load_state(storage.read_arrays(path)[0])
        return probe

    def _states(self) -> list[Path]:
        return sorted((self.folder / names.STATES).glob("*.safetensors"))

    def figure(self, name: str) -> Any:
        """A figure of the report by name, as a matplotlib Figure. Raises UnknownNameError with the nearest names."""
        known = reporter("figure_names")(self.folder)
        if name not in known:
            raise unknown("figure", name, known)
        return reporter("figure")(self.folder, name)

    def report(self) -> Path:
        """Write figures/ and report.html from what the folder holds, and return the report's path."""
        return Path(reporter("report")(self.folder))

    def __repr__(self) -> str:
        state = "finished" if self.finished else "not finished"
        return f"Run({self.folder}: {state}; tables: {', '.join(self.table_names)})"

    def _repr_html_(self) -> str | None:
        return html_of("run_html", self)


def load_run(path: str | Path) -> Run:
    """The run in a folder."""
    return Run(path)
