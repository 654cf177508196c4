"""What a store keeps of one run: the recordings of each item, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from slitlamp.errors import UnsupportedError
from slitlamp.models.batch import Batch
from slitlamp.tracing.sites import Site
from slitlamp.tracing.sizes import site_width
from slitlamp.tracing.trace import SiteRecord, Source, Step, Trace

Shape = tuple[int, ...]
LEADS = ("step", "position", "query")
"""The axes along which items differ, next to `key`; a recording has at most one of them."""


@dataclass(frozen=True, eq=False)
class Items:
    """The recordings of one site in one run.

    Attributes:
        shapes: per unit (an item; of a vision site, a tile), the shape of its recording in every layer.
        parts: per layer, contiguous CPU tensors whose numbers, one after another, are those of the units.
        tiles: of a vision site, the number of tiles of each item.
    """

    shapes: list[Shape]
    parts: dict[int, list[Tensor]]
    tiles: tuple[int, ...] | None


def tiles_per_row(batch: Batch, n_tiles: int) -> tuple[int, ...]:
    """How many of the tiles that a vision site recorded belong to each row of a batch.

    Raises:
        UnsupportedError: neither the batch's own count of tiles, nor one tile per image, nor the same number of tiles for
            every image makes up the tiles recorded.
    """
    if sum(batch.tiles) == n_tiles:
        return batch.tiles
    images = [len(row) for row in batch.images]
    n_images = sum(images)
    if n_images and n_tiles % n_images == 0:
        return tuple(n_tiles // n_images * count for count in images)
    raise UnsupportedError(
        f"{n_tiles} tiles were recorded for {n_images} images, whose patches say {sum(batch.tiles)}: which tile belongs to "
        "which item is not known. Store batches of one item, or leave the vision sites out"
    )


def items_of(trace: Trace, label: str, source: Source) -> Items:
    """The recordings of one site, per item.

    An item's positions (or queries, or steps of a generation) are those that the trace's mask says are real, its keys those of
    its last forward call. Where nothing was there to be recorded (no image in the prompt, say), an item has no positions; a
    recording without such an axis is NaN, as in the trace.

    Raises:
        InputError: a layer did not run.
        UnsupportedError: tiles that cannot be given to items, or layers whose recordings differ in shape.
    """
    batch = trace.batch
    assert batch is not None, "called when a run has ended"
    record = trace.record(label)
    if not record.layers:
        return _nothing(record, batch, source)
    steps = [step for step in trace.steps if label in step]
    valid, n_keys = _real(label, steps)
    first = record[record.layers[0]]
    axes = record.axes
    lead = next((axes.index(name) for name in LEADS if name in axes), None)
    key = axes.index("key") if "key" in axes else None
    shapes = [
        _shape(tuple(first.shape[1:]), lead, key, int(n_valid), int(keys))
        for n_valid, keys in zip(valid.sum(dim=1).tolist(), n_keys.tolist(), strict=True)
    ]
    parts = {}
    for layer in record.site.layers or ():
        values = record[layer]
        if values.shape != first.shape:
            raise UnsupportedError(
                f"{label}: layer {layer} recorded {list(values.shape)}, layer {record.layers[0]} {list(first.shape)}; give "
                "layers that differ in shape a site of their own (label=...)"
            )
        parts[layer] = [one.reshape(-1) for one in _parts(values, valid.to(values.device), shapes, lead, key)]
    tiles = tiles_per_row(batch, len(shapes)) if record.site.is_vision else None
    return Items(shapes, parts, tiles)


def _real(label: str, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
    """Which positions, queries or steps of each row are real, bool [row, n]; how many keys each row has, int64 [row].

    A query without any key counts as nothing recorded.
    """
    masks = []
    n_keys = torch.zeros(steps[0].masks[label].shape[0], dtype=torch.int64)
    for step in steps:
        mask = step.masks[label].cpu()
        if label in step.key_masks:
            keys = step.key_masks[label].cpu().sum(dim=1)
            mask = mask & (keys > 0)[:, None]
            n_keys = torch.maximum(n_keys, torch.where(mask.any(dim=1), keys, 0))
        masks.append(mask)
    return torch.cat(masks, dim=1), n_keys


def _shape(whole: Shape, lead: int | None, key: int | None, n_valid: int, n_keys: int) -> Shape:
    """The shape of one unit; one without any number has 0 along every axis that differs between units."""
    shape = list(whole)
    if lead is not None:
        shape[lead - 1] = n_valid
    if key is not None:
        shape[key - 1] = n_keys
    if not prod(shape):
        for axis in (lead, key):
            if axis is not None:
                shape[axis - 1] = 0
    return tuple(shape)


def _parts(values: Tensor, valid: Tensor, shapes: list[Shape], lead: int | None, key: int | None) -> list[Tensor]:
    """The numbers of the units in order, in CPU memory: tensors of their own, or the recording itself where it holds them and
    nothing else.
    """
    if all(shape == tuple(values.shape[1:]) for shape in shapes):
        missing = ~valid.any(dim=1).cpu() if lead is None else None
        if missing is not None and bool(missing.any()):
            whole = values.to("cpu", copy=True).contiguous()
            whole[missing] = torch.nan
            return [whole]
        return [values.detach() if _can_be_kept(values) else values.to("cpu", copy=True).contiguous()]
    if lead == 1 and key is None:
        return [values[valid].cpu()]
    parts = []
    for row, shape in enumerate(shapes):
        one = values[row]
        if lead is not None:
            one = one.index_select(lead - 1, valid[row].nonzero()[:, 0])
        if key is not None:
            one = one.narrow(key - 1, 0, shape[key - 1])
        if prod(shape):
            parts.append(one.to("cpu", copy=True, memory_format=torch.contiguous_format))
    return parts


def _can_be_kept(values: Tensor) -> bool:
    """Whether a recording may be stored later as it is: it keeps no other memory alive, and torch counts writes into it."""
    own = values.device.type == "cpu" and values.is_contiguous() and not values.is_inference()
    return own and values.untyped_storage().nbytes() == values.nbytes


def _nothing(record: SiteRecord, batch: Batch, source: Source) -> Items:
    """The items of a run in which a site has recorded nothing at all."""
    site = record.site
    layers = site.layers or ()
    if site.is_vision:
        return Items([], {layer: [] for layer in layers}, (0,) * batch.size)
    sizes = _sizes(site, source)
    shape = tuple(0 if axis in (*LEADS, "key") else sizes[axis] for axis in record.axes[1:])
    if any(axis in (*LEADS, "key") for axis in record.axes):
        return Items([shape] * batch.size, {layer: [] for layer in layers}, None)
    missing = torch.full((batch.size * prod(shape),), torch.nan, dtype=stored_dtype(site, source.model.dtype))
    return Items([shape] * batch.size, {layer: [missing.clone()] for layer in layers}, None)


def _sizes(site: Site, source: Source) -> dict[str, int]:
    """The sizes of the axes that do not differ between items."""
    layer = (site.layers or (0,))[0]
    heads = source.anatomy.n_heads if site.heads is None else len(site.heads)
    if site.is_attention:
        return {"head": heads}
    width = site_width(source.model, source.anatomy, site, layer)
    if site.has_heads:
        heads = source.anatomy.place(site.name, layer).heads or 1 if site.heads is None else len(site.heads)
        return {"head": heads, "d_head": width // heads}
    return {site.axes[-1]: width}


def stored_dtype(site: Site, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a recording in a model of some dtype: what is reduced is accumulated, and kept, in float32."""
    reduced = any((site.reduce, site.reduce_queries, site.reduce_keys, site.reduce_heads))
    return torch.float32 if reduced and dtype != torch.float64 else dtype
