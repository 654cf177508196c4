"""What interventions cost while decoding: time and peak memory over plain greedy decoding of the same model.

    python benchmarks/decoding.py              batches of 1 and 8; writes benchmarks/results/decoding.{csv,md,png,svg}
    python benchmarks/decoding.py --quick      a batch of 1, five rounds, no memory; writes nothing
    python benchmarks/decoding.py --only vhr --device cuda

A prompt of 600 tokens, 576 of them of an image, then a fixed number of tokens. A round is a plain run (`generate` of Hugging
Face's model) and a run under every method, in an order that moves on by one from round to round; ratios are taken within a
round. Two of them: of the whole (what a user waits for, with the prompt and whatever a method runs before it), and of the time
between the first token and the last, per token. Peak memory is taken of each pair in a fresh process.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import _first  # noqa: F401
import _measure as measure
import torch
from _cases import prompt, random_llava

from interventions import (
    ClsPruning,
    HeadReinforcement,
    ImageAttentionBoost,
    ImageContrast,
    ImageFreeGuidance,
    SkipPerceptual,
)
from slitlamp import VLM
from slitlamp.decoding import Intervention
from slitlamp.flops import BlockSizes, Tokens, decoder_flops, pruned_flops
from slitlamp.models import Batch
from slitlamp.reports import style

RESULTS = Path(__file__).parent / "results"
LENGTH = 600
NEW_TOKENS = {1: 64, 8: 24}
"""Rows of the batch -> how many tokens are generated. A second pass over the prompt weighs the less the more they are."""


@dataclass(frozen=True)
class Method:
    """One thing to measure.

    Attributes:
        title: in table and figure.
        make: the interventions, anew for each run.
        whole: largest time over the plain run's that was promised, and for which batches.
        later: the same of the time per token after the first.
        saves: (sizes of the model, tokens of a row) -> the share of operations that need not be done, by arithmetic.
    """

    title: str
    make: Callable[[], Sequence[Intervention]]
    whole: tuple[float, tuple[int, ...]] | None = None
    later: tuple[float, tuple[int, ...]] | None = None
    saves: Callable[[BlockSizes, Tokens], float] | None = None


TWO_BRANCHES: dict[str, Any] = {"whole": (1.7, (1,)), "later": (1.7, (1,))}

KEEP = 0.25


def pruned(sizes: BlockSizes, tokens: Tokens) -> float:
    """The share of operations that need not be done without the pruned image tokens."""
    return pruned_flops(sizes, tokens, int(KEEP * tokens.image)) / decoder_flops(sizes, tokens)


METHODS = {  # a method joins by a line here
    "vhr": Method("VHR, heads scaled", lambda: [HeadReinforcement()], later=(1.1, (1, 8))),
    "deleted": Method("two branches, image deleted", lambda: [ImageFreeGuidance(view="deleted")], **TWO_BRANCHES),
    "diffusion": Method("two branches, image noised", lambda: [ImageContrast(view="diffusion")], **TWO_BRANCHES),
    "boost": Method("attention to the image raised", lambda: [ImageAttentionBoost()]),
    "skip": Method(
        "image tokens skip the FFN of every block",
        lambda: [SkipPerceptual(interval=1)],
        saves=SkipPerceptual(interval=1).saved,
    ),
    "prune": Method(f"{KEEP:.0%} of the image tokens kept", lambda: [ClsPruning(keep=KEEP)], saves=pruned),
}


# -- one run ------------------------------------------------------------------------------------------------------------


class Clock:
    """A streamer that notes when it is given the prompt and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # the value is on the CPU, so that the device has done with it

    def end(self) -> None:
        """Nothing is left to be given."""


@dataclass(frozen=True)
class Times:
    """Seconds of one run: of the whole, and per token after the first."""

    whole: float
    later: float


def run(vlm: VLM, batch: Batch, method: Method | None, new_tokens: int) -> Times:
    """One generation; without a method, by Hugging Face's model alone."""
    clock = Clock()
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "streamer": clock}

    def generate() -> None:
        if method is None:
            vlm.model.generate(**batch.inputs(), do_sample=False, **options)
        else:
            with vlm.apply(*method.make()):
                vlm.generate(batch, **options)

    whole = measure.seconds(generate, vlm.device)
    assert len(clock.times) == 1 + new_tokens
    return Times(whole, (clock.times[-1] - clock.times[1]) / (new_tokens - 1))


