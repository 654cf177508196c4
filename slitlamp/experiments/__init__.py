"""Experiments: conditions x data sets x probes, run folders, configurations.

The names below are imported when they are first used: to complete a command or to list names takes no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slitlamp._lazy import lazy_names

if TYPE_CHECKING:
    from slitlamp.experiments.config import Config, find_config, read_config
    from slitlamp.experiments.datasets import (
        Dataset,
        Item,
        captions_dataset,
        dataset_names,
        load_dataset,
        pope_dataset,
    )
    from slitlamp.experiments.experiment import Experiment
    from slitlamp.experiments.probing import labelled_batches
    from slitlamp.experiments.run import Run, load_run

__all__ = [
    "Config",
    "Dataset",
    "Experiment",
    "Item",
    "Run",
    "captions_dataset",
    "dataset_names",
    "find_config",
    "labelled_batches",
    "load_dataset",
    "load_run",
    "pope_dataset",
    "read_config",
]

_MODULES = {
    "config": ("Config", "find_config", "read_config"),
    "datasets": ("Dataset", "Item", "captions_dataset", "dataset_names", "load_dataset", "pope_dataset"),
    "experiment": ("Experiment",),
    "probing": ("labelled_batches",),
    "run": ("Run", "load_run"),
}

__getattr__, __dir__ = lazy_names(
    __name__,
    __all__,
    {name: (f"{__name__}.{module}", name) for module, names in _MODULES.items() for name in names},
)
