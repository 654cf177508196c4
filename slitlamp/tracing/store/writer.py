"""A trace that writes its recordings to an activation store, run after run."""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slitlamp.errors import InputError, SlitlampError, StoreError
from slitlamp.models.batch import Batch
from slitlamp.tracing.sites import Site
from slitlamp.tracing.sizes import ItemSize, trace_bytes
from slitlamp.tracing.store.files import append_line, open_locked, write_manifest, write_shard
from slitlamp.tracing.store.format import (
    PARTIAL,
    Shard,
    check_writer,
    index_path,
    read_index,
    read_indices,
    shard_name,
    shard_number,
)
from slitlamp.tracing.store.items import items_of
from slitlamp.tracing.store.manifest import check_same, describe
from slitlamp.tracing.store.shard import StoredRun, tensors
from slitlamp.tracing.trace import Source, Trace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreOptions:
    """Where and how recordings are stored: `vlm.trace(..., store=StoreOptions(path, writer=rank))`.

    A store takes the bytes of what is recorded and no more: an item takes, for every layer of a site, its positions times the
    width of the site times the bytes of a number; what is reduced takes 4 bytes per number and no positions. One layer of
    `resid_post` at 576 image tokens of a model of width 4096 in bf16 is 576 x 4096 x 2 = 4.7 MB per item, 4.7 TB for a
    million images; its mean over the image is 16 kB per item, 16 GB for a million. `slitlamp.tracing.sizes.trace_bytes` gives
    the number for any sites. Memory: one shard, the recordings of one run, and about 100 bytes per item for its id.

    Attributes:
        path: the folder. One that holds a store is continued; model and sites must be those it was made with.
        writer: name of this writer. Processes that record parts of one data set (data-parallel ranks) give the same folder
            and each a name of its own; reading, they are one store.
        shard_bytes: a shard is written when a run brings it to so many bytes. A process that is killed loses the shard
            that it was filling, no more, and must record those items again.
        expected_items: how many items all writers together will store. With it, a store that the disk cannot hold is
            refused: before the first run by an estimate (of a generation, of its prompt), and after it by what it took.
        hash_weights: whether the weights are hashed, so that only the same model can continue the store. Hashing takes about
            a second per 2 GB of weights; without it only the configuration is compared.
    """

    path: Path | str
    writer: str | int = 0
    shard_bytes: int = 50_000_000
    expected_items: int | None = None
    hash_weights: bool = True