# -- time ---------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one method gave on one batch."""

    method: str
    rows: int
    new_tokens: int
    rounds: list[tuple[Times, Times]] = field(default_factory=list)
    """Of the plain run and of the method's."""
    extra_bytes: int | None = None
    plain_bytes: int | None = None
    saved: float | None = None
    """The share of the operations of the decoder's blocks that need not be done, estimated."""

    def ratio(self, what: str) -> measure.Ratio:
        """Of "whole" or "later"."""
        return measure.ratio([(getattr(plain, what), getattr(other, what)) for plain, other in self.rounds])

    def seconds(self, what: str) -> tuple[float, float]:
        """Medians of the plain run and of the method's."""
        pairs = torch.tensor([[getattr(one, what) for one in pair] for pair in self.rounds], dtype=torch.float64)
        plain, other = pairs.median(dim=0).values.tolist()
        return plain, other


def compare(
    vlm: VLM, batch: Batch, names: Sequence[str], new_tokens: int, *, budget: float, most: int
) -> list[Outcome]:
    """Every method beside the plain run: at least five rounds, then to the budget in seconds."""
    outcomes = {name: Outcome(name, batch.size, new_tokens) for name in names}
    every: list[str | None] = [None, *names]
    for name in every:  # loads kernels
        run(vlm, batch, None if name is None else METHODS[name], 2)
    start, number = time.perf_counter(), 0
    while number < measure.MIN_ROUNDS or (number < most and time.perf_counter() - start < budget):
        gc.collect()
        turn = number % len(every)
        times = {
            name: run(vlm, batch, None if name is None else METHODS[name], new_tokens)
            for name in [*every[turn:], *every[:turn]]
        }
        for name, outcome in outcomes.items():
            outcome.rounds.append((times[None], times[name]))
        number += 1
    sizes, tokens = BlockSizes.of(vlm.anatomy), tokens_of(batch, new_tokens)
    for name, outcome in outcomes.items():
        saves = METHODS[name].saves
        outcome.saved = None if saves is None else saves(sizes, tokens)
    return list(outcomes.values())


def tokens_of(batch: Batch, new_tokens: int) -> Tokens:
    """The tokens of a row; all rows have as many."""
    image = batch.image_mask[0]
    before = int(image.nonzero()[0, 0])
    n_image = int(image.sum())
    return Tokens(before, n_image, batch.lengths[0] - before - n_image, new_tokens)


# -- memory, in a process of its own ------------------------------------------------------------------------------------


def peaks(vlm: VLM, batch: Batch, method: Method, new_tokens: int) -> dict[str, int | None]:
    """Peak memory of a plain run, and what the method's takes beyond it."""
    run(vlm, vlm.encode(None, ["describe this"], chat=False), None, 2)
    with measure.peak(vlm.device) as before:
        run(vlm, batch, None, new_tokens)
    with measure.peak(vlm.device) as during:
        run(vlm, batch, method, new_tokens)
    extra = None if before.bytes is None or during.bytes is None else during.bytes - before.bytes
    return {"extra_bytes": extra, "plain_bytes": before.bytes}


