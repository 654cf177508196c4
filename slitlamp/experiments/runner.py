"""Doing the work of a plan, unit by unit, and turning what the units left into tables."""

from __future__ import annotations

import copy
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pandas as pd

from slitlamp.errors import InputError, RunFolderError, UnsupportedError
from slitlamp.experiments import environment, storage
from slitlamp.experiments.causal_checks import causal_tables, with_causal_sentences
from slitlamp.experiments.conditions import Condition, condition_table
from slitlamp.experiments.config import ModelConfig
from slitlamp.experiments.datasets import Dataset, Item
from slitlamp.experiments.folder import CONFIG, ENVIRONMENT, PREDICTIONS, TABLES, Unit, UnitResult
from slitlamp.experiments.models import load_model
from slitlamp.experiments.pairs import refused_pairs
from slitlamp.experiments.perplexity import negative_log_likelihood
from slitlamp.experiments.plan import Plan
from slitlamp.experiments.probing import Measured, give_source, joined, labels_of
from slitlamp.experiments.processes import Processes, started_together
from slitlamp.experiments.run import Run
from slitlamp.experiments.scores import score
from slitlamp.experiments.showcase import make_showcase
from slitlamp.experiments.verdicts import verdict_tables
from slitlamp.experiments.viewer import make_viewer
from slitlamp.progress import progress_bar, working
from slitlamp.tracing import Part

if TYPE_CHECKING:
    from slitlamp.decoding import Generation
    from slitlamp.vlm import VLM

logger = logging.getLogger(__name__)

VISIBLE = 60.0
"""Seconds that a network file system may take to show what another machine has written."""


