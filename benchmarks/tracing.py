"""What recording costs: time and peak memory of slitlamp and of its peers over the plain forward pass.

    python benchmarks/tracing.py              everything; writes benchmarks/results/tracing.{csv,md,png,svg}
    python benchmarks/tracing.py --quick      600 tokens, five rounds; writes nothing
    python benchmarks/tracing.py --only slitlamp --only decode-600

Rules, the same for all: every pair of case and recorder has a fresh process of its own. There the recorder is set up and
warmed by a small run, peak memory is taken of a plain run and of a recording run, and then both are timed in turn, at least
five times, the first of the two changing. All get the same encoded batch and compute the logits of the last position alone;
all must give the same numbers, which is checked for every run of this script. A recorder whose T x T matrices would need
more than `--memory-limit` of the memory is not run: the table says what it would need, by arithmetic.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

# No network: nothing here needs it, and transformer_lens would run pip where a processor fails to load.
os.environ |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import _first  # noqa: F401
import _measure as measure
import _report as report
import torch
from _cases import CASES, Case
from _contestants import CONTESTANTS, Contestant, Plain, Recorded
from transformers.utils.logging import disable_progress_bar

RESULTS = Path(__file__).parent / "results"
AGREE = 1e-3
"""Largest relative difference of the recorded means between two recorders (float32 sums in another order)."""


# -- in the process of one pair ---------------------------------------------------------------------------------------


@torch.no_grad()
def work(case: Case, kind: type[Contestant], device: torch.device, budget: float, most: int) -> dict[str, Any]:
    """Measure one recorder on one case, in this process: its time, or its peak memory where `most` is 0."""
    vlm = case.model()
    vlm.model.to(device)
    batch = case.batch(vlm)
    small = vlm.encode(None, [" ".join(["describe"] * 8)], chat=False)
    plain, other = Plain(vlm), kind(vlm)

    def run(contestant: Contestant) -> Any:
        if case.new_tokens:
            return contestant.generate(batch, **case.options(batch))
        return contestant.prefill(batch)

    plain.prefill(small)  # loads kernels and starts threads; memory of the full size is not touched yet
    run(plain)
    with measure.peak(device) as before:
        run(plain)
    with measure.peak(device) as during:
        result = run(other)
    recorded = other.tensors(result)
    size = sum(one.nbytes for one in recorded.values())
    means = _means(recorded)
    del result, recorded
    if most == 0:
        extra = None if before.bytes is None or during.bytes is None else during.bytes - before.bytes
        return {"extra_bytes": extra}
    rounds = measure.alternate(lambda: run(plain), lambda: run(other), device, budget=budget, most=most)
    ratio = measure.ratio(rounds)
    plain_times, times = zip(*rounds, strict=True)
    return {
        "status": "measured",
        "ratio": ratio.value,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "rounds": len(rounds),
        "seconds": sorted(times)[len(times) // 2],
        "plain_seconds": sorted(plain_times)[len(plain_times) // 2],
        "recorded_bytes": size,
        "means": means,
    }


def _means(recorded: Recorded) -> dict[str, float]:
    return {name: float(values.double().abs().mean()) for name, values in recorded.items()}


# -- in the process that starts them ----------------------------------------------------------------------------------


def measure_pair(case: Case, kind: type[Contestant], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one recorder on one case in processes of its own: one for time, one for memory."""
    timed = _in_process(case, kind, options, options.rounds, {})
    if timed["status"] == "failed":
        return timed
    # every tensor's memory goes back to the system when it is freed, so that the peak is that of what is held
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    return timed | _in_process(case, kind, options, 0, allocator)


def _in_process(
    case: Case, kind: type[Contestant], options: argparse.Namespace, rounds: int, environment: dict[str, str]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--worker", case.name, kind.name, "--output", str(output)]
        command += ["--device", options.device, "--threads", str(options.threads)]
        command += ["--budget", str(options.budget), "--rounds", str(rounds)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), **environment}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0 or not output.exists():
            sys.stderr.write(done.stdout[-4000:])
            return {"status": "failed", "note": f"failed (exit {done.returncode})"}
        result: dict[str, Any] = json.loads(output.read_text())
        return result