def peaks_elsewhere(outcome: Outcome, options: argparse.Namespace) -> None:
    """`peaks` in a fresh process, where nothing that was freed before is used again."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "peaks.json"
        command = [sys.executable, __file__, "--worker", outcome.method, str(outcome.rows), str(outcome.new_tokens)]
        command += ["--threads", str(options.threads), "--device", options.device, "--output", str(output)]
        subprocess.run(command, check=True)
        found = json.loads(output.read_text())
    outcome.extra_bytes, outcome.plain_bytes = found["extra_bytes"], found["plain_bytes"]


# -- what comes out -----------------------------------------------------------------------------------------------------


def verdicts(outcomes: Sequence[Outcome]) -> list[str]:
    """One line per promise: reached or missed, with the figure and its interval."""
    lines = []
    for one in outcomes:
        method = METHODS[one.method]
        for what, words, promised in (
            ("whole", "the whole run", method.whole),
            ("later", "tokens after the first", method.later),
        ):
            if promised is not None and one.rows in promised[1]:
                ratio = one.ratio(what)
                word = "reached" if ratio.value <= promised[0] else "MISSED"
                lines.append(
                    f"{word}: {method.title}, batch of {one.rows}, {words}: {_interval(ratio)} times the plain run, promised "
                    f"at most {promised[0]:.2f}"
                )
    return lines


def savings(outcomes: Sequence[Outcome]) -> list[str]:
    """What methods that leave computation out need not do, and what they save."""
    return [
        f"{METHODS[one.method].title}, batch of {one.rows}: {one.saved:.1%} of the operations of the decoder's blocks need not "
        f"be done (estimated by slitlamp/flops.py); {1 - one.ratio('whole').value:+.1%} of the time is saved (measured)"
        for one in outcomes
        if one.saved is not None
    ]


def _interval(ratio: measure.Ratio) -> str:
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _megabytes(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 1e6:,.0f} MB"


def markdown(outcomes: Sequence[Outcome], setting: dict[str, str]) -> str:
    """The page of results."""
    lines = [
        "# Decoding under interventions: time and peak memory",
        "",
        f"A prompt of {LENGTH} tokens, 576 of them of an image, then a fixed number of tokens, over plain greedy decoding by the "
        "same Hugging Face model in the same process, run by run in turn: median of the ratios within rounds, and its 95 % "
        "bootstrap interval. The whole is what a user waits for, with the prompt and all that a method runs before it; later "
        "tokens are those after the first. Extra memory is the peak beyond that of the plain run. `python "
        "benchmarks/decoding.py` makes this page.",
        "",
        *(f"- {name}: {value}" for name, value in setting.items()),
        "",
        "| method | batch | tokens | whole / plain | later tokens / plain | seconds (plain) | ms per later token (plain) | "
        "rounds | extra peak memory (plain) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in outcomes:
        plain, whole = one.seconds("whole")
        plain_later, later = one.seconds("later")
        lines.append(
            f"| {METHODS[one.method].title} | {one.rows} | {one.new_tokens} | {_interval(one.ratio('whole'))} | "
            f"{_interval(one.ratio('later'))} | {whole:.3g} ({plain:.3g}) | {1e3 * later:.3g} ({1e3 * plain_later:.3g}) | "
            f"{len(one.rounds)} | {_megabytes(one.extra_bytes)} ({_megabytes(one.plain_bytes)}) |"
        )
    lines += ["", "## What was promised", "", *(f"- {line}" for line in verdicts(outcomes)), ""]
    if savings(outcomes):
        lines += [
            "## What is saved",
            "",
            "SkipPerceptual computes everything and puts it aside: it measures what a skip does to what the model says, and "
            "saves nothing itself. ClsPruning runs the tower once more, and the first block over the whole prompt, to choose "
            "the tokens.",
            "",
            *(f"- {line}" for line in savings(outcomes)),
            "",
        ]
    return "\n".join(lines)


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row per method, batch and round."""
    return [
        {"method": one.method, "batch": one.rows, "new_tokens": one.new_tokens, "round": number,
         "seconds": f"{other.whole:.5g}", "plain_seconds": f"{plain.whole:.5g}",
         "later_seconds": f"{other.later:.5g}", "plain_later_seconds": f"{plain.later:.5g}",
         "extra_bytes": one.extra_bytes, "plain_bytes": one.plain_bytes, "saved_operations": one.saved}
        for one in outcomes
        for number, (plain, other) in enumerate(one.rounds)
    ]  # fmt: skip


