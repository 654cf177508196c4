"""The shard that is being filled: the items of finished runs, and the tensors that they become."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from slitlamp.errors import InputError
from slitlamp.tracing.sites import Site
from slitlamp.tracing.store.files import Entry
from slitlamp.tracing.store.format import ShardSite
from slitlamp.tracing.store.items import Items, Shape, stored_dtype


@dataclass(frozen=True, eq=False)
class StoredRun:
    """The items of one finished run, by site."""

    ids: tuple[str, ...]
    items: Mapping[str, Items]
    _versions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_versions", self._count_writes())

    def _parts(self) -> list[Tensor]:
        return [part for one in self.items.values() for parts in one.parts.values() for part in parts]

    def _count_writes(self) -> list[int]:
        return [0 if part.is_inference() else part._version for part in self._parts()]

    def check_unchanged(self) -> None:
        """Refuse recordings that were written into after the run.

        Raises:
            InputError: there are some.
        """
        if self._count_writes() != self._versions:
            raise InputError(
                f"recordings of the run over {', '.join(map(repr, self.ids[:3]))}, ... were written into before they were "
                "stored; clone them first. The runs since the last shard are not stored"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the recordings."""
        return sum(part.nbytes for part in self._parts())

    def dtypes(self) -> dict[str, str]:
        """The dtype of every site that recorded any number.

        Raises:
            InputError: a site whose layers have different dtypes.
        """
        found: dict[str, str] = {}
        for label, items in self.items.items():
            names = {_name(part.dtype) for parts in items.parts.values() for part in parts if part.numel()}
            if len(names) > 1:
                raise InputError(
                    f"{label}: its layers are recorded in {' and '.join(sorted(names))}; give layers of another dtype a site "
                    "of their own (label=...)"
                )
            if names:
                found[label] = names.pop()
        return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensors(
    runs: Sequence[StoredRun], sites: Mapping[str, Site], dtypes: Mapping[str, str], model_dtype: torch.dtype
) -> tuple[dict[str, Entry], dict[str, str], dict[str, ShardSite]]:
    """What the runs become as one shard.

    Args:
        runs: one or more.
        sites: by label.
        dtypes: of the sites that have recorded any number so far.
        model_dtype: for the others.

    Returns:
        By name, the tensors: `label.layer` holds the units of a site (items, or tiles) one after another, as [unit, ...] where
        all have one shape; `label.shapes`, int64 [unit, axis], is there where they differ. The metadata of the file: the ids,
        and the tiles of each item. What the shard holds, by site.
    """
    entries: dict[str, Entry] = {}
    metadata = {"ids": json.dumps([one for run in runs for one in run.ids], ensure_ascii=False)}
    found: dict[str, ShardSite] = {}
    for label, site in sites.items():
        name = dtypes.get(label)
        dtype = stored_dtype(site, model_dtype) if name is None else getattr(torch, name)
        shapes = [shape for run in runs for shape in run.items[label].shapes]
        common = _common(shapes)
        for layer in site.layers or ():
            parts = [part for run in runs for part in run.items[label].parts[layer] if part.numel()]
            entries[f"{label}.{layer}"] = Entry(dtype, _whole(shapes, common), parts)
        if None in common:
            entries[f"{label}.shapes"] = Entry(torch.int64, (len(shapes), len(common)), [torch.tensor(shapes)])
        tiles = None
        if site.is_vision:
            tiles = tuple(count for run in runs for count in run.items[label].tiles or ())
            metadata[f"{label}.tiles"] = json.dumps(tiles)
        found[label] = ShardSite(common, name, tiles)
    return entries, metadata, found


def _common(shapes: Sequence[Shape]) -> tuple[int | None, ...]:
    """A shape with None along the axes where some differ; () of none."""
    return tuple(sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True))


def _whole(shapes: Sequence[Shape], common: tuple[int | None, ...]) -> Shape:
    """The shape of the tensor that holds units of some shapes: [unit, ...]; joined along their first axis where they differ
    in that alone; otherwise flat.
    """
    fixed = tuple(one for one in common if one is not None)
    if len(fixed) == len(common):
        return (len(shapes), *fixed)
    if len(fixed) == len(common) - 1 and common[0] is None:
        return (sum(shape[0] for shape in shapes), *fixed)
    return (sum(prod(shape) for shape in shapes),)
