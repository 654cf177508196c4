"""What grouped cross-validation of linear probes costs: slitlamp's batch of fits against a loop over scikit-learn's.

    python benchmarks/linear_fits.py              8 layers x 1,024 features x 10,000 samples; writes results/linear_fits.md
    python benchmarks/linear_fits.py --quick      2 layers x 64 x 1,500; writes nothing

Both standardise by the training fold, fit L2-regularised logistic regression of every fold at every penalty, and score the
held-out fold; both get the same float32 features in memory and as many threads. scikit-learn's is LogisticRegression with
its defaults (lbfgs, tol 1e-4, max_iter 100), slitlamp's `fit_logistic` with its own (the same tolerance). In every round
slitlamp fits all folds of a layer, and scikit-learn one fold of it at all penalties, which counts as many times as there
are folds: the folds are alike, and all of scikit-learn's take too long. The layer and the fold change from round to round,
and so does which of the two goes first. (Not named probes.py: a script's folder is the first place that Python looks for
the package `probes`.)
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

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


@dataclass(frozen=True)
class Size:
    """How much there is to fit; `per_group` samples share an image."""

    layers: int = 8
    features: int = 1024
    samples: int = 10_000
    folds: int = 5
    per_group: int = 5
    strengths: tuple[float, ...] = DEFAULT_STRENGTHS


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


def theirs(x: Tensor, y: Tensor, test: Tensor, strengths: tuple[float, ...]) -> np.ndarray:
    """AUROC [strength] of one held-out fold, by a loop over scikit-learn's estimator."""
    scaler = StandardScaler()
    train, held_out = scaler.fit_transform(x[~test].numpy()), scaler.transform(x[test].numpy())
    areas = []
    for strength in strengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=1 / strength).fit(train, y[~test].numpy())
        areas.append(roc_auc_score(y[test].numpy(), model.decision_function(held_out)))
    return np.array(areas)


@dataclass
class Outcome:
    """Per round: seconds of slitlamp for a layer, of scikit-learn for a fold times the folds; the largest AUROC difference."""

    rounds: list[tuple[float, float]] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    best: list[tuple[float, float]] = field(default_factory=list)
    extra_bytes: int | None = None
    layer_bytes: int = 0
    nested_seconds: float = float("nan")

    @property
    def ratio(self) -> measure.Ratio:
        return measure.ratio(self.rounds)


