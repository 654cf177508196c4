"""The configuration of an experiment: what a YAML file may hold, and how it becomes an Experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from slitlamp.errors import InputError, nearest
from slitlamp.experiments.names import check_name
from slitlamp.experiments.yaml_file import YamlFile

Task = Literal["pope", "captions"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False, protected_namespaces=())


class ModelConfig(_Strict):
    """Which model: `organism` (or `organism/seed1`), a Hugging Face id, or a folder; plus how to load it.

    Attributes:
        id: what names the model. A text in place of the mapping stands for this key alone.
        revision: branch, tag or commit of a hub repository; the newest by default.
        dtype: of the weights, such as bfloat16; float32 by default for the embedded model, else that of the files.
        device: where the model is put, such as cpu or cuda.
        device_map: how accelerate spreads the model over devices, such as auto; not beside `device`.
        trust_remote_code: whether code of the hub repository may run.
    """

    id: str
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False


class DatasetConfig(_Strict):
    """A data set by name, or one made of the user's files (then `task` says which kind).

    `pope` takes `questions` and `images`, and `instances` with `synonyms` where there are any; `captions` takes `images`,
    `instances`, `synonyms`, `prompt`, and `captions` (the reference captions) where there are any.

    Attributes:
        name: of a data set that comes with slitlamp, or any name for one of your own. A text in place of the mapping
            stands for this key alone.
        take: keep the first n images.
        skip: leave out this many images before them.
        task: pope or captions; only for a data set of your own.
        questions: file of POPE questions.
        images: folder of the images.
        instances: COCO instances JSON.
        captions: COCO captions JSON; what the captions name counts as true, too.
        synonyms: CHAIR's file of synonyms.
        prompt: of captions, what the model is asked; of POPE, the text around "{question}".
    """

    name: str
    take: int | None = Field(default=None, ge=1)
    skip: int | None = Field(default=None, ge=0)
    task: Task | None = None
    questions: str | None = None
    images: str | None = None
    instances: str | None = None
    captions: str | None = None
    synonyms: str | None = None
    prompt: str | None = None

    @model_validator(mode="after")
    def _files_fit_the_task(self) -> DatasetConfig:
        files = {"questions", "images", "instances", "captions", "synonyms", "prompt"}
        given = {key for key in files if getattr(self, key) is not None}
        if self.task is None:
            if given:
                raise ValueError(
                    f"{', '.join(sorted(given))}: only with 'task' (pope or captions), for a data set of your own"
                )
            return self
        allowed = files - ({"captions"} if self.task == "pope" else {"questions"})
        needed = {"questions", "images"} if self.task == "pope" else {"images", "instances", "synonyms"}
        if missing := sorted(needed - given):
            raise ValueError(f"a data set with task {self.task!r} also needs {', '.join(missing)}")
        if extra := sorted(given - allowed):
            raise ValueError(f"a data set with task {self.task!r} takes no {', '.join(extra)}")
        return self


class Component(_Strict):
    """A probe or an intervention: `Name`, or `Name: {parameter: value}`."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


def _component(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, parameters),) = value.items()
        if parameters is None or isinstance(parameters, Mapping):
            return {"name": str(name), "parameters": dict(parameters or {})}
    raise ValueError("expected a name, or 'Name: {parameter: value}'")


