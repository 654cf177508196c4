"""The parts of the site that are made from the code and from committed results, so that they cannot grow stale."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pandas as pd
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import interventions
import probes
from slitlamp.cli import app
from slitlamp.decoding import ContrastDecoding, Intervention
from slitlamp.decoding.visual_tokens import VisualTokenEdit
from slitlamp.experiments.config import Config, DatasetConfig, ModelConfig
from slitlamp.models.families import families_table
from slitlamp.reports.figures import FIGURES, SWEEPS
from slitlamp.tracing import GatheringProbe, Probe, sites
from slitlamp.tracing.sites import SITES, Site, canonical_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    head = list(columns)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- reference ----------------------------------------------------------------------------------------------------------


INHERITED = {"probes": (Probe, GatheringProbe), "interventions": (Intervention, ContrastDecoding, VisualTokenEdit)}
"""Whose methods are documented once, with what every probe and every intervention is."""


def objects(module: str) -> str:
    """An entry for every public name of a package, in the order of the alphabet, with the methods that are its own."""
    common = sorted({name for base in INHERITED[module] for name in vars(base) if not name.startswith("_")})
    filters = f'["!^_", "!^({"|".join(common)})$"]'
    names = sorted({"probes": probes, "interventions": interventions}[module].__all__, key=str.lower)
    return "\n\n".join(f"::: {module}.{name}\n    options: {{show_bases: false, filters: {filters}}}" for name in names)


def site_table() -> str:
    """Every site: its constructor, the axes of what is recorded, and what it is."""
    rows = []
    for name in SITES:
        make = getattr(sites, name)
        site: Site = make()
        first = " ".join((make.__doc__ or "").split()).split(' Positions are "all"')[0]
        what = re.split(r": \[|(?<=\.) ", first)[0].rstrip(".")
        try:
            canonical = f"`{canonical_name(name, 0).replace('blocks.0', 'blocks.{l}')}`"
        except ValueError:
            canonical = ""
        rows.append([f"`{name}`", "[" + ", ".join(site.axes) + "]", what, canonical])
    return table(["site", "axes", "what it is", "TransformerLens"], rows)


def site_signatures() -> str:
    """The constructors with their parameters, those of equal parameters together."""
    by_signature: dict[str, list[str]] = {}
    for name in SITES:
        by_signature.setdefault(_parameters(getattr(sites, name)), []).append(name)
    parts = []
    for signature, names in by_signature.items():
        title = ", ".join(f"`{name}`" for name in names)
        parts.append(f"{title}\n\n```text\nname({signature})\n```")
    return "\n\n".join(parts)


def _parameters(function: Callable[..., Site]) -> str:
    return ", ".join(f"{one.name}={one.default!r}" for one in inspect.signature(function).parameters.values())


def figures() -> str:
    """Every figure that a run can have: its name, its title, and the probe that declares it."""
    rows = [[f"`{name}`", one.title, "any run"] for name, one in FIGURES.items()]
    rows += [[f"`{name}`", one.title, "runs of such conditions"] for name, one in SWEEPS.items()]
    for point in sorted(entry_points(group="slitlamp.probe_figures"), key=lambda one: one.name):
        rows += [[f"`{name}`", drawing.title, f"probe `{point.name}`"] for name, drawing in point.load().items()]
    return table(["figure", "title", "of"], rows)


def panels() -> str:
    """An entry for every module of the reports that draws on given axes, with the functions that do."""
    parts = []
    for path in sorted((ROOT / "slitlamp" / "reports").glob("*.py")):
        found = [
            node.name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
            if "ax" in {one.arg for one in (*node.args.args, *node.args.kwonlyargs)}
        ]
        if found:
            options = f"{{heading_level: 3, show_root_full_path: true, members: [{', '.join(found)}]}}"
            parts.append(f"::: slitlamp.reports.{path.stem}\n    options: {options}")
    return "\n\n".join(parts)


# -- configuration ------------------------------------------------------------------------------------------------------


def yaml_keys() -> str:
    """Every key of a YAML file, with type, default and meaning."""
    parts = []
    for title, model in (
        ("The file", Config),
        ("A model: ModelConfig", ModelConfig),
        ("A data set: DatasetConfig", DatasetConfig),
    ):
        meanings = attributes_of(model)
        rows = [
            [f"`{name}`", _type(field.annotation), _default(field), meanings[name]]
            for name, field in model.model_fields.items()
        ]
        parts.append(f"## {title}\n\n{table(['key', 'type', 'default', 'meaning'], rows)}")
    return "\n\n".join(parts)


def attributes_of(model: type[BaseModel]) -> dict[str, str]:
    """The meanings in the Attributes section of a docstring, by name."""
    section = inspect.getdoc(model).partition("Attributes:\n")[2]  # type: ignore[union-attr]
    entries = re.split(r"\n(?=\S)", textwrap.dedent(section))
    return {name: " ".join(text.split()) for name, text in (entry.split(": ", 1) for entry in entries)}


def _type(annotation: Any) -> str:
    """A type as the author of a YAML file thinks of it."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(args[0])
    if origin is typing.Literal:
        return " or ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(one) for one in args if one is not type(None))
    if origin is list:
        return f"list of {_type(args[0])}"
    if origin is tuple:
        return f"pair of {_type(args[0])}"
    if origin is dict:
        return f"mapping to {_type(args[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return {"ModelConfig": "model", "DatasetConfig": "data set"}.get(annotation.__name__, "component")
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true/false", "Any": "anything"}
    return names[getattr(annotation, "__name__", str(annotation))]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, ModelConfig):
        return f"`{value.id}`"
    if value is None or value == [] or value == {}:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "`" + str(value).replace("'", "") + "`"