class Runner:
    """Runs a plan in its folder. What an earlier, killed process finished is not done again.

    Of several processes (`accelerate launch`), each does every n-th unit; the first one writes what follows from all
    units. A unit is the same batch whoever does it, so the tables do not depend on their number, which may also be
    another one when a killed run goes on.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.folder = plan.folder
        self._seconds: dict[str, float] = {}
        self._processes = Processes()
        self._vlm: VLM | None = None if isinstance(plan.model, ModelConfig) else plan.model
        self._refused = pd.DataFrame()

    def run(self) -> Run:
        """Do what is left to do."""
        with started_together() as self._processes, ExitStack() as opened:
            data = self.plan.fingerprints()
            if not self._open(opened, data):
                self._work(data)
        return Run(self.folder.path)

    def _open(self, opened: ExitStack, data: dict[str, str]) -> bool:
        """Open the folder in the first process, the others looking on; returns whether the run has ended before."""
        plan, team = self.plan, self._processes
        with team.step("open"):
            if team.is_main:
                opened.enter_context(self.folder.open(plan.config(), overwrite=plan.experiment.overwrite))
                self.folder.check_identity({"data": data, "versions": environment.versions()})
        with team.step("look"):
            if not (self.folder.path / CONFIG).is_file():
                raise RunFolderError(
                    f"process {team.rank} of {team.size} does not see the run folder {self.folder.path}, which process 0 "
                    "has opened; the output must lie on a file system that all machines share"
                )
            self.folder.check_config(plan.config())
            finished = self._is_finished()
        if finished and team.is_main:
            self.folder.remove_parts()
        return finished

    def _work(self, data: dict[str, str]) -> None:
        team = self._processes
        with team.step("model"):
            facts = self._facts(data)
            identity = {key: facts[key] for key in environment.IDENTITY}
            if team.is_main:
                self.folder.check_identity(identity)
                self._write_environment(facts, finished=False)
        with team.step("units"):
            if not team.is_main:
                self.folder.check_identity(identity)
            self._do_units()
        with team.step("results"):
            if team.is_main:
                self._check_units()
                self._write_results()
                self._write_environment(facts, finished=True)
                self.folder.remove_parts()

    # -- model and environment --------------------------------------------------------------------------------------

    @property
    def vlm(self) -> VLM:
        """The model, loaded when it is first needed."""
        if self._vlm is None:
            assert isinstance(self.plan.model, ModelConfig)
            with self._timed("load model"):
                self._vlm = load_model(self.plan.model, self._processes)
        return self._vlm

    def _facts(self, data: dict[str, str]) -> dict[str, Any]:
        plan = self.plan
        if self._processes.size > 1 and (getattr(self.vlm.model, "tp_size", None) or 1) > 1:
            raise UnsupportedError(
                "this model is spread over the processes (tensor parallel), so they cannot work on different items; run the "
                "experiment in one process with device_map='auto', or load the whole model in each"
            )
        for condition in plan.conditions:
            if condition.pair_of is None:
                with self.vlm.apply(*condition.interventions):
                    pass  # refuses now what it would refuse in the middle of the run
        self._leave_refused_pairs()
        for probe in plan.probes.values():
            probe.sites(self.vlm.anatomy)
        revision = plan.model.revision if isinstance(plan.model, ModelConfig) else None
        return environment.describe(self.vlm, revision, plan.experiment.seed, data, self._processes.size)

    def _leave_refused_pairs(self) -> None:
        """Go on without the pairs that the model does not take."""
        self._refused = refused_pairs(self.plan.conditions, self.vlm)
        for row in self._refused.itertuples(index=False):
            if row.condition in self.plan.probe_conditions:
                raise InputError(f"'probe_conditions' names {row.condition!r}, which cannot run: {row.reason}")
        self.plan = self.plan.without(set(self._refused["condition"]))

    def _is_finished(self) -> bool:
        path = self.folder.path / ENVIRONMENT
        if not path.is_file():
            return False
        found = storage.read_json(path)
        tables = [self.folder.path / TABLES / f"{name}.parquet" for name in found.get("tables", [])]
        return bool(found.get("finished")) and all(one.is_file() for one in (*tables, self.folder.path / PREDICTIONS))

    def _write_environment(self, facts: dict[str, Any], *, finished: bool) -> None:
        content = {**facts, "finished": finished}
        if finished:
            content["probes"] = {key: number for number, key in enumerate(self.plan.probes)}
            content["tables"] = sorted(one.stem for one in (self.folder.path / TABLES).glob("*.parquet"))
            content["timing"] = self._timing()
        storage.write_json(self.folder.path / ENVIRONMENT, content)

    def _timing(self) -> dict[str, float]:
        """Seconds per step; of the units, those of the process that did them."""
        seconds: dict[str, float] = {}
        for unit, _ in self._units():
            for step, value in self.folder.read_part(unit).seconds.items():
                key = f"{step} {unit.condition}"
                seconds[key] = seconds.get(key, 0.0) + value
        seconds = self._seconds | seconds
        return {key: round(value, 3) for key, value in seconds.items()} | {"total": round(sum(seconds.values()), 3)}

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[step] = self._seconds.get(step, 0.0) + time.perf_counter() - start

    # -- units ------------------------------------------------------------------------------------------------------

    def _units(self) -> Iterator[tuple[Unit, Sequence[Item]]]:
        """All units in the order in which they are done; the same for every process that works on this plan."""
        size = self.plan.experiment.batch_size
        for condition in self.plan.conditions:
            for data in self.plan.datasets:
                for chunk, start in enumerate(range(0, len(data), size)):
                    yield Unit(condition.name, data.name, chunk), data.items[start : start + size]

    def _do_units(self) -> None:
        team = self._processes
        units = list(self._units())[team.rank :: team.size]
        datasets = {one.name: one for one in self.plan.datasets}
        share = "" if team.size == 1 else f" · process 1 of {team.size}"
        with progress_bar(self.plan.experiment.progress and team.is_main) as bar:
            task = bar.add_task("", total=sum(len(items) for _, items in units))
            for unit, items in units:
                team.check()
                bar.update(task, description=f"{unit.condition} · {unit.dataset}{share}")
                if not self._is_done(unit, items):
                    condition = self.plan.condition(unit.condition)
                    self.folder.write_part(unit, self._do(unit, condition, datasets[unit.dataset], items))
                bar.advance(task, len(items))

    def _check_units(self) -> None:
        """Raise when units of other processes do not appear here."""
        end = time.monotonic() + VISIBLE
        while missing := [unit for unit, _ in self._units() if not self.folder.has_part(unit)]:
            if self._processes.size == 1 or time.monotonic() > end:
                raise RunFolderError(
                    f"{len(missing)} finished units are not in {self.folder.path} (the first: {missing[0].file}); the "
                    "output must lie on a file system that all machines share"
                )
            time.sleep(1.0)

    def _is_done(self, unit: Unit, items: Sequence[Item]) -> bool:
        if not self.folder.has_part(unit):
            return False
        try:
            found = [row["item"] for row in self.folder.read_part(unit).predictions]
        except (RunFolderError, KeyError, ValueError):
            logger.warning("the stored part %s cannot be read and is done again", unit.file)
            return False
        return found == [item.id for item in items]

    def _do(self, unit: Unit, condition: Condition, data: Dataset, items: Sequence[Item]) -> UnitResult:
        vlm, plan = self.vlm, self.plan
        seconds: dict[str, float] = {}
        with _clock(seconds, "encode"):
            batch = data.encode(vlm, items)
        options: dict[str, Any] = dict(plan.generation)
        if options.get("do_sample"):
            options["seed"] = unit_seed(plan.experiment.seed, unit)
        states = {}
        with vlm.apply(*condition.interventions):
            with _clock(seconds, "generate"):
                generation = vlm.generate(batch, max_new_tokens=plan.max_new_tokens[data.name], **options)
            if plan.measures(condition.name, data.name):
                with _clock(seconds, "measure"):
                    labels = labels_of(generation.texts, generation.spans, data, items)
                    for key, probe in plan.probes.items():
                        fresh = copy.deepcopy(probe)
                        vlm.measure(fresh, generation.teacher_forced(), labels)
                        states[key] = fresh.state()
        rows = _prediction_rows(unit, data, items, generation)
        if plan.goes_back:
            back = generation.tracebacks or [()] * len(rows)
            n_back = [sum(not one.capped for one in entries) for entries in back]
            rows = [{**row, "tracebacks": one} for row, one in zip(rows, n_back, strict=True)]
        if plan.experiment.perplexity:
            with _clock(seconds, "perplexity"):
                asked = data.task == "captions"
                nll = negative_log_likelihood(vlm, generation) if asked else [float("nan")] * len(rows)
            rows = [{**row, "nll": one} for row, one in zip(rows, nll, strict=True)]
        return UnitResult(rows, states, seconds)

    # -- results ----------------------------------------------------------------------------------------------------

    def _write_results(self) -> None:
        """Predictions and tables, from the stored units only, so that a resumed run ends like any other."""
        plan = self.plan
        shown = plan.experiment.progress
        with self._timed("tables"), working(shown, "scores and their intervals"):
            path = self.folder.path / PREDICTIONS
            storage.write_tables(path, (_frame(self.folder.read_part(unit).predictions) for unit, _ in self._units()))
            predictions = {
                (str(condition), str(dataset)): frame
                for (condition, dataset), frame in storage.read_table(path).groupby(
                    ["condition", "dataset"], sort=False
                )
            }
            bootstrap = {
                "n_resamples": plan.experiment.n_resamples,
                "level": plan.experiment.level,
                "seed": plan.experiment.seed,
            }
            names = [one.name for one in plan.conditions]
            pairs = {one.name: one.pair_of for one in plan.conditions if one.pair_of is not None}
            tables = {"condition_info": condition_table(plan.conditions), "token_counts": _token_counts(predictions)}
            tables |= score(plan.datasets, names, plan.comparisons, predictions, pairs, **bootstrap)
            tables |= verdict_tables(tables)
            if plan.experiment.pairs:
                tables["refused_pairs"] = self._refused
        if plan.probes:
            with self._timed("probes"), working(shown, "results of the probes"):
                measured = self._measured()
                measured.save(self.folder)
                tables |= measured.tables() | measured.compared(self._scores(tables))
        if plan.probes and plan.experiment.causal:
            with self._timed("causal checks"):
                checked, unchecked = causal_tables(plan, self.folder, self.vlm, measured, predictions)
                tables |= checked | with_causal_sentences(tables, checked, unchecked)
        if plan.experiment.showcase:
            with self._timed("showcase"), working(shown, "showcase"):
                tables |= make_showcase(plan, self.vlm, predictions, tables)
        if plan.experiment.viewer:
            with self._timed("viewer"):
                make_viewer(plan, self.vlm, predictions, tables)
        for name, frame in tables.items():
            self.folder.write_table(name, frame)

    def _scores(self, tables: dict[str, pd.DataFrame]) -> pd.DataFrame | None:
        scores = tables.get("conditions")
        return None if scores is None else scores.assign(model=self._model_name)

    @property
    def _model_name(self) -> str:
        model = self.plan.model
        return model.id if isinstance(model, ModelConfig) else model.name

    def _measured(self) -> Measured:
        """Every probe with the states of all units of a condition and data set."""
        measured = Measured()
        for key, probe in self.plan.probes.items():
            for condition in self.plan.probe_conditions:
                for dataset in self.plan.probe_datasets:
                    units = [
                        unit for unit, _ in self._units() if (unit.condition, unit.dataset) == (condition, dataset)
                    ]
                    whole = joined(probe, (self.folder.read_part(unit).states[key] for unit in units))
                    measured.add(key, Part(self._model_name, condition, dataset), give_source(whole, self.vlm))
        return measured


def unit_seed(seed: int, unit: Unit) -> int:
    """The seed of sampling in a unit: the same for all conditions, so that they are compared on the same draws."""
    digest = hashlib.sha256(f"{seed} {unit.dataset} {unit.chunk}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


@contextmanager
def _clock(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start


def _prediction_rows(unit: Unit, data: Dataset, items: Sequence[Item], generation: Generation) -> list[dict[str, Any]]:
    return [
        {
            "condition": unit.condition,
            "dataset": unit.dataset,
            "task": data.task,
            "item": item.id,
            "image_id": str(item.image_id),
            "image": item.image.name,
            "prompt": item.prompt,
            "object": item.object,
            "label": item.label,
            "text": text,
            "n_prompt": n_prompt,
            "n_image": n_image,
            "n_tokens": len(tokens),
            "stopped": stopped,
            "tokens": list(tokens),
        }
        for item, n_prompt, n_image, text, tokens, stopped in zip(
            items,
            generation.batch.lengths,
            generation.n_image,
            generation.texts,
            generation.tokens,
            generation.stopped,
            strict=True,
        )
    ]


def _token_counts(predictions: Mapping[tuple[str, str], pd.DataFrame]) -> pd.DataFrame:
    """Per condition and data set, means over items: image tokens that the language model was given, and tokens generated."""
    rows = [
        (condition, dataset, len(frame), float(frame["n_image"].mean()), float(frame["n_tokens"].mean()))
        for (condition, dataset), frame in predictions.items()
    ]
    return pd.DataFrame(rows, columns=["condition", "dataset", "n_items", "image_tokens", "new_tokens"])


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows)
