"""The recordings in an activation store: of a site, by layer, and of a layer, by item."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slitlamp.errors import InputError
from slitlamp.tracing.sites import Site

if TYPE_CHECKING:
    from slitlamp.tracing.store.reading import Store

Index = int | str
Shape = tuple[int, ...]


class StoredSite(Mapping[int, "StoredLayer"]):
    """The recordings of one site, by layer."""

    def __init__(self, store: Store, site: Site) -> None:
        self.store = store
        self.site = site
        self._units: _Units | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The recorded layers."""
        return self.site.layers or ()

    def __getitem__(self, layer: int) -> StoredLayer:
        if layer not in self.layers:
            raise InputError(f"layer {layer} of {self.site.label!r} was not recorded; recorded: {list(self.layers)}")
        if self._units is None:
            self._units = _Units(self.store, self.site)
        return StoredLayer(self.store, self.site, layer, self._units)

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"{self.site.label}: layers {list(self.layers)}, {self[self.layers[0]]!r}"


class _Units:
    """Where the units of a site are: its items, or of a vision site its tiles; the same for every layer."""

    def __init__(self, store: Store, site: Site) -> None:
        self.store = store
        self.site = site
        self.places = store.tile_places(site.label) if site.is_vision else store.item_places
        self._shapes: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @cached_property
    def shape(self) -> tuple[int | None, ...]:
        """Of one unit, None along the axes where units differ."""
        used = [shard.sites[self.site.label] for shard in self.store.shards()]
        shapes = [one.shape for one in used if one.tiles is None or any(one.tiles)]
        return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))

    @cached_property
    def of_item(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The numbers of the units in the order of their items, and where those of each item start."""
        order = np.argsort(self.places[:, 2], kind="stable")
        return order, np.searchsorted(self.places[order, 2], np.arange(len(self.store) + 1))

    def span(self, unit: int) -> tuple[int, int, int, Shape]:
        """Shard, first and last number, and shape of a unit; the numbers count along the flat tensor of a layer."""
        shard, local = int(self.places[unit, 0]), int(self.places[unit, 1])
        common = self.store.shards()[shard].sites[self.site.label].shape
        fixed = tuple(one for one in common if one is not None)
        if len(fixed) == len(common):
            size = prod(fixed)
            return shard, local * size, (local + 1) * size, fixed
        if shard not in self._shapes:
            shapes = self.store.tensor(shard, f"{self.site.label}.shapes").numpy().copy()
            self._shapes = {
                shard: (shapes, np.concatenate([[0], shapes.prod(axis=1).cumsum()]))
            }  # of one shard at a time
        shapes, starts = self._shapes[shard]
        return shard, int(starts[local]), int(starts[local + 1]), tuple(int(one) for one in shapes[local])


class StoredLayer(Sequence[Tensor]):
    """The recordings of one site in one layer, by item; of a vision site, by tile.

    `record[3]` is the recording of one item (tile), as the trace gave it but without padding; `record["an id"]` that of an item
    by its id, and of a vision site [tile, ...] of all its tiles; `record[10:20]` a tensor [item, ...] of several; iteration
    goes through all of them and holds none.
    """

    def __init__(self, store: Store, site: Site, layer: int, units: _Units) -> None:
        self.store = store
        self.site = site
        self.layer = layer
        self._units = units

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes."""
        others = self.site.axes[1:]
        leads = ("query",) if self.site.is_attention else ("position",)
        stacked = self.store.decoding and not self.site.is_vision and not any(name in others for name in leads)
        return ("tile" if self.site.is_vision else "item", *(("step",) if stacked else ()), *others)

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The sizes of the axes; None where items differ."""
        return (len(self), *self._units.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype, that in which it was recorded; None of a store without a number of this site."""
        names = (shard.sites[self.site.label].dtype for shard in self.store.shards())
        name = next((one for one in names if one is not None), None)
        return None if name is None else getattr(torch, name)

    @property
    def ids(self) -> tuple[str, ...]:
        """The item of every entry; of a vision site, an item comes once per tile."""
        return tuple(self.store.ids[item] for item in self._units.places[:, 2].tolist())

    def __len__(self) -> int:
        return len(self._units.places)

    def __iter__(self) -> Iterator[Tensor]:
        return (self._unit(number) for number in range(len(self)))

    def __getitem__(self, index: int | str | slice) -> Tensor:  # type: ignore[override]  # a slice is one tensor
        """One recording, or several of one shape as a tensor.

        Raises:
            InputError: no such item, or several that differ in shape (see `padded`).
            StoreError: it is in a damaged shard.
        """
        if isinstance(index, int):
            return self._unit(self._number(index))
        if isinstance(index, str) and not self.site.is_vision:
            return self._unit(self._numbers([index])[0])
        numbers = self._numbers(index if isinstance(index, slice) else [index])
        whole = self._stretch(numbers)
        if whole is not None:
            return whole
        units = [self._unit(number) for number in numbers]
        if len({one.shape for one in units}) > 1:
            raise InputError(
                f"{self.site.label}: these {len(units)} recordings differ in shape (axes {self.axes[1:]}); take them one by one, "
                "or padded(...)"
            )
        return torch.stack(units) if units else self._empty()

    def padded(self, index: slice | Sequence[Index] = slice(None)) -> tuple[Tensor, Tensor]:
        """Several recordings in one tensor, padded with zeros on the right of every axis along which they differ.

        Args:
            index: a slice, or numbers and ids; of a vision site, an id stands for all tiles of the item.

        Returns:
            The recordings [item, ...] and a mask that broadcasts to them, bool [item, n or 1, ...], true where a number is
            real: [item, position, 1] for states, [item, 1, query, key] for attention.
        """
        units = [self._unit(number) for number in self._numbers(index)]
        if not units:
            empty = self._empty()
            return empty, torch.ones([0] + [1] * (empty.ndim - 1), dtype=torch.bool)
        sizes = torch.tensor([one.shape for one in units], dtype=torch.int64).reshape(len(units), -1)
        largest = sizes.max(dim=0).values
        values = units[0].new_zeros(len(units), *largest.tolist())
        for number, one in enumerate(units):
            places: list[int | slice] = [number, *(slice(size) for size in one.shape)]
            values[tuple(places)] = one
        mask = torch.ones([len(units)] + [1] * len(largest), dtype=torch.bool)
        for axis in (sizes != largest).any(dim=0).nonzero()[:, 0].tolist():
            view = [1] * (len(largest) + 1)
            view[axis + 1] = int(largest[axis])
            lengths = sizes[:, axis].view(-1, *[1] * len(largest))
            mask = mask & (torch.arange(int(largest[axis])).view(view) < lengths)
        return values, mask

    # -- parts ------------------------------------------------------------------------------------------------------

    def _number(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.site.label} has {len(self)} recordings; there is no number {index}")
        return index % len(self)

    def _numbers(self, index: slice | Sequence[Index]) -> list[int]:
        if isinstance(index, slice):
            return list(range(*index.indices(len(self))))
        numbers = []
        for one in index:
            if isinstance(one, str):
                item = self.store.position(one)
                order, starts = self._units.of_item
                numbers += order[starts[item] : starts[item + 1]].tolist()
            else:
                numbers.append(self._number(one))
        return numbers

    def _flat(self, shard: int) -> Tensor:
        return self.store.tensor(shard, f"{self.site.label}.{self.layer}").reshape(-1)

    def _unit(self, number: int) -> Tensor:
        shard, start, end, shape = self._units.span(number)
        return self._flat(shard)[start:end].view(shape)

    def _stretch(self, numbers: list[int]) -> Tensor | None:
        """Units that lie one after another in one shard and have one shape: part of its tensor, nothing copied."""
        if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            return None
        places = self._units.places[numbers[0] : numbers[-1] + 1]
        shard, start, _, shape = self._units.span(numbers[0])
        common = self.store.shards()[shard].sites[self.site.label].shape
        if None in common or (places[:, 0] != shard).any() or (np.diff(places[:, 1]) != 1).any():
            return None
        return self._flat(shard)[start : start + len(numbers) * prod(shape)].view(len(numbers), *shape)

    def _empty(self) -> Tensor:
        shape = [0 if one is None else one for one in self._units.shape]
        return torch.zeros([0, *shape], dtype=self.dtype or torch.float32)

    def __repr__(self) -> str:
        return f"axes {self.axes}, shape {self.shape}, {self.dtype}"
