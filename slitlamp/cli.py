"""The command `slitlamp`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

import slitlamp
from slitlamp import completion
from slitlamp.errors import InputError, MissingModelError, SlitlampError, unknown

if TYPE_CHECKING:
    from slitlamp.experiments import Experiment, Run
    from slitlamp.experiments.config import Config

app = typer.Typer(
    help="See what a vision-language model does inside while it answers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change an entry of the configuration; repeatable.",
        autocompletion=completion.settings,
    ),
]
Output = Annotated[Path | None, typer.Option(help="The run folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run in the folder first.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; an error that slitlamp raises on purpose is one message and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app(args=None if arguments is None else list(arguments), prog_name="slitlamp")
    except SlitlampError as error:
        from slitlamp.experiments.processes import n_processes, process_number

        where = "" if n_processes() == 1 else f" in process {process_number()}"
        err.print(Text.assemble((f"error{where}: ", "bold red"), str(error)), soft_wrap=True)
        raise SystemExit(2) from None


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        out.print(slitlamp.__version__)
        raise typer.Exit


@app.command()
def demo(
    output: Output = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few images only: to see that everything works.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Head reinforcement against its controls on the embedded model: about two minutes, then a report to open."""
    from slitlamp.experiments import find_config, read_config
    from slitlamp.experiments.places import data_folders

    path = find_config("demo", data_folders("experiments"))
    config = read_config(path, ["take=4", "n_resamples=200"] if quick else [])
    default = Path("runs") / ("demo-quick" if quick else "demo")
    _run(_prepared(config, path, output or default, overwrite))


@app.command()
def run(
    experiments: Annotated[
        list[str],
        typer.Argument(
            help="YAML files, or names of experiments that come with slitlamp.", autocompletion=completion.experiments
        ),
    ],
    changes: Overrides = None,
    output: Output = None,
    overwrite: Overwrite = False,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="How many to run at a time: each takes its share of the cores.")
    ] = 1,
) -> None:
    """Run experiments, one after the other; one that was killed goes on where it stopped.

    All are checked before the first one runs. Of several, those whose model is not there are left out, and the exit status
    says so.
    """
    from slitlamp.experiments import find_config, read_config
    from slitlamp.experiments.places import data_folders
    from slitlamp.experiments.processes import n_processes

    if output is not None and len(experiments) > 1:
        raise InputError("--output takes one experiment; several have their outputs in their files")
    if jobs > 1 and n_processes() > 1:
        raise InputError("--jobs starts processes of its own: leave it out under accelerate launch or torchrun")
    paths = [find_config(one, data_folders("experiments")) for one in experiments]
    configs = [read_config(path, changes or []) for path in paths]
    prepared = [_prepared(config, path, output, overwrite) for config, path in zip(configs, paths, strict=True)]
    ready, left_out = [], []
    for experiment, path in zip(prepared, paths, strict=True):
        try:
            experiment.prepare()
            ready.append((path.stem, experiment))
        except MissingModelError as error:
            left_out.append(f"{path.stem} is left out: {error}")
    if left_out and ready:
        err.print(Text("\n".join(left_out)), soft_wrap=True)
    if jobs > 1 and len(ready) > 1:
        left_out += _run_together(ready, jobs)
    else:
        for name, experiment in ready:
            if len(paths) > 1:
                out.print(Text(name, style="bold"))
            _run(experiment)
    if left_out:
        raise InputError("\n".join(left_out))


def _run_together(named: Sequence[tuple[str, Experiment]], jobs: int) -> list[str]:
    """Run several at a time; what is to be said of those that ended in an error."""
    from slitlamp.experiments.jobs import run_jobs

    failed = []
    with _stoppable("the run folders"), out.status(f"{len(named)} experiments, {jobs} at a time"):
        for finished in run_jobs([experiment for _, experiment in named], jobs):
            name = named[finished.place][0]
            out.print(Text(name, style="bold"))
            if finished.report is None:
                failed.append(f"{name}: {finished.error}")
            else:
                _say(finished.lines, finished.report)
    return failed


def _prepared(config: Config, path: Path, output: Path | None, overwrite: bool) -> Experiment:
    from slitlamp.experiments import Experiment
    from slitlamp.experiments.places import data_folders, inside

    folders = [path.resolve().parent, Path.cwd(), *data_folders("experiments")]
    if output is None:
        output = inside(config.output or f"runs/{path.stem}", [Path.cwd(), *folders], "output")
        output = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output
    return Experiment.from_config(config, output=output, folders=folders, overwrite=overwrite)


