"""Several experiments at a time on one machine, each in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError

from slitlamp.errors import RunFolderError, SlitlampError
from slitlamp.experiments.summary import summary

if TYPE_CHECKING:
    from slitlamp.experiments.experiment import Experiment


class Finished(NamedTuple):
    """What an experiment left: the lines of its summary and its report, or why it ended early."""

    place: int
    lines: list[str]
    report: Path | None = None
    error: str = ""


def run_jobs(experiments: Sequence[Experiment], n_jobs: int) -> Iterator[Finished]:
    """Run experiments `n_jobs` at a time and draw their reports; what each left as it ends, with its place among them.

    The cores are shared out among the processes, and each has a model in memory. An experiment that ends in an error does
    not keep the others from running.

    Raises:
        RunFolderError: a process was killed, with which the others ended.
    """
    share = max(1, joblib.cpu_count() // n_jobs)
    with joblib.parallel_config("loky", inner_max_num_threads=share):
        ended = joblib.Parallel(n_jobs, return_as="generator_unordered")(
            joblib.delayed(_run)(place, replace(one, progress=False)) for place, one in enumerate(experiments)
        )
        try:
            yield from ended
        except TerminatedWorkerError as error:
            raise RunFolderError(
                "a process was killed from outside (out of memory?); the same command goes on where all stopped, and "
                "--jobs 1 needs less memory"
            ) from error


def _run(place: int, experiment: Experiment) -> Finished:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        run = experiment.run()
        return Finished(place, summary(run), run.report())
    except SlitlampError as error:
        return Finished(place, [], error=str(error))
