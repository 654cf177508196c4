"""What a model, a trace and a store will take, from the configuration alone: bytes, never seconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy
from slitlamp.tracing import sites as constructors
from slitlamp.tracing.site_checks import check_sites
from slitlamp.tracing.sites import ATTENTION_SITES, SITES, Site
from slitlamp.tracing.sizes import ItemSize, trace_bytes

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

DEFAULT_SITES = ("resid_post:image:mean", "resid_post:last", "z:last", "attention:last:image")
_REDUCTIONS = ("reduce", "reduce_queries", "reduce_keys", "reduce_heads")


@dataclass(frozen=True)
class GpuShare:
    """What one GPU holds when a model is cut into consecutive pieces.

    Attributes:
        blocks: the decoder blocks on it.
        weights, cache, recordings: bytes.
    """

    blocks: tuple[int, ...]
    weights: int
    cache: int
    recordings: int

    @property
    def total(self) -> int:
        """Bytes in all; what a block needs while it computes comes on top."""
        return self.weights + self.cache + self.recordings


@dataclass(frozen=True)
class Estimate:
    """Bytes of a model and of what is recorded of it. All are exact but for what is named here as left out.

    Attributes:
        dtype: of weights, cache and recordings that are not reduced.
        weights: bytes of all weights, by dtype; tied weights once.
        cache_per_token: bytes of keys and values that generation keeps per position, sliding windows not yet full.
        cache_per_item: the same for one whole item (windows, and keys of cross-attention, taken into account).
        item: the positions of one item.
        recordings: bytes per item, by recording.
        batch: items per batch.
        gpus: what each GPU holds when the model is spread over several; their working memory is left out.
        items: how many items a store holds.
    """

    dtype: torch.dtype
    weights: dict[torch.dtype, int]
    cache_per_token: int
    cache_per_item: int
    item: ItemSize
    recordings: dict[str, int]
    batch: int
    gpus: tuple[GpuShare, ...]
    items: int

    @property
    def trace(self) -> int:
        """Bytes of the recordings of one item."""
        return sum(self.recordings.values())

    @property
    def store(self) -> int:
        """Bytes of the recordings of all items; a store adds its manifest and a header per shard."""
        return self.items * self.trace


def estimate(
    model: PreTrainedModel,
    anatomy: Anatomy,
    item: ItemSize,
    sites: Sequence[Site | str] = DEFAULT_SITES,
    *,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    gpus: int = 1,
    items: int = 1,
) -> Estimate:
    """What a model takes, with the recordings of some sites.

    Args:
        model: the model; on the meta device it will do.
        anatomy: its anatomy.
        item: positions of one item.
        sites: what is recorded, or texts for `parse_site`.
        dtype: of the weights.
        batch: items per batch.
        gpus: over how many GPUs the model is spread, in consecutive pieces as even as its blocks allow, which
            `device_map="auto"` aims at.
        items: how many items a store is to hold.

    Raises:
        InputError, UnsupportedError: a site that this model does not have, or a number below 1.
    """
    for name, number in (("batch", batch), ("gpus", gpus), ("items", items)):
        if number < 1:
            raise InputError(f"{name} must be 1 or more, found {number}")
    chosen = check_sites([parse_site(one) if isinstance(one, str) else one for one in sites], anatomy)
    cache = _cache(model, anatomy, item, dtype)
    pieces = _spread(list(_pieces(model, dtype)), gpus)
    place = {path: layer for layer, path in enumerate(anatomy.blocks)}
    shares = []
    for number, piece in enumerate(pieces):
        blocks = tuple(place[path] for path, _ in piece if path in place)
        own = [one for one in (_part(site, blocks, first=number == 0) for site in chosen) if one is not None]
        recorded = sum(trace_bytes(model, anatomy, own, item, dtype).values()) if own else 0
        weights = sum(size for _, size in piece)
        shares.append(GpuShare(blocks, weights, batch * sum(cache[layer] for layer in blocks), batch * recorded))
    floats, others = _numbers(model)
    return Estimate(
        dtype=dtype,
        weights={one: floats * one.itemsize + others for one in dict.fromkeys((torch.float32, torch.bfloat16, dtype))},
        cache_per_token=sum(_cache(model, anatomy, item, dtype, length=1)),
        cache_per_item=sum(cache),
        item=item,
        recordings=trace_bytes(model, anatomy, chosen, item, dtype),
        batch=batch,
        gpus=tuple(shares),
        items=items,
    )


def _part(site: Site, blocks: tuple[int, ...], *, first: bool) -> Site | None:
    """What of a site is recorded on the GPU with these blocks; what is no decoder block's, on the first one."""
    if site.is_vision or site.name == "logits":
        return site if first else None
    layers = tuple(layer for layer in site.layers or () if layer in blocks)
    return replace(site, layers=layers) if layers else None