def _run(experiment: Experiment) -> None:
    from slitlamp.experiments.processes import is_main_process

    _silence_libraries()
    with _stoppable(str(experiment.output)):
        finished = experiment.run()
    if is_main_process():
        _report(finished)


@contextlib.contextmanager
def _stoppable(place: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        err.print(f"stopped; the same command goes on from here ({place})")
        raise SystemExit(130) from None


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run folder.", autocompletion=completion.runs)],
) -> None:
    """Draw the figures and write report.html again, from what a run folder holds."""
    from slitlamp.experiments import load_run

    _report(load_run(folder))


@app.command()
def publish(
    folders: Annotated[
        list[Path], typer.Argument(help="Run folders with their reports made.", autocompletion=completion.runs)
    ],
    to: Annotated[Path, typer.Option(help="Where the copies go, each in a folder of its own.")] = Path(
        "experiments/results"
    ),
) -> None:
    """Copy the figures, small tables, configuration and environment of runs to a folder that is kept under version control.

    Where that is the folder `results` beside the experiments of slitlamp, their README.md is written anew: what the runs show.
    """
    from slitlamp.experiments import load_run
    from slitlamp.experiments.publish import publish as copy
    from slitlamp.reports.papers import CLAIMS
    from slitlamp.reports.papers.page import RESULTS, write_page
    from slitlamp.reports.published import figure_captions

    for folder in folders:
        run = load_run(folder)
        out.print(Text(str(copy(run, to, figure_captions(folder) if run.finished else None))), soft_wrap=True)
    beside = to.resolve().parent
    if to.resolve().name == RESULTS and all((beside / f"{claim.experiment}.yaml").is_file() for claim in CLAIMS):
        out.print(Text(str(write_page(beside, CLAIMS))), soft_wrap=True)


def _report(run: Run) -> None:
    from slitlamp.experiments.summary import summary

    with out.status("figures and report"):
        path = run.report()
    _say(summary(run), path)


def _say(lines: Sequence[str], path: Path) -> None:
    for line in lines:
        out.print(Text(f"- {line}"), soft_wrap=True)
    out.print(Text.assemble("report: ", (str(path), "bold")), soft_wrap=True)


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="`organism`, a folder, a configuration file (.json), or a hub id.", autocompletion=completion.models
        ),
    ] = "organism",
    revision: Annotated[str | None, typer.Option(help="Of the hub repository.")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Memory of weights, cache, traces and stores.")] = False,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="What is recorded, such as resid_post:image:mean, attention:last:image or z:last:layers=0,4-8; repeatable."
        ),
    ] = None,
    image_size: Annotated[str | None, typer.Option(metavar="WxH", help="Of an image; by default 640x480.")] = None,
    image_tokens: Annotated[int | None, typer.Option(help="Per item, where no processor says so.")] = None,
    text_tokens: Annotated[int | None, typer.Option(help="Text tokens of the prompt.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens generated after it.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of weights and recordings.", autocompletion=completion.dtypes)
    ] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Items per batch.")] = 1,
    gpus: Annotated[int, typer.Option(help="Over how many GPUs the model is spread.")] = 1,
    items: Annotated[int, typer.Option(help="How many items a store holds.")] = 1,
) -> None:
    """Anatomy and sites of a model, and what it will take (--estimate), from its configuration alone: no weights are loaded."""
    from slitlamp.estimates import DEFAULT_SITES
    from slitlamp.inspection import estimate_model, estimate_sections, inspect_model

    _silence_libraries()
    if estimate:
        found = estimate_sections(
            estimate_model(
                model,
                site or DEFAULT_SITES,
                revision=revision,
                image_size=None if image_size is None else _width_and_height(image_size),
                image_tokens=image_tokens,
                text_tokens=text_tokens,
                new_tokens=new_tokens,
                dtype=dtype,
                batch=batch,
                gpus=gpus,
                items=items,
            )
        )
    else:
        if site or image_size or image_tokens or text_tokens or new_tokens or (batch, gpus, items) != (1, 1, 1):
            raise InputError("these options belong to an estimate; add --estimate")
        found = inspect_model(model, revision=revision).sections()
    _print_sections(found)


def _print_sections(sections: Mapping[str, Sequence[Sequence[str]]]) -> None:
    for title, rows in sections.items():
        out.print(Text(title, style="italic"))
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        out.print(table)
        out.print()


