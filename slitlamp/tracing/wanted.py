"""What is wanted of each place of a model, in plain values, for a backend that records where the model runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from slitlamp.errors import UnsupportedError
from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import Batch
from slitlamp.tracing.call import Calls, Selection
from slitlamp.tracing.places import Tiles
from slitlamp.tracing.sites import Positions, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TilesOf:
    """Where each tile is in the sequence of a tower that runs over all of them at once; called with whether after the
    projector. None for other towers, and without images.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, batch: Batch) -> None:
        self._unpack = anatomy.tower.unpack if any(batch.images) else None
        self._config, self._inputs = model.config, batch.extra
        self._found: dict[bool, Tiles | None] = {}

    def __call__(self, merged: bool) -> Tiles | None:
        """The tiles, before or (merged) after the projector."""
        if self._unpack is None:
            return None
        if merged not in self._found:
            tiles = self._unpack(self._config, self._inputs, merged)
            self._found[merged] = Tiles.of(tiles) if tiles else None
        return self._found[merged]


def wanted_of(
    site: Site,
    layer: int,
    anatomy: Anatomy,
    calls: Calls,
    tiles: TilesOf,
    wrapped: Any,
    kept: int,
    decoding: bool,
) -> Any:
    """What is sent to the model for one recording, in the names of `Site` and `Place`.

    Args:
        site, layer: of the recording.
        anatomy: of the model.
        calls: of the run, before its first call.
        tiles: where the tiles of a packed tower are.
        wrapped: the model as nnsight wraps it.
        kept: of how many last positions the model computes logits.
        decoding: whether the run makes calls after that over the prompt.

    Returns:
        Plain values and tensors, by name; None where nothing can come in this run (no position of it, or an image site
        without images).

    Raises:
        UnsupportedError: what cannot be recorded through nnsight.
    """
    batch, place = calls.batch, anatomy.place(site.name, layer)
    cross = site.name == "cross_attention"
    of_image = site.is_vision or cross
    if site.name != "logits" and not of_image:  # layers that read the image are passed over without one
        of_image = anatomy.attention_types[layer] == "cross_attention"
    if of_image and not any(batch.images):
        return None
    wanted = SimpleNamespace(
        kind="attention" if site.is_attention else "logits" if site.name == "logits" else "state",
        path=place.path,
        at_input=place.at_input,
        heads=None if site.heads is None else list(site.heads),
        n_heads=place.heads,
        third=place.third,
        gate=place.gate,
        tanh=place.tanh,
        reduce=site.reduce,
        reduce_queries=site.reduce_queries,
        reduce_keys=site.reduce_keys,
        reduce_heads=site.reduce_heads,
        vision=site.is_vision,
        has_cls=anatomy.has_cls and site.name != "projector_out",
        cross=cross,
        rows=batch.size,
        length=batch.length,
        tiles=None,
        once=True,
    )
    if site.is_vision:
        packed = tiles(site.name == "projector_out")
        wanted.tiles = None if packed is None else (packed.index, packed.valid)
    if site.is_attention:
        return _wanted_attention(wanted, site, anatomy, calls, wrapped, decoding)
    if site.is_vision:
        wanted.positions = site.positions
        return wanted
    in_steps = decoding and _in_steps(site.positions)
    selection = calls.select(site.positions)
    wanted.once = not in_steps
    if selection is None:
        if not in_steps:
            return None
        selection = _nothing(batch)
    if wanted.kind == "logits" and bool((selection.index[selection.valid] < batch.length - kept).any()):
        raise UnsupportedError(
            f"{site.label}: the model computes logits of the last {kept} positions alone; in generate, record "
            'positions="last", and those of other positions by vlm.forward'
        )
    wanted.positions = _plain(selection)
    return wanted


def _wanted_attention(wanted: Any, site: Site, anatomy: Anatomy, calls: Calls, wrapped: Any, decoding: bool) -> Any:
    if site.is_vision and anatomy.tower.unpack is not None:
        raise UnsupportedError(
            f"{site.label}: attention of this {anatomy.family.name}'s vision tower, which runs over all tiles as one sequence, "
            'is not recorded through nnsight; leave out backend="nnsight"'
        )
    wanted.operation = _operation(wrapped, wanted.path)
    if site.is_vision:
        wanted.queries, wanted.keys = site.queries, site.keys
        return wanted
    in_steps = decoding and _in_steps(site.queries)
    wanted.once = not in_steps
    queries = calls.select(site.queries)
    if wanted.cross:
        mask = calls.batch.cross_mask
        keys = Selection.of(mask) if mask is not None and bool(mask.any()) else None
    else:
        keys = calls.select_keys(site.keys)
    wanted.fixed_keys = wanted.cross or not _in_steps(site.keys)
    if (queries is None and not in_steps) or (keys is None and wanted.fixed_keys):
        return None
    wanted.queries = _plain(queries or _nothing(calls.batch))
    wanted.keys = _plain(keys or _nothing(calls.batch))
    return wanted


def _in_steps(positions: Positions) -> bool:
    """Whether tokens that are fed back in a generation are among the positions."""
    return isinstance(positions, str) and positions != "image"


def _nothing(batch: Batch) -> Selection:
    index = torch.zeros(batch.size, 0, dtype=torch.int64, device=batch.device)
    return Selection(index, index.bool(), full=True, everything=False)


def _plain(selection: Selection) -> Any:
    return SimpleNamespace(
        index=selection.index,
        valid=selection.valid,
        full=selection.full,
        everything=selection.everything,
        count=selection.count,
    )


def _operation(wrapped: Any, path: str) -> str:
    """nnsight's name of the call of the attention function in a module's forward."""
    from slitlamp.tracing.model_side import at

    part = at(wrapped, path)
    calls = [name for name in part.source.names if name.startswith("attention_interface_")]
    if not calls:
        raise UnsupportedError(
            f"nnsight finds no call of transformers' attention interface in {type(part._module).__name__}, so its attention "
            'cannot be recorded; leave out backend="nnsight"'
        )
    return max(calls, key=lambda name: int(name.rpartition("_")[2]))
