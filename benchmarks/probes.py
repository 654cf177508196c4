"""What grouped cross-validation of linear probes costs: slitlamp's batch of fits against a loop over scikit-learn's.

    python benchmarks/probes.py              one core, 8 layers x 1,024 features x 10,000 samples; writes results/probes.{csv,md}
    python benchmarks/probes.py --quick      2 layers x 64 x 1,500; writes nothing

Both standardise by the training fold, fit L2-regularised logistic regression of every fold at every penalty, and score the
held-out fold; both get the same float32 features in memory and as many threads. scikit-learn's is LogisticRegression with
its defaults (lbfgs, tol 1e-4, max_iter 100), slitlamp's `fit_logistic` with its own (the same tolerance, no such limit
reached). A round is one layer, on which both do all of the work, and which of the two goes first changes from round to
round. Peak memory is that of `cross_validated`, the nested procedure that the probes use, over one layer and over all.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import _first  # noqa: F401
import _measure as measure
import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from probes.linear_fits import DEFAULT_STRENGTHS, Folds, auroc, cross_validated, fit_logistic, grouped_folds

RESULTS = Path(__file__).parent / "results"
PROMISED_RATIO = 10.0
PROMISED_AUROC = 0.005
Found = TypeVar("Found")


@dataclass(frozen=True)
class Size:
    """How much there is to fit; `per_group` samples share an image."""

    layers: int = 8
    features: int = 1024
    samples: int = 10_000
    folds: int = 5
    per_group: int = 5
    strengths: tuple[float, ...] = DEFAULT_STRENGTHS

    @property
    def groups(self) -> np.ndarray:
        return np.arange(self.samples) // self.per_group


def layer(size: Size, place: int) -> tuple[Tensor, Tensor]:
    """Features of one layer and labels: features as hidden states have them, labels that follow a direction of theirs.

    The variance of the k-th principal component falls as 1 / k, features are far from zero and of unequal size. The labels
    follow a random direction, the same in each component's own units, the more so the later the layer.
    """
    rng = torch.Generator().manual_seed(place)
    n, d = size.samples, size.features
    whitened = torch.randn(n, d, generator=rng)
    mix = torch.linalg.qr(torch.randn(d, d, generator=rng)).Q
    score = whitened @ torch.nn.functional.normalize(torch.randn(d, generator=rng), dim=0)
    y = torch.rand(n, generator=rng) < torch.sigmoid((1 + 2 * place / size.layers) * score - 0.6)
    x = (whitened / torch.arange(1, d + 1).sqrt()) @ mix
    return x * torch.logspace(-1, 1, d) + 3 * torch.randn(d, generator=rng), y


def ours(x: Tensor, y: Tensor, folds: Folds, strengths: tuple[float, ...]) -> np.ndarray:
    """AUROC [fold, strength] of the held-out samples."""
    fit = fit_logistic(x, y, folds, strengths)
    rows = [fit.scores(x[test])[0, fold] for fold, test in enumerate(folds.test)]
    return np.stack([auroc(one.numpy(), y[test].numpy()) for one, test in zip(rows, folds.test, strict=True)])


def theirs(x: Tensor, y: Tensor, folds: Folds, strengths: tuple[float, ...]) -> tuple[np.ndarray, int]:
    """The same by a loop over scikit-learn's estimator, and how many of its fits its limit of iterations ended."""
    areas, unfinished = np.empty((len(folds), len(strengths))), 0
    for fold, test in enumerate(folds.test):
        scaler = StandardScaler()
        train, held_out = scaler.fit_transform(x[~test].numpy()), scaler.transform(x[test].numpy())
        for place, strength in enumerate(strengths):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model = LogisticRegression(C=1 / strength).fit(train, y[~test].numpy())
            unfinished += int(model.n_iter_[0] >= model.max_iter)
            areas[fold, place] = roc_auc_score(y[test].numpy(), model.decision_function(held_out))
    return areas, unfinished