@app.command()
def doctor() -> None:
    """Versions, devices, attention implementations, free memory, and a trial on the embedded model.

    The exit code is 1 if something is wrong.
    """
    _silence_libraries()
    with out.status("looking"):
        from slitlamp.doctor import examine

        found = examine()
    _print_sections(found.sections)
    for problem in found.problems:
        out.print(Text.assemble(("problem: ", "bold red"), problem), soft_wrap=True)
    if found.problems:
        raise SystemExit(1)
    out.print(Text("everything works", style="bold green"))


def _width_and_height(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise InputError(f"--image-size takes width x height in pixels, such as 640x480; found {text!r}")
    return int(width), int(height)


@app.command(name="list")
def list_names(
    what: Annotated[
        str,
        typer.Argument(
            help="probes, interventions, datasets, families or experiments.", autocompletion=completion.lists
        ),
    ],
) -> None:
    """What can be named in a configuration."""
    columns = ("family", "model_type", "class", "image tokens", "notes") if what == "families" else ()
    table = Table(
        *(Column(title, overflow="fold") for title in columns),
        box=None,
        padding=(0, 2, 0, 0),
        show_header=bool(columns),
    )
    for name, *texts in _listing(what):
        table.add_row(Text(name, style="bold"), *map(Text, texts))
    out.print(table)


def _listing(what: str) -> Iterator[tuple[str, ...]]:
    from slitlamp.experiments import places, registry
    from slitlamp.experiments.datasets import dataset_names, load_dataset

    if what in ("probes", "interventions"):
        kind = what.removesuffix("s")
        for name in registry.names(kind):
            cls = registry.find(kind, name)
            fields = ", ".join(f"{one.name}={one.default!r}" for one in dataclasses.fields(cls) if _has_default(one))
            yield name, f"{(cls.__doc__ or '').strip().splitlines()[0]}\n({fields})"
    elif what == "datasets":
        for name in dataset_names():
            data = load_dataset(name)
            yield name, f"{data.task}: {len(data)} items on {len(data.images)} images"
    elif what == "families":
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

        from slitlamp.models import FAMILIES

        for family in FAMILIES.values():
            yield family.name, family.model_type, CLASSES[family.model_type], family.image_tokens, family.notes
    elif what == "experiments":
        from slitlamp.experiments import read_config

        for folder in places.data_folders("experiments")[:1]:
            for path in sorted(folder.glob("*.yaml")):
                yield path.stem, read_config(path).title or ""
    else:
        raise unknown("list", what, completion.LISTS)


def _has_default(field: dataclasses.Field[object]) -> bool:
    return field.init and field.default is not dataclasses.MISSING


@app.command(name="train-organism")
def train_organism(
    output: Annotated[Path, typer.Option(help="Where checkpoints and the result are written.")] = Path("runs/organism"),
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation and scenes.")] = 0,
    width: Annotated[int, typer.Option(min=16, help="Of the decoder; a multiple of 16.")] = 192,
    steps: Annotated[int | None, typer.Option(min=3, help="Training steps in all; by default the full recipe.")] = None,
    card_images: Annotated[int, typer.Option(min=0, max=256, help="Scenes measured for the card; 0 for none.")] = 256,
) -> None:
    """Train the embedded model anew and measure it; a training that was killed goes on where it stopped."""
    from slitlamp.experiments.organism_card import measure_organism, write_card_tables
    from slitlamp.organism.build import build_config
    from slitlamp.organism.training import TrainingConfig
    from slitlamp.organism.training import train_organism as train

    _silence_libraries()
    try:
        build_config(width)  # refuses a width before anything is written
        config = TrainingConfig(seed=seed, width=width)
        final = train(output, config if steps is None else config.scaled(steps))
    except ValueError as error:  # the embedded model's code depends on nothing of slitlamp, its errors included
        err.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        raise SystemExit(2) from None
    out.print(Text.assemble("model: ", (str(final), "bold")), soft_wrap=True)
    if card_images:
        from slitlamp.vlm import VLM

        measured = measure_organism(VLM.from_pretrained(final), n_images=card_images)
        card = write_card_tables(final, {f"seed {seed}": measured})
        out.print(Text.assemble("card:  ", (str(card), "bold")), soft_wrap=True)


def _silence_libraries() -> None:
    """No progress bars of other libraries between ours."""
    from transformers.utils import logging as transformers_logging

    with contextlib.suppress(AttributeError):
        transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


if __name__ == "__main__":
    main()