def draw(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Two panels, the whole and later tokens: a line per method, a mark per batch, and what was promised."""
    names = [name for name in METHODS if any(one.method == name for one in outcomes)]
    batches = sorted({one.rows for one in outcomes})
    marks = dict(zip(batches, ((style.BLUE, "o"), (style.VERMILLION, "s")), strict=False))
    with style.style():
        figure = style.new_figure(8.4, 1.3 + 0.45 * len(names))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, what, label in zip(panels, ("whole", "later"), ("whole run", "tokens after the first"), strict=True):
            for place, name in enumerate(names):
                promised = getattr(METHODS[name], what)
                for number, size in enumerate(batches):
                    height = place + 0.35 * ((number + 0.5) / len(batches) - 0.5)
                    colour, marker = marks[size]
                    if promised is not None and size in promised[1]:
                        reach = [height - 0.17, height + 0.17]
                        axes.plot([promised[0]] * 2, reach, color=style.INK, linewidth=1.4, zorder=2)
                    for one in outcomes:
                        if (one.method, one.rows) == (name, size):
                            ratio = one.ratio(what)
                            axes.plot([ratio.low, ratio.high], [height] * 2, color=colour, linewidth=1.4, zorder=3)
                            axes.plot([ratio.value], [height], color=colour, marker=marker, zorder=4)
            axes.axvline(1, color=style.GREY, linewidth=0.8, zorder=1)
            axes.set_xlabel(f"{label}: time / plain")
        for size, (colour, marker) in marks.items():
            panels[0].plot([], [], linestyle="", color=colour, marker=marker, label=f"batch of {size}")
        panels[0].plot([], [], color=style.INK, linewidth=1.4, label="promised at most")
        panels[0].set_yticks(range(len(names)), [METHODS[name].title for name in names])
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        figure.legend(handles=panels[0].get_legend_handles_labels()[0], loc="outside lower center", ncols=3)
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"decoding.{suffix}", dpi=150, metadata={"Date": None} if suffix == "svg" else None)


def setting(options: argparse.Namespace, load: float) -> dict[str, str]:
    """Where and with what it was measured."""
    if options.device.startswith("cuda"):
        device = torch.cuda.get_device_name(torch.device(options.device))
    else:
        device = f"{platform.machine()}, {options.threads} threads of {os.cpu_count()} cores, load before: {load:.1f}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "versions": f"python {platform.python_version()}, {versions}",
        "model": "random LLaVA-1.5: 8 layers, hidden size 512, 8 heads, float32",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a batch of 1, five rounds, no memory; writes nothing")
    parser.add_argument("--only", action="append", choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing per batch, beyond five rounds")
    parser.add_argument("--rounds", type=int, default=40, help="most rounds per batch")
    parser.add_argument("--output", type=Path, help="folder of the results; of a whole run benchmarks/results")
    parser.add_argument("--worker", nargs=3, metavar=("METHOD", "ROWS", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    vlm = random_llava()
    vlm.model.to(options.device)
    if options.worker:
        name, n_rows, new_tokens = options.worker
        found = peaks(vlm, prompt(vlm, 1, LENGTH, int(n_rows)), METHODS[name], int(new_tokens))
        options.output.write_text(json.dumps(found))
        return
    names = options.only or list(METHODS)
    sizes = {1: NEW_TOKENS[1]} if options.quick else NEW_TOKENS
    outcomes = []
    start = time.perf_counter()
    for n_rows, new_tokens in sizes.items():
        batch = prompt(vlm, 1, LENGTH, n_rows)
        budget = 0.0 if options.quick else options.budget
        for one in compare(vlm, batch, names, new_tokens, budget=budget, most=options.rounds):
            if not options.quick:
                peaks_elsewhere(one, options)
            outcomes.append(one)
            print(
                f"{time.perf_counter() - start:5.0f} s  batch of {n_rows}  {METHODS[one.method].title:40} whole "
                f"{_interval(one.ratio('whole'))}, later tokens {_interval(one.ratio('later'))}, "
                f"{_megabytes(one.extra_bytes)} more, {len(one.rounds)} rounds",
                flush=True,
            )
    print("\n".join(["", *verdicts(outcomes), *savings(outcomes)]))
    folder = options.output or (None if options.quick or options.only else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "decoding.md").write_text(markdown(outcomes, setting(options, load)))
        table = rows(outcomes)
        with (folder / "decoding.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
        draw(outcomes, folder)
        print(f"\nwrote {folder}/decoding.csv, .md, .png and .svg")


if __name__ == "__main__":
    main()
