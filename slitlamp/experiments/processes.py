"""Several processes that do the work of one run: who they are, and how they wait for each other without hanging.

They are started by `accelerate launch` or `torchrun`. Accelerate says how many there are and which one this is. Whether
the others are still at work, and what stopped one of them, is told through a small key-value store of torch, which the
first process holds: a process may then take hours over its share while the others wait, and one that is gone is noticed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from slitlamp.errors import RunFolderError

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

BEAT = 2.0
"""Seconds between two signs of life of a process."""
PATIENCE = 300.0
"""Seconds without a sign of life after which a process is given up."""
MEETING = 600.0
"""Seconds in which all processes have to come to the start of a run."""
_PARTING = 20.0
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def n_processes() -> int:
    """How many processes were started together; 1 for one that was started in the ordinary way."""
    return max(_number(name, 1) for name in _SIZES)


def process_number() -> int:
    """The number of this process among them, from 0."""
    return max(_number(name, 0) for name in _RANKS) if n_processes() > 1 else 0


def is_main_process() -> bool:
    """Whether this is the process that writes results and reports."""
    return process_number() == 0


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else otherwise


class Processes:
    """The processes of a run.

    Attributes:
        rank: the number of this one, from 0.
        size: how many there are.
        device: the device that accelerate gives to this process; None for a process alone.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None, store: Any = None) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self._store = store
        self._stop = threading.Event()
        self._others = [one for one in range(size) if one != rank]
        self._heard: dict[int, tuple[int, float]] = {}
        self._given_up: set[int] = set()
        if store is not None:
            threading.Thread(target=self._beat, name="slitlamp-alive", daemon=True).start()

    @property
    def is_main(self) -> bool:
        """Whether this process writes results."""
        return self.rank == 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step that every process does, in the same order; it ends when all have done it.

        Args:
            name: of the step, once per run.

        Raises:
            RunFolderError: another process failed in it, or gives no sign of life.
        """
        try:
            yield
        except BaseException as error:
            self._fail(error)
            raise
        if self._store is not None:
            with self._lost():
                self._store.set(f"{name}/{self.rank}", "done")
            self._wait([f"{name}/{one}" for one in self._others])

    def check(self) -> None:
        """Raise RunFolderError when another process has failed or has ended."""
        if self._store is None:
            return
        with self._lost():
            n_failed = int(self._store.add("failed", 0))
        if n_failed:
            self._raise_failure()

    def close(self) -> None:
        """Leave; the first process waits a little for the others, who still ask its store."""
        if self._store is None:
            return
        self._stop.set()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "left")
            if self.is_main:
                self._part()

    # -- how it is done ---------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                self._store.add(f"alive/{self.rank}", 1)
            except RuntimeError:  # the first process has ended; the main thread finds out by itself
                return

    def _fail(self, error: BaseException) -> None:
        if self._store is None:
            return
        lines = str(error).strip().splitlines()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"failed/{self.rank}", f"{type(error).__name__}: {lines[0] if lines else ''}"[:500])
            self._store.add("failed", 1)
            if self.is_main and isinstance(error, Exception):
                self._part()  # its store ends with it: let the others read what happened

    def _part(self) -> None:
        end = time.monotonic() + _PARTING
        others = [one for one in self._others if one not in self._given_up]
        while time.monotonic() < end and not all(self._store.check([f"left/{one}"]) for one in others):
            time.sleep(0.05)

    def _wait(self, keys: list[str]) -> None:
        pause = 0.01
        self._heard.clear()
        while True:
            self.check()
            with self._lost():
                missing = [rank for rank, key in zip(self._others, keys, strict=True) if not self._store.check([key])]
                if not missing:
                    return
                for rank in missing:
                    self._listen(rank)
            time.sleep(pause)
            pause = min(pause * 1.5, 1.0)

    def _listen(self, rank: int) -> None:
        count, now = int(self._store.add(f"alive/{rank}", 0)), time.monotonic()
        before, since = self._heard.get(rank, (-1, now))
        if count != before:
            self._heard[rank] = (count, now)
        elif now - since > PATIENCE:
            self._given_up.add(rank)
            raise RunFolderError(
                f"process {rank} of {self.size} has given no sign of life for {PATIENCE:.0f} s: it was killed, or its "
                "machine cannot be reached. What is done is kept; the same command goes on from there"
            )

    def _raise_failure(self) -> None:
        for rank in self._others:
            with self._lost():
                found = self._store.check([f"failed/{rank}"])
                message = self._store.get(f"failed/{rank}").decode(errors="replace") if found else ""
            if found:
                with contextlib.suppress(RuntimeError):
                    self._store.set(f"left/{self.rank}", "left")
                raise RunFolderError(
                    f"process {rank} of {self.size} failed ({message}), so this one stops too. What is done is kept; the "
                    "same command goes on from there"
                )

    @contextmanager
    def _lost(self) -> Iterator[None]:
        """What torch says when the store is gone, in our words."""
        try:
            yield
        except RuntimeError as error:
            raise RunFolderError(
                f"process 0 of {self.size}, which the others report to, has ended. What is done is kept; the same command "
                "goes on from there"
            ) from error


@contextmanager
def started_together() -> Iterator[Processes]:
    """The processes that were started with this one; this one alone where there are no others.

    Every one of them has to come here, since they wait for each other.
    """
    if n_processes() == 1:
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ:
            logger.warning(
                "accelerate was asked for several processes on the CPU and started one: its --cpu needs MPI. Start them "
                "with 'accelerate launch --multi_gpu --num_processes N' (which takes CPUs where there is no GPU) or "
                "'torchrun --nproc_per_node N'"
            )
        yield Processes()
        return
    from accelerate import PartialState

    with _meeting():
        state = PartialState(cpu=_on_cpu(), timeout=timedelta(seconds=MEETING))
    rank, size = int(state.process_index), int(state.num_processes)
    if size != n_processes():
        raise RunFolderError(
            f"{n_processes()} processes were started, but accelerate counts {size} ({state.distributed_type}); to work on "
            "CPUs of a machine that has another device, set ACCELERATE_USE_CPU=true"
        )
    processes = Processes(rank, size, state.device, _shared_store(state))
    try:
        yield processes
    finally:
        processes.close()


def _on_cpu() -> bool:
    import torch

    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()


def _shared_store(state: PartialState) -> Any:
    """A store that the first process holds; its port goes to the others by accelerate's broadcast."""
    import torch
    from accelerate.utils import broadcast  # type: ignore[import-untyped]
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with _meeting():
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if state.is_main_process else None
        port = torch.tensor([0 if store is None else store.port], device=state.device)
        port = broadcast(port)
        return store or TCPStore(host, int(port), is_master=False, wait_for_workers=False)


@contextmanager
def _meeting() -> Iterator[None]:
    """What torch says when a process does not come, in our words."""
    try:
        yield
    except RuntimeError as error:
        raise RunFolderError(
            f"the processes of this run did not find each other within {MEETING:.0f} s "
            f"({str(error).strip().splitlines()[0][:200]}); every process has to run the experiment, not the first alone"
        ) from error