def timed(function: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def compare(size: Size, n_rounds: int, threads: int) -> Outcome:
    """Rounds of both in turn, a line of progress each; then memory, and the whole nested cross-validation of a layer."""
    torch.set_num_threads(threads)
    outcome, groups = Outcome(), np.arange(size.samples) // size.per_group
    with threadpool_limits(threads):
        x, y = layer(Size(features=8, samples=200, layers=1), 0)
        ours(x, y, grouped_folds(np.arange(200), y, 2), (1.0,))  # loads kernels
        theirs(x, y, torch.arange(200) < 60, (1.0,))
        for number in range(n_rounds):
            place, fold = number % size.layers, number % size.folds
            x, y = layer(size, place)
            folds = grouped_folds(groups, y, size.folds)
            runs = {
                "ours": partial(ours, x, y, folds, size.strengths),
                "theirs": partial(theirs, x, y, folds.test[fold], size.strengths),
            }
            found = {name: timed(runs[name]) for name in (("theirs", "ours") if number % 2 else ("ours", "theirs"))}
            seconds = found["ours"][0], found["theirs"][0] * size.folds
            areas = found["ours"][1][fold], found["theirs"][1]
            outcome.rounds.append(seconds)
            outcome.differences.append(float(np.abs(areas[0] - areas[1]).max()))
            outcome.best.append((float(areas[0].max()), float(areas[1].max())))
            print(
                f"round {number}: layer {place}, fold {fold}: {seconds[0]:.2f} s against {seconds[1]:.1f} s "
                f"({seconds[1] / seconds[0]:.0f} times), AUROC within {outcome.differences[-1]:.4f}",
                flush=True,
            )
        x, y = layer(size, size.layers - 1)
        folds, device = grouped_folds(groups, y, size.folds), torch.device("cpu")
        outcome.layer_bytes = x.nbytes
        with measure.peak(device) as idle:
            pass
        with measure.peak(device) as busy:
            fit_logistic(x, y, folds, size.strengths)
        if idle.bytes is not None and busy.bytes is not None:
            outcome.extra_bytes = busy.bytes - idle.bytes
        start = time.perf_counter()
        cross_validated([x], y, groups, strengths=size.strengths, n_folds=size.folds)
        outcome.nested_seconds = time.perf_counter() - start
    return outcome


def verdicts(outcome: Outcome) -> list[str]:
    """What was promised, and whether it was reached."""
    ratio, difference = outcome.ratio, max(outcome.differences)
    lines = [
        (ratio.low >= PROMISED_RATIO, f"{ratio.value:.0f} [{ratio.low:.0f}, {ratio.high:.0f}] times faster than the loop over "
         f"scikit-learn, promised at least {PROMISED_RATIO:.0f}"),
        (difference <= PROMISED_AUROC, f"AUROC of every fold and penalty within {difference:.4f} of scikit-learn's, promised "
         f"{PROMISED_AUROC}"),
    ]  # fmt: skip
    return [f"{'reached' if met else 'MISSED'}: {text}" for met, text in lines]


def markdown(outcome: Outcome, size: Size, threads: int) -> str:
    """The page of results."""
    fits, inner = size.folds * len(size.strengths), size.folds * (size.folds - 1) // 2
    mine, other = (float(np.median(side)) for side in zip(*outcome.rounds, strict=True))
    memory = "not measured" if outcome.extra_bytes is None else f"{outcome.extra_bytes / 1e6:,.0f} MB"
    names = ("torch", "scikit-learn", "numpy")
    lines = [
        "# Linear probes: grouped cross-validation",
        "",
        f"Logistic regression of {size.folds} grouped folds x {len(size.strengths)} penalties on {size.layers} layers of "
        f"{size.samples:,} samples x {size.features:,} features (float32), standardised by the training fold. In each round "
        f"slitlamp fitted the {fits} problems of a layer; scikit-learn (LogisticRegression, lbfgs, defaults) fitted the "
        f"{len(size.strengths)} of one fold, and its time counts {size.folds} times. `python benchmarks/linear_fits.py` makes "
        "this page.",
        "",
        f"- date: {datetime.datetime.now(datetime.UTC).date().isoformat()}",
        f"- device: {platform.machine()}, {threads} threads of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        f"- versions: python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in names)}",
        "",
        "| | seconds per layer (median) | seconds for all layers |",
        "|---|---|---|",
        f"| slitlamp | {mine:.2f} | {mine * size.layers:.1f} |",
        f"| scikit-learn, extrapolated from one fold a round | {other:.1f} | {other * size.layers:.0f} |",
        "",
        f"Time ratio per round, median and 95 % bootstrap interval over {len(outcome.rounds)} rounds: {outcome.ratio.value:.1f} "
        f"[{outcome.ratio.low:.1f}, {outcome.ratio.high:.1f}]. Best AUROC over penalties, mean over rounds: slitlamp "
        f"{np.mean([a for a, _ in outcome.best]):.4f}, scikit-learn {np.mean([b for _, b in outcome.best]):.4f}.",
        "",
        f"Extra peak memory of slitlamp's fits: {memory}, of a layer of {outcome.layer_bytes / 1e6:,.0f} MB; one layer is in "
        f"memory at a time. The whole nested cross-validation of a layer (`cross_validated`: {inner} inner "
        f"training sets x {len(size.strengths)} penalties, {size.folds} outer fits and one on everything) took "
        f"{outcome.nested_seconds:.1f} s.",
        "",
        "## What was promised",
        "",
        *(f"- {line}" for line in verdicts(outcome)),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="2 layers x 64 x 1,500; writes nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    size = Size(layers=2, features=64, samples=1500) if options.quick else Size()
    outcome = compare(size, max(options.rounds, measure.MIN_ROUNDS), options.threads)
    print("\n".join(["", *verdicts(outcome)]))
    if not options.quick:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "linear_fits.md").write_text(markdown(outcome, size, options.threads))
        print(f"\nwrote {options.output / 'linear_fits.md'}")


if __name__ == "__main__":
    main()
