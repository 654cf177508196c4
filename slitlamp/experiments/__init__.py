"""Experiments: conditions x data sets x probes, run folders, configurations."""

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
