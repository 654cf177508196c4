"""Time in alternating runs, peak memory, and the interval of a ratio."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

MIN_ROUNDS = 5


def ram() -> int:
    """Bytes of memory of this machine, or of the control group that the process runs in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return total if text == "max" else min(total, int(text))


def device_memory(device: torch.device) -> int:
    """Bytes of memory of the device."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else ram()


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def alternate(
    plain: Callable[[], Any], other: Callable[[], Any], device: torch.device, *, budget: float, most: int
) -> list[tuple[float, float]]:
    """Seconds of both, side by side in every round, the first of them changing: at least five rounds, then to the budget."""
    rounds: list[tuple[float, float]] = []
    start = time.perf_counter()
    while len(rounds) < MIN_ROUNDS or (len(rounds) < most and time.perf_counter() - start < budget):
        gc.collect()
        if len(rounds) % 2:
            second = seconds(other, device)
            first = seconds(plain, device)
        else:
            first = seconds(plain, device)
            second = seconds(other, device)
        rounds.append((first, second))
    return rounds


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of the time over the plain run's, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def ratio(rounds: list[tuple[float, float]]) -> Ratio:
    """Of the rounds of `alternate`. Rounds are resampled whole, so what slows both runs of a round cancels."""
    values = np.array([other / plain for plain, other in rounds])
    interval = stats.bootstrap(
        (values,), np.median, method="percentile", n_resamples=4000, rng=np.random.default_rng(0)
    ).confidence_interval
    return Ratio(float(np.median(values)), float(interval.low), float(interval.high))


@dataclass
class Peak:
    """Filled by `peak`."""

    bytes: int | None = None
    """Peak memory while it was watched: resident bytes of the process, or bytes allocated on the GPU."""


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Watch the peak of memory. On systems where the process's peak cannot be reset it stays None."""
    result = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        result.bytes = torch.cuda.max_memory_allocated(device)
        return
    _give_back()
    reset = _reset_peak()
    yield result
    if reset:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        result.bytes = int(found.group(1)) * 1024 if found else None


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _give_back() -> None:
    """Ask the allocator to return what is free, so that one run's leftovers do not stand in another's peak."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
