"""Reading an activation store: `store = sl.open_store(path); store["resid_post"][2][0]`."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slitlamp.errors import InputError, StoreError, unknown
from slitlamp.tracing.sites import Site
from slitlamp.tracing.store.format import Shard, checksum_of, read_indices, read_manifest
from slitlamp.tracing.store.manifest import sites_of
from slitlamp.tracing.store.records import StoredSite
from slitlamp.tracing.trace import _layer_of

Places = NDArray[np.int64]
"""Where units are, int64 [unit, 3]: number of the shard, number in the shard, number of the item."""

_OPEN = 16
"""How many shards are mapped at the same time; a data set may have more of them than a process may have files."""


class Store:
    """An activation store, opened for reading. Nothing is read but the indices until a tensor is asked for.

    Attributes:
        folder: where it is.
        manifest: versions, model and sites, as it was written.
        sites: the recordings, by label.
        ids: the items: writer after writer, each in the order of writing.
        damaged: what is wrong with shards or index lines that cannot be read, by name. Their items are not in `ids`.
        duplicates: items that several shards hold, with those shards; the first is read.
    """

    def __init__(self, path: Path | str) -> None:
        self.folder = Path(path)
        self.manifest = read_manifest(self.folder)
        self.sites: dict[str, Site] = sites_of(self.manifest)
        by_writer, self.damaged = read_indices(self.folder)
        self._shards: list[Shard] = []
        self._lost: dict[str, str] = {}
        self._position: dict[str, int] = {}
        first: list[str] = []
        again: dict[str, list[str]] = {}
        for shard in (one for shards in by_writer.values() for one in shards):
            damage = shard.damage(self.folder)
            if damage is None:
                self._shards.append(shard)
                for one in shard.ids:
                    if one in self._position:
                        again.setdefault(one, [first[self._position[one]]]).append(shard.file)
                    else:
                        self._position[one] = len(first)
                        first.append(shard.file)
            else:
                self.damaged[shard.file] = damage
                self._lost |= dict.fromkeys(shard.ids, shard.file)
        self.ids: tuple[str, ...] = tuple(self._position)
        self.duplicates = {one: tuple(files) for one, files in again.items()}
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._check_runs()

    def _check_runs(self) -> None:
        runs = {str(dict(shard.run)): shard for shard in self._shards}
        if len(runs) > 1:
            first, second = list(runs.values())[:2]
            raise StoreError(
                f"the store {self.folder} holds recordings of different kinds of runs: {first.file} {dict(first.run)}, "
                f"{second.file} {dict(second.run)}; its writers must generate alike, under the same interventions"
            )

    @property
    def decoding(self) -> bool:
        """Whether the recordings are of generations, rather than of one forward pass per item."""
        return bool(self._shards and self._shards[0].run["decoding"])

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self._shards)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, label: str) -> bool:
        return label in self.sites

    def __getitem__(self, label: str) -> StoredSite:
        """The recordings of one site, by layer; with a TransformerLens name (`blocks.2.hook_resid_post`), of that layer.

        Raises:
            UnknownNameError: no such recording.
        """
        found = _layer_of(label)
        name = label if found is None else found[0]
        if name not in self.sites:
            raise unknown("recording", name, self.sites)
        site = StoredSite(self, self.sites[name])
        return site if found is None else cast(StoredSite, site[found[1]])  # as a trace does

    def verify(self) -> dict[str, str]:
        """Read every shard in full and compare its CRC-32.

        Returns:
            What is wrong, by name of the shard or index line, with what opening found; empty if nothing is.
        """
        wrong = dict(self.damaged)
        for shard in self._shards:
            try:
                found = checksum_of(self.folder / shard.file)
            except OSError as error:
                wrong[shard.file] = f"the file cannot be read: {error.strerror}"
                continue
            if found != shard.crc32:
                wrong[shard.file] = "its bytes have changed since it was written (CRC-32 differs)"
        return wrong

    # -- for records ------------------------------------------------------------------------------------------------

    def position(self, item: str) -> int:
        """The number of an item in `ids`.

        Raises:
            StoreError: it is in a damaged shard.
            InputError: it is not in the store.
        """
        if item in self._position:
            return self._position[item]
        if item in self._lost:
            file = self._lost[item]
            raise StoreError(
                f"item {item!r} is in {self.folder / file}, which is damaged: {self.damaged[file]}. Continue the store with "
                "vlm.trace(..., store=...) to record it anew"
            )
        raise InputError(f"item {item!r} is not among the {len(self.ids)} items of the store {self.folder}")

    def shards(self) -> Sequence[Shard]:
        """The shards that can be read."""
        return self._shards

    @cached_property
    def item_places(self) -> Places:
        """Where the items are."""
        return self._places([np.ones(len(shard.ids), dtype=np.int64) for shard in self._shards])

    def tile_places(self, label: str) -> Places:
        """Where the tiles of a vision site are."""
        return self._places([np.array(shard.sites[label].tiles, dtype=np.int64) for shard in self._shards])

    def _places(self, counts: list[NDArray[np.int64]]) -> Places:
        """From the number of units of every item, by shard."""
        places = [np.zeros((0, 3), dtype=np.int64)]
        for number, (shard, of_items) in enumerate(zip(self._shards, counts, strict=True)):
            items = np.repeat(np.array([self._position[one] for one in shard.ids], dtype=np.int64), of_items)
            places.append(np.stack([np.full_like(items, number), np.arange(len(items)), items], axis=1))
        return self._once(np.concatenate(places))

    def _once(self, places: Places) -> Places:
        """Without the items that an earlier shard holds as well."""
        if not self.duplicates:
            return places
        first = {self._position[one]: files[0] for one, files in self.duplicates.items()}
        kept = [self._shards[shard].file == first.get(item, self._shards[shard].file) for shard, _, item in places]
        return places[np.array(kept, dtype=bool)]

    def tensor(self, number: int, name: str) -> Tensor:
        """A tensor of a shard, mapped into memory: pages are read when they are touched.

        Raises:
            StoreError: the shard is damaged.
        """
        shard = self._shards[number]
        path = self.folder / shard.file
        try:
            if number not in self._open:
                damage = shard.damage(self.folder)  # touching a mapped file that has been cut off would end the process
                if damage is not None:
                    raise StoreError(f"{path} is damaged: {damage}")
                self._open[number] = safe_open(path, framework="pt")
            self._open.move_to_end(number)
            while len(self._open) > _OPEN:
                self._open.popitem(last=False)
            return self._open[number].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{path} is damaged: {error}") from error

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.sites)

    def __repr__(self) -> str:
        model = self.manifest["model"]["name"]
        lines = [f"Store of {len(self)} items, {self.nbytes / 1e6:.1f} MB in {len(self._shards)} shards, of {model}"]
        lines += [f"{label}: layers {list(site.layers or ())}" for label, site in self.sites.items()]
        lines += [f"damaged: {name} ({why})" for name, why in self.damaged.items()]
        return "\n  ".join(lines)


def open_store(path: Path | str) -> Store:
    """Open an activation store for reading, also while it is being written: it shows what was there when it was opened.

    `store["resid_post"][2]` is the recording of a layer, indexed like a tensor [item, ...]: `[5]` and `["an id"]` give one item,
    `[10:20]` several, `.padded(...)` several that differ in their number of positions. Tensors are mapped from the disk and
    read when they are touched; clone them before writing into them.

    Warns:
        UserWarning: a damaged shard, or an item that several shards hold.

    Raises:
        StoreError: no store there, or one whose writers recorded different things.
    """
    store = Store(path)
    for name, why in store.damaged.items():
        warnings.warn(f"{store.folder / name} is damaged and left out: {why}", stacklevel=2)
    if store.duplicates:
        one, files = next(iter(store.duplicates.items()))
        warnings.warn(
            f"{len(store.duplicates)} items are stored more than once, such as {one!r} in {' and '.join(files)}; the first "
            "is read",
            stacklevel=2,
        )
    return store