def _numbers(model: nn.Module) -> tuple[int, int]:
    """How many floating-point numbers a model's state holds, and the bytes of the rest of it."""
    saved = set(model.state_dict())
    tensors = {id(one): one for name, one in (*model.named_parameters(), *model.named_buffers()) if name in saved}
    floats = sum(one.numel() for one in tensors.values() if one.is_floating_point())
    return floats, sum(one.nbytes for one in tensors.values() if not one.is_floating_point())


def _cache(
    model: nn.Module, anatomy: Anatomy, item: ItemSize, dtype: torch.dtype, length: int | None = None
) -> list[int]:
    """Bytes of keys and values of one item, by layer; with `length`, of so many positions of text."""
    text: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    window = int(getattr(text, "sliding_window", None) or 0)
    # Mllama's cache holds the keys of every image's largest number of tiles, and it has one image token per image
    tiles = getattr(model.config.vision_config, "max_num_tiles", None)  # type: ignore[union-attr]
    cross = item.cross_keys if tiles is None else item.image_tokens * int(tiles) * (item.tile_positions or 0)
    per_token = 2 * anatomy.n_kv_heads * anatomy.d_head * dtype.itemsize
    found = []
    for kind in anatomy.attention_types:
        kept = item.length if length is None else length
        if kind == "cross_attention":
            kept = 0 if length is not None else cross
        elif kind == "sliding_attention" and window:
            kept = min(kept, window - 1)
        found.append(kept * per_token)
    return found


def _pieces(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[tuple[str, int]]:
    """The parts of a model that are never cut, in order: path and bytes. Tied weights count where they come first."""
    whole = set(getattr(model, "_no_split_modules", None) or ())
    seen: set[int] = set()

    def size(tensors: Iterator[torch.Tensor]) -> int:
        new = {id(one): one for one in tensors if id(one) not in seen}
        seen.update(new)
        return sum(one.numel() * (dtype.itemsize if one.is_floating_point() else one.itemsize) for one in new.values())

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, int]]:
        if type(module).__name__ in whole or not list(module.children()):
            yield path, size(iter([*module.parameters(), *module.buffers()]))
            return
        yield path, size(iter([*module.parameters(recurse=False), *module.buffers(recurse=False)]))
        for name, child in module.named_children():
            yield from walk(child, f"{path}.{name}".lstrip("."))

    yield from walk(model, "")


def _spread(pieces: list[tuple[str, int]], n: int) -> list[list[tuple[str, int]]]:
    """Consecutive pieces on n devices so that the fullest one holds as little as possible."""

    def fill(limit: int) -> list[list[tuple[str, int]]]:
        filled: list[list[tuple[str, int]]] = [[]]
        room = limit
        for path, size in pieces:
            if size > room and filled[-1]:
                filled.append([])
                room = limit
            filled[-1].append((path, size))
            room -= size
        return filled

    low, high = max(size for _, size in pieces), sum(size for _, size in pieces)
    while low < high:
        middle = (low + high) // 2
        if len(fill(middle)) <= n:
            high = middle
        else:
            low = middle + 1
    return fill(low)


# -- sites as texts ---------------------------------------------------------------------------------------------------


def parse_site(text: str) -> Site:
    """A site from a text: `name:positions:reduction` (`resid_post:image:mean`), or for attention `name:queries:keys`.

    What has other names follows as `key=value`: `layers=0,4-8`, `heads=1,2`, `reduce_keys=sum`, and so on.

    Raises:
        UnknownNameError, InputError: an unknown site or key, or too many parts; the message names the nearest known.
    """
    name, *parts = text.split(":")
    if name not in SITES:
        raise unknown("site", name, SITES)
    attention = name in ATTENTION_SITES
    orders = {"cross_attention": ("queries",), "projector_out": ("reduce",)}
    order = orders.get(name, ("queries", "keys") if attention else ("positions", "reduce"))
    known = {*order, "layers", "heads", *((*_REDUCTIONS[1:],) if attention else ())}
    if name in ("logits", "projector_out"):
        known -= {"layers", "heads"}
    given: dict[str, Any] = {}
    plain = [part for part in parts if "=" not in part]
    if len(plain) > len(order):
        raise InputError(
            f"site {text!r}: {name} takes {':'.join((name, *order))} and key=value; found {len(plain)} parts"
        )
    given |= dict(zip(order, plain, strict=False))
    for part in parts:
        key, equals, value = part.partition("=")
        if equals:
            if key not in known:
                raise unknown(f"key in site {text!r}", key, known)
            given[key] = _numbers_of(value, text) if key in ("layers", "heads") else value
    label = text if parts else name
    try:
        return getattr(constructors, name)(**given, label=label)
    except TypeError as error:
        raise InputError(f"site {text!r}: {error}") from error


def _numbers_of(value: str, text: str) -> list[int]:
    """`0,4-8` as numbers."""
    numbers: list[int] = []
    for part in value.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise InputError(f"site {text!r}: expected numbers such as 0,4-8; found {value!r}")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