def measure_all(options: argparse.Namespace) -> list[report.Row]:
    """All chosen pairs, with a line of progress for each."""
    cases = [case for case in CASES.values() if options.cases is None or case.name in options.cases]
    kinds = [kind for kind in CONTESTANTS.values() if options.recorders is None or kind.name in options.recorders]
    rows: list[report.Row] = []
    start = time.perf_counter()
    limit = int(options.memory_limit * measure.device_memory(torch.device(options.device)))
    for case in cases:
        needs = _needs(case)
        means: dict[str, float] = {}
        for kind in kinds:
            if kind is Plain:
                continue
            row: report.Row = {
                "case": case.name,
                "contestant": kind.name,
                "note": "",
                "predicted_bytes": needs[kind.name],
            }
            if case.new_tokens and not kind.decodes:
                row |= {"status": "unsupported", "note": "has no cache while generating", "predicted_bytes": 0}
            elif needs[kind.name] > limit:
                row |= {"status": "predicted"}
                row["note"] = (
                    f"not run: needs about {needs[kind.name] / 1e9:.1f} GB (predicted, not measured), over the limit of "
                    f"{limit / 1e9:.1f} GB set for this run"
                )
            else:
                row |= measure_pair(case, kind, options)
                found = row.pop("means", {})
                means = means or found
                odd = [name for name in found if abs(found[name] - means[name]) > AGREE * abs(means[name])]
                if odd:
                    row["note"] = f"records other values of {', '.join(odd)}"
            rows.append(report.judge(row))
            print(f"{time.perf_counter() - start:5.0f} s  {case.title:28} {kind.title:31} {_short(row)}", flush=True)
    return rows


def _needs(case: Case) -> dict[str, int]:
    """Bytes that every recorder's T x T matrices take, by arithmetic."""
    vlm = case.model()
    length = case.batch(vlm).length
    needs = {}
    for kind in CONTESTANTS.values():
        one = kind.__new__(kind)  # the arithmetic needs the sizes alone, not the recorder
        one.vlm = vlm
        needs[kind.name] = one.bytes_needed(length)
    return needs


def _short(row: report.Row) -> str:
    if row["status"] != "measured":
        return str(row["note"])
    extra = "" if row["extra_bytes"] is None else f"  {row['extra_bytes'] / 1e6:+9.1f} MB"
    interval = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
    return f"{interval}{extra}  {row['rounds']} rounds {row['note']}"


def setting(options: argparse.Namespace) -> dict[str, str]:
    """Where and with what it was measured."""
    names = ("torch", "transformers", "nnsight", "transformer-lens")
    if options.device.startswith("cuda"):
        device = torch.cuda.get_device_name(torch.device(options.device))
    else:
        device = f"{_cpu()}, {options.threads} threads of {os.cpu_count()} cores"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{device}, {measure.ram() / 1e9:.0f} GB",
        "versions": ", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]),
        "model": "random LLaVA-1.5: 8 layers, hidden size 512, 8 heads, float32, 576 tokens per image, batch of one; "
        "the embedded model: 6 layers, hidden size 192",
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="600 tokens, five rounds; writes nothing")
    parser.add_argument("--only", action="append", default=[], choices=[*CASES, *CONTESTANTS], metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of timing per pair, beyond five rounds")
    parser.add_argument("--rounds", type=int, default=40, help="most rounds per pair")
    parser.add_argument("--memory-limit", type=float, default=0.6, help="share of the memory that a recorder may need")
    parser.add_argument("--output", type=Path, help="folder of the results; of a whole run benchmarks/results")
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "RECORDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = set(options.only)
    options.cases = chosen & set(CASES) or None
    options.recorders = chosen & set(CONTESTANTS) or None
    if options.quick:
        options.rounds, options.budget = measure.MIN_ROUNDS, 0.0
        options.cases = options.cases or {"prefill-600", "decode-600"}
    elif not chosen:
        options.output = options.output or RESULTS
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    if options.worker:
        warnings.simplefilter("ignore")
        case, kind = CASES[options.worker[0]], CONTESTANTS[options.worker[1]]
        result = work(case, kind, torch.device(options.device), options.budget, options.rounds)
        options.output.write_text(json.dumps(result))
        return
    rows = measure_all(options)
    print("\n".join(["", *report.verdicts(rows)]))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        report.write_csv(rows, options.output / "tracing.csv")
        (options.output / "tracing.md").write_text(report.markdown(rows, setting(options)))
        report.draw(rows, options.output)
        print(f"\nwrote {options.output}/tracing.csv, .md, .png and .svg")


if __name__ == "__main__":
    main()