# -- command line -------------------------------------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    """The commands of `slitlamp` by name, as click's."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def cli() -> str:
    """Every command with its arguments and options."""
    parts = []
    for name, command in commands().items():
        context = command.context_class(command, info_name=f"slitlamp {name}")
        places = [one for one in command.params if one.param_type_name == "argument"]
        usage = " ".join(["slitlamp", name, "[OPTIONS]", *(_written(one) for one in places)])
        rows = [_parameter(one, context) for one in command.params]
        text = inspect.cleandoc(command.help or "")
        parts.append(f"## {name}\n\n```text\n{usage}\n```\n\n{text}\n\n{table(['', 'meaning', 'default'], rows)}")
    return "\n\n".join(parts)


def _written(one: Any) -> str:
    """What to write for an argument, or for the value of an option; dots where it takes several."""
    name: str = one.name.upper()
    return f"{name}..." if one.nargs == -1 else name


def _parameter(one: Any, context: Any) -> list[str]:
    """What to write, what it means, and the default."""
    default = one.get_default(context)
    shown = "" if default in (None, False, [], ()) or callable(default) else f"`{default}`"
    written = _written(one)
    if one.param_type_name == "option":
        written = ", ".join(one.opts) + ("" if one.is_flag else f" {one.metavar or written}")
    return [f"`{written}`", getattr(one, "help", None) or "", "required" if one.required else shown]


# -- results ------------------------------------------------------------------------------------------------------------


def verdict(*conditions: str) -> str:
    """What the experiment `interventions` found of some conditions: against the reference and against the best control."""
    found = pd.read_csv(RESULTS / "interventions" / "tables" / "verdicts.csv")
    rows = []
    for condition in conditions:
        for metric, name in (("chair_i", "CHAIR_i"), ("chair_i_matched", "CHAIR_i at equal recall"), ("f1", "POPE F1")):
            one = found[(found["treatment"] == condition) & (found["metric"] == metric)].iloc[0]
            shown = name if len(conditions) == 1 else f"`{condition}`: {name}"
            rows.append([shown, _interval(one, ""), _control(one), str(one["verdict"])])
    return table(["score", "minus the unmodified model", "minus the hardest control", "verdict"], rows)


def _interval(row: pd.Series, prefix: str) -> str:
    value, low, high = (f"{row[prefix + key]:+.3f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _control(row: pd.Series) -> str:
    name = str(row["control"]).removeprefix(f"{row['treatment']}_")
    return f"{_interval(row, 'control_')} (`{name}`)"


def experiments() -> str:
    """The experiments that come with slitlamp, from the head of each file's results."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\]\([^)]*\) \| (.*) \| (\d+) \|$", text, re.MULTILINE)
    return table(["experiment", "title", "seconds"], ([f"`{name}`", title, seconds] for name, title, seconds in rows))


GENERATED: dict[str, Callable[..., str]] = {
    "cli": cli,
    "experiments": experiments,
    "families": families_table,
    "figures": figures,
    "objects": objects,
    "panels": panels,
    "site_signatures": site_signatures,
    "site_table": site_table,
    "verdict": verdict,
    "yaml_keys": yaml_keys,
}
"""By the name that a page gives."""
