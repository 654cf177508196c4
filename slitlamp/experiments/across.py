"""One experiment on several models: a run of its own for each, and what they say together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from slitlamp.errors import InputError
from slitlamp.experiments import environment, storage
from slitlamp.experiments.config import ModelConfig
from slitlamp.experiments.folder import ENVIRONMENT, MODELS, TABLES, RunFolder
from slitlamp.experiments.models import load_model
from slitlamp.experiments.probing import Measured, give_source
from slitlamp.experiments.processes import is_main_process
from slitlamp.experiments.run import Run
from slitlamp.tracing import Part

if TYPE_CHECKING:
    from slitlamp.experiments.experiment import Experiment
    from slitlamp.experiments.plan import Plan

SCORES = "scores"


class Across:
    """Runs an experiment on several models, one after the other.

    The folder holds a complete run for each model under `models/`, and the tables in which they are together: `scores`
    (every metric of every model), the tables of the probes with a column `model` in front, and those of
    `Probe.compare` over all models.
    """

    def __init__(self, experiment: Experiment, models: Sequence[ModelConfig]) -> None:
        self.models = models
        self.names = model_names(models)
        self.folder = RunFolder(experiment.output)
        self.experiment = experiment
        children = [
            replace(experiment, model=model, output=self.folder.path / MODELS / name.replace("/", "."))
            for model, name in zip(models, self.names, strict=True)
        ]
        self.plans: list[Plan] = [child.check() for child in children]
        self.folder.check_writable()
        if not experiment.overwrite:
            self.folder.check_config(self.config())

    def config(self) -> dict[str, Any]:
        """The configuration as plain values, in the form that `slitlamp run` reads."""
        config = self.plans[0].config()
        models = [one.model_dump(exclude_none=True, exclude_defaults=True) for one in self.models]
        return {
            ("models" if key == "model" else key): (models if key == "model" else one) for key, one in config.items()
        }

    def run(self) -> Run:
        """Do what is left to do."""
        from slitlamp.experiments.runner import Runner

        with ExitStack() as opened:
            if is_main_process():
                opened.enter_context(self.folder.open(self.config(), overwrite=self.experiment.overwrite))
            runs = [Runner(plan).run() for plan in self.plans]
            if is_main_process():
                self._write(runs)
        return Run(self.folder.path)

    def _write(self, runs: Sequence[Run]) -> None:
        scores = pd.concat(
            [_with_model(run.table("conditions"), name) for run, name in zip(runs, self.names, strict=True)],
            ignore_index=True,
        )
        tables: dict[str, list[pd.DataFrame]] = {}
        measured = Measured()
        for run, name, model in zip(runs, self.names, self.models, strict=True):
            keys = run.probe_keys
            for table in run.table_names:
                if any(table.startswith(f"{key}_") for key in keys):
                    tables.setdefault(table, []).append(_with_model(run.table(table), name))
            self._measured(run, name, model, measured)
        self.folder.write_table(SCORES, scores)
        for table, frames in tables.items():
            self.folder.write_table(table, pd.concat(frames, ignore_index=True))
        for table, frame in measured.compared(scores).items():
            self.folder.write_table(table, frame)
        facts = {name: run.environment for name, run in zip(self.names, runs, strict=True)}
        content = {
            "models": {name: {key: one.get(key) for key in environment.IDENTITY} for name, one in facts.items()},
            "seed": self.experiment.seed,
            "versions": environment.versions(),
            "git_commit": environment.git_commit(),
            "finished": True,
            "probes": runs[0].environment.get("probes", {}),
            "tables": sorted(path.stem for path in (self.folder.path / TABLES).glob("*.parquet")),
            "timing": {"total": round(sum(one["timing"]["total"] for one in facts.values()), 3)},
        }
        storage.write_json(self.folder.path / ENVIRONMENT, content)

    def _measured(self, run: Run, name: str, model: ModelConfig, measured: Measured) -> None:
        """The probes of one model; those that ask for their model get it again."""
        vlm = None
        for key in run.probe_keys:
            for condition in run.config["probe_conditions"]:
                for dataset in run.config["probe_datasets"]:
                    probe = run.probe(key, condition=condition, dataset=dataset)
                    if "source_" in getattr(probe, "__dataclass_fields__", {}):
                        vlm = vlm or load_model(model)
                        give_source(probe, vlm)
                    measured.add(key, Part(name, condition, dataset), probe)


def model_names(models: Sequence[ModelConfig]) -> list[str]:
    """A short name for each model: its id, or the last parts of a path, as many as tell them apart.

    Raises:
        InputError: the same model twice.
    """
    paths = [one.id.strip("/").split("/") for one in models]
    for depth in range(1, max(len(one) for one in paths) + 1):
        names = ["/".join(one[-depth:]) for one in paths]
        if len(set(names)) == len(names):
            return names
    raise InputError(f"the same model twice among {', '.join(one.id for one in models)}")


def _with_model(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    return pd.concat([pd.DataFrame({"model": name}, index=frame.index), frame], axis=1)
