"""An experiment that has been checked, ready to run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slitlamp.decoding import BacktrackingDecoding
from slitlamp.experiments import registry
from slitlamp.experiments.conditions import Condition
from slitlamp.experiments.config import ModelConfig
from slitlamp.experiments.datasets import Dataset
from slitlamp.experiments.folder import RunFolder
from slitlamp.experiments.places import recorded

if TYPE_CHECKING:
    from slitlamp.experiments.experiment import Experiment
    from slitlamp.tracing import Probe
    from slitlamp.vlm import VLM


def probe_keys(probes: Sequence[Probe]) -> dict[str, Probe]:
    """Probes by the name their tables start with; a second one of a name gets a number."""
    keyed: dict[str, Probe] = {}
    for probe in probes:
        key, n = probe.name, 1
        while key in keyed:
            n += 1
            key = f"{probe.name}_{n}"
        keyed[key] = probe
    return keyed


@dataclass
class Plan:
    """An experiment that has been checked: what runs, in which order, and where it is written."""

    experiment: Experiment
    model: VLM | ModelConfig
    datasets: list[Dataset]
    conditions: list[Condition]
    comparisons: list[tuple[str, str]]
    max_new_tokens: dict[str, int]
    generation: dict[str, Any]
    probes: dict[str, Probe]
    probe_conditions: list[str]
    probe_datasets: list[str]
    folder: RunFolder

    def config(self) -> dict[str, Any]:
        """The configuration as plain values, in the form that `slitlamp run` reads."""
        one = self.experiment
        if isinstance(self.model, ModelConfig):
            model: Any = self.model.model_dump(exclude_none=True, exclude_defaults=True)
        else:
            model = {"id": self.model.name}
        tokens = one.max_new_tokens
        if isinstance(tokens, int):
            tokens = {data.task: tokens for data in self.datasets}
        config: dict[str, Any] = {
            "title": one.title,
            "model": model,
            "datasets": [dict(data.source) or {"name": data.name} for data in self.datasets],
            "conditions": {
                name: [registry.describe(entry) for entry in entries] for name, entries in one.conditions.items()
            },
            "controls": one.controls if isinstance(one.controls, bool) else list(one.controls),
            "pairs": (one.pairs if isinstance(one.pairs, bool) else list(one.pairs)) or None,
            "comparisons": [list(pair) for pair in one.comparisons or ()] or None,
            "probes": [registry.describe(probe) for probe in one.probes],
            "probe_conditions": self.probe_conditions,
            "probe_datasets": self.probe_datasets,
            "causal": one.causal,
            "perplexity": one.perplexity or None,
            "showcase": one.showcase if isinstance(one.showcase, bool) else list(one.showcase),
            "viewer": (one.viewer if isinstance(one.viewer, bool | int) else list(one.viewer)) or None,
            "seed": one.seed,
            "batch_size": one.batch_size,
            "max_new_tokens": dict(tokens) if tokens else None,
            "generation": self.generation,
            "n_resamples": one.n_resamples,
            "level": one.level,
        }
        return {key: value for key, value in config.items() if value is not None}

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of everything that is read, by name: the data sets, and the files of interventions and probes."""
        components = [*self.probes.values(), *(one for each in self.conditions for one in each.interventions)]
        files = {one for component in components for one in registry.files_of(component)}
        found = {recorded(one): hashlib.sha256(one.read_bytes()).hexdigest() for one in sorted(files)}
        return {one.name: one.fingerprint() for one in self.datasets} | found

    @property
    def goes_back(self) -> bool:
        """Whether a condition decodes with going back: predictions then count the tracebacks of every item."""
        return any(isinstance(one, BacktrackingDecoding) for each in self.conditions for one in each.interventions)

    def measures(self, condition: str, dataset: str) -> bool:
        """Whether the probes run on this condition and data set."""
        return bool(self.probes) and condition in self.probe_conditions and dataset in self.probe_datasets

    def condition(self, name: str) -> Condition:
        """A condition by name."""
        return next(one for one in self.conditions if one.name == name)

    def without(self, names: set[str]) -> Plan:
        """The same without some conditions and their comparisons."""
        return replace(
            self,
            conditions=[one for one in self.conditions if one.name not in names],
            comparisons=[pair for pair in self.comparisons if not names & set(pair)],
        )
