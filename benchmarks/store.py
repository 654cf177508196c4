"""What storing costs: throughput against a bare safetensors write of the same bytes, and memory over 20,000 items.

    python benchmarks/store.py                everything, two to three minutes; writes benchmarks/results/store.csv
    python benchmarks/store.py --quick        fewer bytes and items; writes nothing

Throughput: runs that have been recorded already are given to a store and, in turn, the same tensors, joined per shard
beforehand, to `safetensors.torch.save_file`, followed by an fsync of file and folder as the store does. The store's time is
that of taking the items out of their runs (ragged ones without the padding), writing, hashing and indexing. Seven rounds, the
first of the two changing; the ratio's interval is a bootstrap over rounds.

Memory: the embedded model runs over 20,000 prompts in batches of 50, storing. Growth is the largest resident size minus that
after the first run (the shard being filled is in it), and the largest of the last nine tenths minus that of the first.
A process of its own, so that nothing freed before is used again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import _first  # noqa: F401
import _measure as measure
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

import slitlamp as sl
from slitlamp.models import Batch
from slitlamp.tracing import Site, Step
from slitlamp.tracing.store.writer import StoredTrace
from slitlamp.tracing.trace import Source

RESULTS = Path(__file__).parent / "results"
ROWS = 16
WIDTH = 4096
LAYERS = tuple(range(8))
CPU = torch.device("cpu")


# -- throughput ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Runs:
    """Recorded runs: what passes to the store, and how many bytes of it are real."""

    sites: list[Site]
    steps: list[Step]
    nbytes: int


def reduced(n_runs: int) -> Runs:
    """Means over positions in float32: 128 kB per item, all of one shape."""
    site = sl.sites.resid_post(layers=LAYERS, positions="image", reduce="mean")
    steps = [
        Step(
            {site.label: {layer: torch.randn(ROWS, WIDTH) for layer in LAYERS}},
            {site.label: torch.ones(ROWS, 1).bool()},
        )
        for _ in range(n_runs)
    ]
    return Runs([site], steps, n_runs * ROWS * len(LAYERS) * WIDTH * 4)


def ragged(n_runs: int) -> Runs:
    """Positions of text in bfloat16, 20 to 60 per item, padded in the trace."""
    site = sl.sites.resid_post(layers=LAYERS, positions="text")
    generator = torch.Generator().manual_seed(0)
    steps, numbers = [], 0
    for _ in range(n_runs):
        lengths = torch.randint(20, 61, (ROWS,), generator=generator)
        valid = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
        values = {layer: torch.randn(*valid.shape, WIDTH).bfloat16() for layer in LAYERS}
        steps.append(Step({site.label: values}, {site.label: valid}))
        numbers += int(lengths.sum()) * len(LAYERS) * WIDTH
    return Runs([site], steps, numbers * 2)


def images(n_runs: int) -> Runs:
    """All 576 image positions in bfloat16: 38 MB per item."""
    site = sl.sites.resid_post(layers=LAYERS, positions="image")
    n = 576
    rows = 2
    steps = [
        Step(
            {site.label: {layer: torch.randn(rows, n, WIDTH).bfloat16() for layer in LAYERS}},
            {site.label: torch.ones(rows, n).bool()},
        )
        for _ in range(n_runs)
    ]
    return Runs([site], steps, n_runs * rows * n * len(LAYERS) * WIDTH * 2)


CASES: dict[str, tuple[Callable[[int], Runs], int]] = {
    "means, float32, 131 kB per item": (reduced, 200),
    "20 to 60 positions, bfloat16, 2.6 MB per item": (ragged, 12),
    "576 positions, bfloat16, 38 MB per item": (images, 7),
}


def batches(vlm: sl.VLM, runs: Runs) -> Iterator[Batch]:
    """A batch for each run; only the ids and the number of rows matter here."""
    rows = len(next(iter(runs.steps[0].masks.values())))
    one = vlm.encode(None, ["what is there ?"] * rows, chat=False)
    for run in range(len(runs.steps)):
        yield dataclasses.replace(one, ids=tuple(f"{run}/{row}" for row in range(rows)))


def opened(vlm: sl.VLM, runs: Runs, folder: Path) -> StoredTrace:
    """A store for the runs."""
    return StoredTrace(runs.sites, sl.StoreOptions(folder), Source(vlm.model, vlm.anatomy, vlm.tokenizer), name="none")


def fill(trace: StoredTrace, runs: Runs, batches: list[Batch]) -> None:
    """Give the runs to a store as a session does, and close it."""
    for batch, step in zip(batches, runs.steps, strict=True):
        trace.admit(batch)
        trace.start(batch, decoding=False)
        trace.steps = [step]
        trace.finish()
    trace.close()


def joined(folder: Path) -> list[dict[str, Tensor]]:
    """The tensors of each shard of a store, in memory."""
    shards = sorted(folder.glob("*.safetensors"))
    from safetensors.torch import load

    return [load(path.read_bytes()) for path in shards]


def bare(shards: list[dict[str, Tensor]], folder: Path) -> None:
    """What the store is compared with."""
    for number, tensors in enumerate(shards):
        path = folder / f"{number}.safetensors"
        save_file(tensors, path)
        for one in (path, folder):
            handle = os.open(one, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def throughput(vlm: sl.VLM, make: Callable[[int], Runs], n_runs: int, folder: Path, rounds: int) -> dict[str, float]:
    """GB/s of both and their ratio, with its interval."""
    runs = make(n_runs)
    of_runs = list(batches(vlm, runs))
    fill(opened(vlm, runs, folder / "first"), runs, of_runs)
    assert sl.open_store(folder / "first").verify() == {}
    shards = joined(folder / "first")

    def empty() -> None:
        for path in folder.iterdir():
            shutil.rmtree(path)
        os.sync()

    def store() -> float:
        empty()
        trace = opened(vlm, runs, folder / "store")
        return measure.seconds(lambda: fill(trace, runs, of_runs), CPU)

    def plain() -> float:
        empty()
        (folder / "bare").mkdir()
        return measure.seconds(lambda: bare(shards, folder / "bare"), CPU)

    times = []
    for number in range(rounds):
        if number % 2:
            second = plain()
            first = store()
        else:
            first = store()
            second = plain()
        times.append((first, second))
    found = measure.ratio(times)  # of rates: the bare write's time over the store's
    medians = torch.tensor(times).median(dim=0).values.tolist()
    return {
        "GB": runs.nbytes / 1e9,
        "store GB/s": runs.nbytes / 1e9 / medians[0],
        "bare GB/s": runs.nbytes / 1e9 / medians[1],
        "ratio": found.value,
        "low": found.low,
        "high": found.high,
    }


# -- memory -------------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(vlm: sl.VLM, folder: Path, n_items: int) -> dict[str, float]:
    """Growth of the resident size over many items, in MB."""
    rows = 50
    batch = vlm.encode(None, ["Is there a dog in the image?", "Describe this image."] * (rows // 2))
    sites = [
        sl.sites.resid_post(positions="text", reduce="mean", label="mean"),
        sl.sites.resid_post(positions="text"),
        sl.sites.z(positions="last"),
        sl.sites.attention(queries="last", keys="all"),
    ]
    sizes, start = [], time.perf_counter()
    with vlm.trace(*sites, store=folder) as trace:
        for run in range(n_items // rows):
            ids = tuple(f"{run}/{row}" for row in range(rows))
            vlm.forward(dataclasses.replace(batch, ids=ids), logits_to_keep=1)
            sizes.append(resident())
        assert not trace.pending(ids)
    sizes.append(resident())
    store = sl.open_store(folder)
    assert len(store) == n_items
    tenth = len(sizes) // 10
    return {
        "items": n_items,
        "MB stored": store.nbytes / 1e6,
        "MB grown since the first run": (max(sizes) - sizes[0]) / 1e6,
        "MB grown since a tenth": (max(sizes[tenth:]) - max(sizes[:tenth])) / 1e6,
        "items/s": n_items / (time.perf_counter() - start),
    }


def hashes() -> str:
    """The rate of the checksum alone, which runs beside the write."""
    data = torch.randint(0, 256, (256 << 20,), dtype=torch.uint8).numpy()
    start = time.thread_time()
    zlib.crc32(data)  # type: ignore[arg-type]
    return f"CRC-32 {len(data) / 1e9 / (time.thread_time() - start):.1f} GB/s"


def main() -> None:
    """Measure, print, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer bytes and items; write no table")
    parser.add_argument("--folder", type=Path, help="where to store; by default the folder of temporary files")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)  # the process that memory is measured in
    given = parser.parse_args()
    if given.memory_of:
        print(json.dumps(memory(sl.VLM.organism(), given.folder, given.memory_of)))
        return
    vlm = sl.VLM.organism()
    vlm.weights_hash  # noqa: B018  # computed once per model, not per store
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "transformers"))
    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, {versions}"
    print(f"{machine}; {hashes()}; load {os.getloadavg()[0]:.1f}")
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        for case, (make, n_runs) in CASES.items():
            (Path(name) / "work").mkdir()
            count = max(1, n_runs // 8) if given.quick else n_runs
            found = throughput(vlm, make, count, Path(name) / "work", 5 if given.quick else 7)
            shutil.rmtree(Path(name) / "work")
            print(
                f"{case}: store {found['store GB/s']:.2f} GB/s, bare write {found['bare GB/s']:.2f} GB/s, "
                f"ratio {found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
            )
            rows.append({"case": case, **found})
        count = 2_000 if given.quick else 20_000
        command = [sys.executable, __file__, "--memory-of", str(count), "--folder", f"{name}/memory"]
        grown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"memory: grew by {grown['MB grown since the first run']:.0f} MB from the first run to the end of {grown['items']}, "
        f"by {grown['MB grown since a tenth']:.0f} MB from a tenth on ({grown['MB stored']:.0f} MB stored, "
        f"{grown['items/s']:.0f} items/s)"
    )
    rows.append({"case": f"memory over {grown['items']} items", **grown})
    if not given.quick:
        RESULTS.mkdir(exist_ok=True)
        table = pd.DataFrame(rows)
        table["machine"] = machine
        table.to_csv(RESULTS / "store.csv", index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