class StoredTrace(Trace):
    """A trace that takes many runs and writes the recordings of each to a store; it holds those of the last one.

    Args:
        sites: what is recorded, checked against the model.
        options: where and how.
        source: the model.
        name: where the model came from.
        weights_sha256: gives the hash of its weights.
        interventions: gives what is in force at a run, in words.

    Raises:
        InputError: a site that cannot be stored, a writer that is at work already.
        StoreError: the folder cannot be written, or holds a store of another model or other sites.
    """

    def __init__(
        self,
        sites: list[Site],
        options: StoreOptions,
        source: Source,
        *,
        name: str = "",
        weights_sha256: Callable[[], str] | None = None,
        interventions: Callable[[], Sequence[str]] = lambda: (),
    ) -> None:
        super().__init__(sites)
        self.source = self._source = source
        self.options = options
        self._interventions = interventions
        self._folder = Path(options.path)
        self._writer = check_writer(options.writer)
        if options.shard_bytes < 1:
            raise InputError(f"shard_bytes must be 1 or more, found {options.shard_bytes}")
        manifest = describe(source.model, name, sites, weights_sha256 if options.hash_weights else None)
        check_same(self._folder, write_manifest(self._folder, manifest, self._writer), manifest)
        self._runs: list[StoredRun] = []
        self._nbytes = 0
        self._dtypes: dict[str, str] = {}
        self._run: dict[str, Any] | None = None
        self._failed: str | None = None
        self._estimated = self._measured = options.expected_items is None
        self._index = index_path(self._folder, self._writer)
        self._handle = open_locked(self._index)
        try:
            self._ids = self._resume()
        except BaseException:
            os.close(self._handle)
            raise
        self._n_stored = len(self._ids)

    def _resume(self) -> set[str]:
        """The items that are stored; what a killed process of this writer left half-done is removed."""
        ours, _, end = read_index(self._index)
        os.ftruncate(self._handle, end)
        listed = {shard.file for shard in ours}
        for path in self._folder.glob(f"*shard-{self._writer}-*"):
            file = path.name.removeprefix(".").removesuffix(PARTIAL)
            if shard_number(self._writer, file) is not None and path.name not in listed:
                path.unlink(missing_ok=True)
        numbers = [shard_number(self._writer, file) for file in listed]
        self._number = 1 + max((one for one in numbers if one is not None), default=-1)
        stored: set[str] = set()
        for shard in [one for shards in read_indices(self._folder)[0].values() for one in shards]:
            damage = shard.damage(self._folder)
            if damage is not None:
                logger.warning("%s: %s; its %d items count as not stored", shard.file, damage, len(shard.ids))
                continue
            stored.update(shard.ids)
            self._check_run(dict(shard.run))
            self._run = dict(shard.run)
            self._dtypes |= {label: one.dtype for label, one in shard.sites.items() if one.dtype is not None}
        return stored

    # -- runs -------------------------------------------------------------------------------------------------------

    def pending(self, ids: Iterable[str]) -> list[str]:
        """Those of some items that are not in the store yet, in their order. Another writer counts as it was when this trace
        was opened.
        """
        return [one for one in ids if one not in self._ids]

    def admit(self, batch: Batch) -> None:
        """Refuse a run that cannot be stored, before anything runs.

        Raises:
            InputError: an item that is stored already, or twice in the batch.
            StoreError: the store could not be written before, or the disk cannot hold what is expected.
        """
        if self._failed is not None:
            raise StoreError(f"this store takes nothing more: {self._failed}")
        twice = [one for one, count in Counter(batch.ids).items() if count > 1]
        there = [one for one in batch.ids if one in self._ids]
        for ids, what in ((twice, "more than once in this batch"), (there, f"in the store {self._folder} already")):
            if ids:
                shown = ", ".join(repr(one) for one in ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
                raise InputError(
                    f"items {shown} are {what}; give every item an id of its own (vlm.encode(..., ids=...)) and leave out "
                    "what is stored (trace.pending(ids))"
                )
        if not self._estimated:
            self._estimated = True
            estimate = self._estimate(batch)
            if estimate is not None:
                self._check_space(estimate, "an estimate")

    def start(self, batch: Batch, *, decoding: bool) -> None:
        """A run begins: the recordings of the last one go.

        Raises:
            InputError: forward passes and generations, or runs under different interventions, in one store.
        """
        self._check_run(self._run_of(decoding))
        self.steps, self.views = [], {}
        super().start(batch, decoding=decoding)

    def _run_of(self, decoding: bool) -> dict[str, Any]:
        return {"decoding": decoding, "interventions": list(self._interventions())}

    def _check_run(self, run: dict[str, Any]) -> None:
        if self._run is not None and run != self._run:
            there, here = (
                f"{'generations' if one['decoding'] else 'forward passes'} under "
                f"{', '.join(one['interventions']) or 'no intervention'}"
                for one in (self._run, run)
            )
            raise InputError(f"the store {self._folder} holds {there}; {here} need a store of their own")

    def finish(self) -> None:
        """The run has ended well: its items go into the shard being filled, and that to the disk when it is full.

        Raises:
            UnsupportedError, InputError: recordings that cannot be told apart by item, or that changed their dtype.
            StoreError: the disk is full, or will be.
        """
        assert self.batch is not None, "start comes first"
        run = StoredRun(self.batch.ids, {label: items_of(self, label, self._source) for label in self.sites})
        for label, dtype in run.dtypes().items():
            if self._dtypes.setdefault(label, dtype) != dtype:
                raise InputError(f"{label}: recorded in {dtype}, but the store holds {self._dtypes[label]}")
        self._run = self._run_of(self.decoding)
        self._runs.append(run)
        self._ids.update(run.ids)
        self._nbytes += run.nbytes
        if not self._measured:
            self._measured = True
            self._check_space(run.nbytes / len(run.ids), "what the first run took")
        if self._nbytes >= self.options.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the items of finished runs that are not on the disk yet, as a shard.

        Raises:
            StoreError: it cannot be written. Shards written before are untouched; the trace takes no more runs.
            InputError: somebody wrote into a recording that was not on the disk yet; the same holds.
        """
        if not self._runs or self._failed is not None:
            return
        file = shard_name(self._writer, self._number)
        entries, metadata, sites = tensors(self._runs, self.sites, self._dtypes, self._source.model.dtype)
        ids = tuple(one for run in self._runs for one in run.ids)
        try:
            for run in self._runs:
                run.check_unchanged()
            size, crc32 = write_shard(self._folder / file, entries, metadata)
            self._runs, self._nbytes = (
                [],
                0,
            )  # before its line: an interrupt in between leaves items out, never in twice
            self._number += 1
            append_line(self._handle, self._index, Shard(file, ids, size, crc32, sites, self._run or {}).line())
        except SlitlampError as error:
            self._failed = str(error)
            raise
        self._n_stored += len(ids)

    def close(self) -> None:
        """Write what is left and let the next process write as this writer."""
        try:
            self.flush()
        finally:
            self._failed = self._failed or "it is closed"
            with suppress(OSError):
                os.close(self._handle)

    # -- space ------------------------------------------------------------------------------------------------------

    def _estimate(self, batch: Batch) -> float | None:
        """Bytes per item of one forward pass over a batch, by its mean numbers of positions; None where the size of the
        vision tower's tiles is not known before it runs.
        """
        if any(site.is_vision for site in self.sites.values()):
            return None
        rows = batch.size
        images, new = int(batch.image_mask.sum()) // rows, sum(batch.n_generated) // rows
        item = ItemSize(
            image_tokens=images,
            text_tokens=sum(batch.lengths) // rows - images - new,
            after_image=int(batch.text_after_image_mask.sum()) // rows - new,
            new_tokens=new,
            cross_keys=0 if batch.cross_mask is None else int(batch.cross_mask.sum()) // rows,
        )
        model, sites = self._source.model, list(self.sites.values())
        return float(sum(trace_bytes(model, self._source.anatomy, sites, item, model.dtype).values()))

    def _check_space(self, per_item: float, by: str) -> None:
        assert self.options.expected_items is not None
        needed = per_item * max(0, self.options.expected_items - self._n_stored)
        free = shutil.disk_usage(self._folder).free
        logger.info(
            "%s: %.3g MB per item (%s), %.3g GB for the items to come; %.3g GB are free",
            *(self._folder, per_item / 1e6, by, needed / 1e9, free / 1e9),
        )
        if needed > free:
            raise StoreError(
                f"the store {self._folder} would need {needed / 1e9:.3g} GB more ({self.options.expected_items} items of "
                f"{per_item / 1e6:.3g} MB by {by}, {self._n_stored} stored), but {free / 1e9:.3g} GB are free; record fewer "
                "layers or positions, reduce them (reduce=...), or give another disk"
            )


@contextmanager
def closing(trace: Trace) -> Iterator[None]:
    """Close a stored trace at the end (another needs no closing); an exception from inside stays the one that is raised."""
    if not isinstance(trace, StoredTrace):
        yield
        return
    try:
        yield
    except BaseException as error:
        try:
            trace.close()
        except SlitlampError as also:
            error.add_note(str(also))
        raise
    trace.close()
