"""`Experiment`: conditions x data sets x probes on one model, checked before it runs and resumable while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slitlamp.errors import InputError, MissingModelError, unknown
from slitlamp.experiments import registry
from slitlamp.experiments.conditions import Condition, make_comparisons, make_conditions
from slitlamp.experiments.config import Config, ModelConfig
from slitlamp.experiments.datasets import Dataset, Task, load_dataset, make_dataset
from slitlamp.experiments.folder import RunFolder
from slitlamp.experiments.models import organism_seed
from slitlamp.experiments.plan import Plan, probe_keys
from slitlamp.experiments.run import Run
from slitlamp.experiments.viewer import check_items

if TYPE_CHECKING:
    from slitlamp.decoding import Intervention
    from slitlamp.experiments.across import Across
    from slitlamp.experiments.runner import Runner
    from slitlamp.tracing import Probe
    from slitlamp.vlm import VLM

CHECKPOINTS = "runs/organism/checkpoints/"
"""Where `slitlamp train-organism` leaves the checkpoints of a training."""
_OWN_OPTIONS = ("max_new_tokens", "max_length", "seed", "num_beams", "num_return_sequences", "pad_token_id")


@dataclass
class Experiment:
    """A comparison of conditions on the same items, with the probes' measurements; `run` does it.

    Attributes:
        model: a VLM, or what names one: `organism`, `organism/seed1`, a hub id, a folder; or a list of such names: the
            experiment then runs on each, and the probes compare them.
        dataset: one data set or several, or their names.
        conditions: interventions by the name of the condition. The first is the reference of every comparison.
        probes: measured on the text that the model generates, under the conditions of `probe_conditions`.
        seed: of sampling and of the bootstrap.
        output: the run folder. A killed run goes on in it, and ends with the same tables.
        controls: whether every treatment is joined by the matched controls its interventions declare; a list of names
            keeps some. By default all are.
        pairs: whether every two treatments are also tried together, and how far their joint effect is from the sum of the two;
            a list of treatments keeps the pairs among them. Pairs that the model refuses are in the table `refused_pairs`.
        comparisons: pairs (condition, reference) beside those made anyway: all against the first, treatments against
            their controls.
        max_new_tokens: limit of an answer, for all tasks or by task; by default the data set's.
        batch_size: items per batch, which is also the unit in which work is stored.
        probe_conditions: by default the first condition.
        probe_datasets: by default the caption data sets, or all if there is none.
        causal: whether what the probes point at is intervened on, against matched random targets; a number says on how
            many items at most.
        perplexity: whether captions are also scored by how likely the unmodified model finds them (one more pass each).
        showcase: caption items to be shown word by word in the report: their ids, or True for one chosen by rule.
        viewer: items that can be looked into in the report's viewer: their ids (or `data set:id`), how many, or True for a
            dozen chosen by rule.
        generation: further options of Hugging Face's `generate`; greedy decoding by default.
        n_resamples, level: of the bootstrap intervals over images.
        title: of the report.
        overwrite: delete an earlier run in `output` first.
        progress: whether to draw a progress bar.
    """

    model: VLM | ModelConfig | str | Sequence[ModelConfig | str]
    dataset: Dataset | str | Sequence[Dataset | str]
    conditions: Mapping[str, Sequence[Intervention]] = field(default_factory=lambda: {"baseline": []})
    probes: Sequence[Probe] = ()
    seed: int = 0
    output: str | Path = "runs/experiment"
    controls: bool | Sequence[str] = True
    pairs: bool | Sequence[str] = False
    comparisons: Sequence[tuple[str, str]] | None = None
    max_new_tokens: int | Mapping[Task, int] | None = None
    batch_size: int = 16
    probe_conditions: Sequence[str] | None = None
    probe_datasets: Sequence[str] | None = None
    causal: bool | int = False
    perplexity: bool = False
    showcase: bool | Sequence[str] = False
    viewer: bool | int | Sequence[str] = False
    generation: Mapping[str, Any] = field(default_factory=dict)
    n_resamples: int = 2000
    level: float = 0.95
    title: str | None = None
    overwrite: bool = False
    progress: bool = True

    @classmethod
    def from_config(
        cls, config: Config, *, output: str | Path | None = None, folders: Sequence[Path] = (), **options: Any
    ) -> Experiment:
        """An experiment from a configuration: data sets are read and parameters checked; the model is not loaded.

        Args:
            config: from `read_config`.
            output: the run folder; by default the configuration's.
            folders: where the configuration may name files: its own folder and the working directory, say.
            options: `overwrite`, `progress`.
        """
        allowed = [*folders, *(Path(one).expanduser() for one in config.folders)]
        datasets = []
        for one in config.datasets:
            data = make_dataset(one.model_dump(exclude_none=True, exclude={"take", "skip"}), allowed)
            limits = [take for take in (one.take, config.take) if take is not None]
            datasets.append(data.take(min(limits, default=None), skip=one.skip or 0) if limits or one.skip else data)
        return cls(
            model=config.models or config.model,
            dataset=datasets,
            conditions={
                name: [registry.create("intervention", one.name, one.parameters, allowed) for one in components]
                for name, components in config.conditions.items()
            },
            probes=[registry.create("probe", one.name, one.parameters, allowed) for one in config.probes],
            output=output or config.output or Path("runs") / (config.title or "experiment"),
            max_new_tokens=config.max_new_tokens or None,
            **{
                key: getattr(config, key)
                for key in (
                    *("seed", "controls", "pairs", "comparisons", "batch_size", "probe_conditions", "probe_datasets"),
                    *("causal", "perplexity", "showcase", "viewer", "generation", "n_resamples", "level", "title"),
                )
            },
            **options,
        )

    def __repr__(self) -> str:
        datasets = [self.dataset] if isinstance(self.dataset, str | Dataset) else self.dataset
        data = ", ".join(one if isinstance(one, str) else one.name for one in datasets)
        lines = [f"model: {self.model if isinstance(self.model, str) else repr(self.model)}", f"data: {data}"]
        for name, applied in self.conditions.items():
            lines.append(f"condition {name}: {', '.join(map(repr, applied)) or 'the model as it is'}")
        lines += [f"probe: {one!r}" for one in self.probes]
        return "\n  ".join(["Experiment", *lines, f"output: {self.output}"])

    def run(self) -> Run:
        """Check everything, then do what is not done yet, and return the finished run.

        Raises:
            InputError: something that this experiment was given cannot be used; before the model is loaded.
            RunFolderError: the output cannot be written, or another configuration made it.
        """
        return self.prepare().run()

    def prepare(self) -> Runner | Across:
        """Check all that can be checked without a model; what this returns does the work. Raises what `run` does."""
        from slitlamp.experiments.across import Across
        from slitlamp.experiments.runner import Runner

        several = self._several()
        return Runner(self.check()) if several is None else Across(self, several)

    def _several(self) -> list[ModelConfig] | None:
        """The models, where there is a list of them."""
        if isinstance(self.model, str | ModelConfig) or not isinstance(self.model, Sequence):
            return None
        if not self.model:
            raise InputError("the list of models is empty")
        if self.showcase:
            raise InputError("'showcase' shows the captions of one model; leave it out, or give one model")
        if self.viewer:
            raise InputError("'viewer' looks into one model; leave it out, or give one model")
        return [ModelConfig(id=one) if isinstance(one, str) else one for one in self.model]

    def check(self) -> Plan:
        """Check all that can be checked without the model.

        Returns:
            The plan: the same experiment with names looked up and defaults filled in.
        """
        datasets = self._datasets()
        conditions = make_conditions(self.conditions, self.controls, self.pairs)
        self._check_components(conditions)
        names = [one.name for one in conditions]
        known = {one.name: one for one in datasets}
        for name in self.probe_conditions or ():
            if name not in names:
                raise unknown("condition in 'probe_conditions'", name, names)
        for name in self.probe_datasets or ():
            if name not in known:
                raise unknown("data set in 'probe_datasets'", name, known)
        if self.batch_size < 1:
            raise InputError(f"batch_size must be 1 or more, found {self.batch_size}")
        if self.seed < 0:
            raise InputError(f"seed must be 0 or more, found {self.seed}")
        if isinstance(self.model, str | ModelConfig):
            self._check_model(self.model)
        captions = [one.name for one in datasets if one.task == "captions"]
        if self.showcase and not captions:
            raise InputError("'showcase' shows captions, and no data set of this experiment asks for captions")
        shown = [] if isinstance(self.showcase, bool) else [str(one) for one in self.showcase]
        ids = {item.id for name in captions for item in known[name].items}
        for one in shown:
            if one not in ids:
                raise unknown("caption item in 'showcase'", one, ids)
        check_items(self.viewer, datasets)
        for data in datasets:
            data.check()
        folder = RunFolder(self.output)
        folder.check_writable()
        model = ModelConfig(id=self.model) if isinstance(self.model, str) else self.model
        if isinstance(model, Sequence):
            raise InputError(
                "an experiment on several models has a plan for each of them: see slitlamp.experiments.across"
            )
        plan = Plan(
            experiment=self,
            model=model,
            datasets=datasets,
            conditions=conditions,
            comparisons=make_comparisons(conditions, self.comparisons),
            max_new_tokens={one.name: self._max_new_tokens(one) for one in datasets},
            generation=self._generation(),
            probes=probe_keys(self.probes),
            probe_conditions=list(self.probe_conditions or names[:1]),
            probe_datasets=list(self.probe_datasets or captions or known),
            folder=folder,
        )
        if not self.overwrite:
            folder.check_config(plan.config())
        return plan

    def _datasets(self) -> list[Dataset]:
        given = [self.dataset] if isinstance(self.dataset, str | Dataset) else list(self.dataset)
        if not given:
            raise InputError("an experiment needs at least one data set")
        datasets = [load_dataset(one) if isinstance(one, str) else one for one in given]
        seen: set[str] = set()
        for one in datasets:
            if one.name in seen:
                raise InputError(f"two data sets are called {one.name!r}; give one another name")
            seen.add(one.name)
        return datasets

    def _check_components(self, conditions: Sequence[Condition]) -> None:
        from slitlamp.decoding import Intervention
        from slitlamp.tracing import Probe

        for condition in conditions:
            for one in condition.interventions:
                if not isinstance(one, Intervention):
                    raise InputError(f"condition {condition.name!r}: expected an intervention, found {one!r}")
        for probe in self.probes:
            if not isinstance(probe, Probe):
                raise InputError(f"expected a probe, found {probe!r}")

    @staticmethod
    def _check_model(model: str | ModelConfig) -> None:
        name = model if isinstance(model, str) else model.id
        seed = organism_seed(name)
        if seed is not None:
            from slitlamp.vlm import ORGANISM_WEIGHTS

            if not (ORGANISM_WEIGHTS / f"seed{seed}").is_dir():
                raise InputError(f"there is no embedded model of seed {seed}")
        elif Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            raise InputError(f"the folder {name} holds no Hugging Face model: it has no config.json")
        elif not Path(name).is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
            made = " (`slitlamp train-organism` trains the embedded model and leaves its checkpoints there)"
            raise MissingModelError(f"no such folder: {name}{made if name.startswith(CHECKPOINTS) else ''}")

    def _max_new_tokens(self, data: Dataset) -> int:
        given = self.max_new_tokens
        limit = (
            given.get(data.task, data.max_new_tokens) if isinstance(given, Mapping) else given or data.max_new_tokens
        )
        if limit < 1:
            raise InputError(f"max_new_tokens must be 1 or more, found {limit}")
        return limit

    def _generation(self) -> dict[str, Any]:
        from transformers import GenerationConfig

        known = [key for key in GenerationConfig().to_dict() if key not in _OWN_OPTIONS]
        for key in self.generation:
            if key in _OWN_OPTIONS:
                raise InputError(
                    f"the generation option {key!r} is set by the experiment; max_new_tokens and seed have keys of their own"
                )
            if key not in known:
                raise unknown("generation option", key, known)
        return dict(self.generation)