@dataclass
class Outcome:
    """What one number of threads gave."""

    threads: int
    load: float
    """Of the machine when it began, without this script."""
    rounds: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of slitlamp and of scikit-learn for one layer."""
    processor: list[tuple[float, float]] = field(default_factory=list)
    """The same in processor time, which other work on the machine changes less."""
    differences: list[float] = field(default_factory=list)
    """Per round, the largest difference of AUROC over folds and penalties."""
    best: list[tuple[float, float]] = field(default_factory=list)
    """Per round, the best AUROC over penalties, mean over folds, of both."""
    unfinished: int = 0
    fits: int = 0

    @property
    def ratio(self) -> measure.Ratio:
        return measure.ratio(self.rounds)

    @property
    def totals(self) -> tuple[float, float]:
        """Seconds of both for everything."""
        mine, other = (sum(side) for side in zip(*self.rounds, strict=True))
        return mine, other


@dataclass(frozen=True)
class Memory:
    """Peak memory of the nested cross-validation beyond that of doing nothing; None where it cannot be measured."""

    one_layer: int | None
    all_layers: int | None
    layer_bytes: int
    seconds_per_layer: float


def timed(function: Callable[[], Found]) -> tuple[tuple[float, float], Found]:
    """(seconds, seconds of processor time over all threads), and what the function gave."""
    start = time.perf_counter(), time.process_time()
    result = function()
    return (time.perf_counter() - start[0], time.process_time() - start[1]), result


def compare(size: Size, passes: int, threads: int) -> Outcome:
    """Both on every layer in turn, `passes` times, with a line of progress each."""
    torch.set_num_threads(threads)
    outcome = Outcome(threads, os.getloadavg()[0])
    with threadpool_limits(threads):
        small = Size(features=8, samples=200, layers=1, strengths=(1.0,))
        x, y = layer(small, 0)
        for run in (ours, theirs):  # loads kernels
            run(x, y, grouped_folds(small.groups, y, 2), small.strengths)
        for number in range(passes * size.layers):
            place = number % size.layers
            x, y = layer(size, place)
            folds = grouped_folds(size.groups, y, size.folds)
            if number % 2:
                other, (expected, unfinished) = timed(partial(theirs, x, y, folds, size.strengths))
                mine, areas = timed(partial(ours, x, y, folds, size.strengths))
            else:
                mine, areas = timed(partial(ours, x, y, folds, size.strengths))
                other, (expected, unfinished) = timed(partial(theirs, x, y, folds, size.strengths))
            outcome.rounds.append((mine[0], other[0]))
            outcome.processor.append((mine[1], other[1]))
            outcome.differences.append(float(np.abs(areas - expected).max()))
            outcome.best.append((float(areas.mean(axis=0).max()), float(expected.mean(axis=0).max())))
            outcome.unfinished += unfinished
            outcome.fits += expected.size
            print(
                f"{threads} threads, round {number}: layer {place}: {mine[0]:.2f} s against {other[0]:.1f} s "
                f"({other[0] / mine[0]:.1f} times, {other[1] / mine[1]:.1f} in processor time), "
                f"AUROC within {outcome.differences[-1]:.4f}",
                flush=True,
            )
    return outcome


def peaks(size: Size, threads: int) -> Memory:
    """Peak memory of `cross_validated` over one layer and over all of them, which it asks for one after the other."""
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    x, y = layer(size, 0)

    def states(place: int) -> Tensor:
        return x.roll(place, dims=1)  # a copy, as a layer read from a store is

    def nested(n_layers: int) -> None:
        cross_validated(states, y, size.groups, strengths=size.strengths, n_folds=size.folds, n_layers=n_layers)

    def extra(n_layers: int) -> int | None:
        with measure.peak(device) as idle:
            pass
        with measure.peak(device) as busy:
            nested(n_layers)
        return None if idle.bytes is None or busy.bytes is None else busy.bytes - idle.bytes

    with threadpool_limits(threads):
        (seconds, _), one = timed(partial(extra, 1))
        return Memory(one, extra(size.layers), x.nbytes, seconds)


def verdicts(outcomes: Sequence[Outcome]) -> list[str]:
    """What was promised, and whether it was reached with every number of threads."""
    lines = []
    for one in outcomes:
        mine, other = one.totals
        lines += [
            (other / mine >= PROMISED_RATIO and one.ratio.low >= PROMISED_RATIO,
             f"{other / mine:.1f} times faster than the loop over scikit-learn on {one.threads} core(s) (median of layers "
             f"{one.ratio.value:.1f} [{one.ratio.low:.1f}, {one.ratio.high:.1f}]), promised at least {PROMISED_RATIO:.0f}"),
            (max(one.differences) <= PROMISED_AUROC,
             f"AUROC of every layer, fold and penalty within {max(one.differences):.4f} of scikit-learn's, promised "
             f"{PROMISED_AUROC}"),
        ]  # fmt: skip
    return [f"{'reached' if met else 'MISSED'}: {text}" for met, text in lines]


def markdown(outcomes: Sequence[Outcome], memory: Memory, size: Size) -> str:
    """The page of results."""
    fits, inner = size.folds * len(size.strengths), size.folds * (size.folds - 1) // 2
    names = ("torch", "scikit-learn", "numpy")
    amounts = [
        f"{one / 1e6:,.0f} MB" if one is not None else "not measured" for one in (memory.one_layer, memory.all_layers)
    ]
    lines = [
        "# Linear probes: grouped cross-validation",
        "",
        f"Logistic regression of {size.folds} grouped folds x {len(size.strengths)} penalties on {size.layers} layers of "
        f"{size.samples:,} samples x {size.features:,} features (float32), standardised by the training fold: {fits} problems "
        "a layer. slitlamp solves those of a layer as one batch; the loop over scikit-learn (LogisticRegression, lbfgs, "
        "defaults) solves one after the other. Both did all of them, layer by layer in turn, in one process on the same "
        "cores. `python benchmarks/probes.py` makes this page; every round is in [probes.csv](probes.csv).",
        "",
        f"- date: {datetime.datetime.now(datetime.UTC).date().isoformat()}",
        f"- device: {platform.machine()}, {os.cpu_count()} cores; load before: "
        f"{', '.join(f'{one.load:.1f}' for one in outcomes)} (other work slows both; their ratio is taken within a layer, and in "
        "processor time besides)",
        f"- versions: python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in names)}",
        "",
        "| cores | passes | slitlamp, all layers | scikit-learn, all layers | ratio of the totals | ratio per layer: median "
        "[95 %], range | the same in processor time |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for one in outcomes:
        passes = len(one.rounds) // size.layers
        mine, other = one.totals
        spreads = []
        for rounds in (one.rounds, one.processor):
            ratio, each = measure.ratio(rounds), [other / mine for mine, other in rounds]
            spreads.append(f"{ratio.value:.1f} [{ratio.low:.1f}, {ratio.high:.1f}], {min(each):.1f} to {max(each):.1f}")
        lines.append(
            f"| {one.threads} | {passes} | {mine / passes:.1f} s | {other / passes:.0f} s | {other / mine:.1f} | "
            f"{spreads[0]} | {spreads[1]} |"
        )
    best = np.mean([pair for one in outcomes for pair in one.best], axis=0)
    stopped, count = sum(one.unfinished for one in outcomes), sum(one.fits for one in outcomes)
    lines += [
        "",
        f"Best AUROC over penalties, mean over folds and layers: slitlamp {best[0]:.4f}, scikit-learn {best[1]:.4f}. "
        f"{stopped} of scikit-learn's {count} fits were ended by its limit of 100 iterations, which saves it time.",
        "",
        f"Peak memory of the nested cross-validation that the probes use (`cross_validated`: {inner} inner training sets x "
        f"{len(size.strengths)} penalties, {size.folds} outer fits and one on everything; {memory.seconds_per_layer:.1f} s "
        f"a layer), beyond what was there before: {amounts[0]} for one layer, {amounts[1]} for {size.layers}; the features "
        f"of a layer are {memory.layer_bytes / 1e6:,.0f} MB.",
        "",
        "## What was promised",
        "",
        *(f"- {line}" for line in verdicts(outcomes)),
        "",
    ]
    return "\n".join(lines)


def rows(outcomes: Sequence[Outcome], size: Size) -> list[dict[str, float]]:
    """A row per round."""
    return [
        {"threads": one.threads, "pass": number // size.layers, "layer": number % size.layers,
         "slitlamp_seconds": round(mine, 3), "sklearn_seconds": round(other, 3), "ratio": round(other / mine, 2),
         "slitlamp_processor_seconds": round(used[0], 3), "sklearn_processor_seconds": round(used[1], 3),
         "processor_ratio": round(used[1] / used[0], 2),
         "auroc_difference": round(difference, 6), "slitlamp_auroc": round(best[0], 5), "sklearn_auroc": round(best[1], 5)}
        for one in outcomes
        for number, ((mine, other), used, difference, best) in enumerate(
            zip(one.rounds, one.processor, one.differences, one.best, strict=True)
        )
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 layers x 64 x 1,500; writes nothing")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="numbers of threads, one run each")
    parser.add_argument("--passes", type=int, default=2, help="how often over all layers")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    size = Size(layers=2, features=64, samples=1500) if options.quick else Size()
    outcomes = [compare(size, options.passes, threads) for threads in options.threads]
    memory = peaks(size, max(options.threads))
    print("\n".join(["", *verdicts(outcomes)]))
    if not options.quick:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "probes.md").write_text(markdown(outcomes, memory, size))
        table = rows(outcomes, size)
        with (options.output / "probes.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
        print(f"\nwrote {options.output / 'probes.md'} and probes.csv")


if __name__ == "__main__":
    main()