def _text_or(key: str) -> BeforeValidator:
    """Let a bare text stand for a mapping that holds nothing but that key."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


ComponentSpec = Annotated[Component, BeforeValidator(_component)]
DatasetSpec = Annotated[DatasetConfig, _text_or("name")]
ModelSpec = Annotated[ModelConfig, _text_or("id")]


def _baseline() -> dict[str, list[Component]]:
    return {"baseline": []}


class Config(_Strict):
    """An experiment: a model (or several, `models`), data sets, conditions (the first is the reference), probes, and more.

    Attributes:
        title: of the report.
        model: the model, see `ModelConfig`.
        models: several models in place of one: the experiment runs on each, and the probes compare them.
        datasets: data sets, see `DatasetConfig`.
        take: keep the first n images of every data set.
        conditions: interventions by the name of the condition; the first condition is the reference of comparisons.
        controls: whether every treatment is joined by the matched controls that its interventions declare; a list of
            names keeps some.
        pairs: whether every two treatments are also tried together; a list of treatments keeps the pairs among them.
        comparisons: pairs (condition, reference), beside all against the first and treatments against their controls.
        probes: what is measured on the text that the model generates: `Name`, or `Name: {parameter: value}`.
        probe_conditions: under which conditions; the first by default.
        probe_datasets: on which data sets; by default those of captions, or all if there is none.
        causal: whether what the probes point at is intervened on, against matched random targets; a number says on how
            many items at most.
        perplexity: whether captions are also scored by how likely the unmodified model finds them.
        showcase: caption items shown word by word in the report: their ids, or true for some chosen by rule.
        viewer: items to look inside in the report: their ids, how many, or true for twelve.
        seed: of sampling and of the bootstrap.
        batch_size: items per batch, which is also the unit in which work is stored.
        max_new_tokens: limit of an answer, one for all tasks or by task; by default 8 for POPE and 512 for captions, or
            the data set's own.
        generation: further arguments of Hugging Face's `generate`; greedy decoding by default.
        n_resamples: of the bootstrap over images.
        level: of the intervals.
        output: the run folder; by default runs/ and the name of the file.
        folders: further folders in which the configuration may name files.
    """

    title: str | None = None
    model: ModelSpec = ModelConfig(id="organism")
    models: list[ModelSpec] | None = Field(default=None, min_length=1)
    datasets: list[DatasetSpec] = Field(min_length=1)
    take: int | None = Field(default=None, ge=1)
    conditions: dict[str, list[ComponentSpec]] = Field(default_factory=_baseline, min_length=1)
    controls: bool | list[str] = True
    pairs: bool | list[str] = False
    comparisons: list[tuple[str, str]] | None = None
    probes: list[ComponentSpec] = Field(default_factory=list)
    probe_conditions: list[str] | None = None
    probe_datasets: list[str] | None = None
    causal: bool | Annotated[int, Field(ge=1)] = False
    perplexity: bool = False
    showcase: list[str] | bool = False
    viewer: bool | Annotated[int, Field(ge=1)] | list[str] = False
    seed: int = Field(default=0, ge=0)
    batch_size: int = Field(default=16, ge=1)
    max_new_tokens: dict[Task, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    generation: dict[str, Any] = Field(default_factory=dict)
    n_resamples: int = Field(default=2000, ge=100)
    level: float = Field(default=0.95, gt=0.5, lt=1.0)
    output: str | None = None
    folders: list[str] = Field(default_factory=list)

    @field_validator("max_new_tokens", mode="before")
    @classmethod
    def _same_for_all_tasks(cls, value: Any) -> Any:
        return {"pope": value, "captions": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("conditions")
    @classmethod
    def _condition_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            check_name("condition", name)
        return value


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the configuration of an experiment, with overrides of the form 'key.key=value'.

    Raises:
        InputError: missing file, malformed YAML, unknown key (with the nearest known one) or unusable value; the
            message names the file and the line.
    """
    return parse_config(YamlFile.read(Path(path)), overrides)


def parse_config(content: YamlFile, overrides: Sequence[str] = ()) -> Config:
    """The same from a YAML text that has been read."""
    _spell_out(content.values)
    for assignment in overrides:
        content.set_value(assignment)
        _spell_out(content.values)
    try:
        return Config.model_validate(content.values)
    except ValidationError as error:
        raise InputError("\n".join(_explain(content, dict(one)) for one in error.errors())) from error


def _spell_out(values: dict[str, Any]) -> None:
    """Write names that stand for a mapping as one, so that overrides reach into them (`--set model.dtype=bfloat16`)."""
    if isinstance(values.get("model"), str):
        values["model"] = {"id": values["model"]}
    if isinstance(values.get("models"), list):
        values["models"] = [{"id": one} if isinstance(one, str) else one for one in values["models"]]
    if isinstance(values.get("datasets"), list):
        values["datasets"] = [{"name": one} if isinstance(one, str) else one for one in values["datasets"]]


def _explain(content: YamlFile, error: Mapping[str, Any]) -> str:
    """One error of pydantic as 'file:line: key: what is wrong'."""
    location = [part for part in error["loc"] if part not in ("list[str]", "bool")]
    place = content.place(location)
    key = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = nearest(str(location[-1]), known)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(sorted(known))}"
        return f"{place}: unknown key {key!r}; {hint}"
    if error["type"] == "missing":
        return f"{place}: {key!r} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    found = "" if error["type"] == "value_error" else f"; found {error['input']!r}"
    return f"{place}: {key}: {message}{found}" if key else f"{place}: {message}{found}"


def _known_keys(location: Sequence[Any]) -> list[str]:
    if location and location[0] == "datasets":
        return list(DatasetConfig.model_fields)
    if location and location[0] in ("model", "models"):
        return list(ModelConfig.model_fields)
    return list(Config.model_fields)


def find_config(name: str | Path, near: Sequence[Path]) -> Path:
    """The file of an experiment: a path, or the name of one that comes with slitlamp (`demo`).

    Raises InputError, with the nearest known names, if there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = {file.stem: file for folder in reversed(near) for file in sorted(folder.glob("*.yaml"))}
    stem = path.name.removesuffix(".yaml")
    if stem in known:
        return known[stem]
    close = nearest(stem, known)
    hint = (
        f"did you mean {' or '.join(map(repr, close))}?"
        if close
        else f"experiments that come with slitlamp: {', '.join(sorted(known))}"
    )
    raise InputError(f"no experiment {str(name)!r}: it is neither a file nor a known name; {hint}")
