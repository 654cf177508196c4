"""How many bytes a recording takes, before anything has run: from the sizes of the modules and of one item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from slitlamp.errors import InputError
from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import Batch
from slitlamp.models.patches import BASE_VIEW
from slitlamp.tracing.site_checks import check_sites
from slitlamp.tracing.sites import Positions, Site

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ItemSize:
    """How many positions one item has: a prompt with its images, and what is generated after it.

    Attributes:
        image_tokens: image tokens in the prompt.
        text_tokens: the other tokens of the prompt.
        after_image: those of them that come after the last image token; all of them where that is not known.
        new_tokens: tokens that continue the prompt.
        tiles: pictures that the images make for the vision tower.
        tile_positions: positions of one tile in the vision tower, a CLS token included; None where not known.
        projected: positions of one tile after the projector; None where not known.
        cross_keys: tokens of the images that cross-attention reads; 0 for models without.
    """

    image_tokens: int
    text_tokens: int
    after_image: int
    new_tokens: int = 0
    tiles: int = 1
    tile_positions: int | None = None
    projected: int | None = None
    cross_keys: int = 0

    @property
    def length(self) -> int:
        """Positions of the prompt and of what continues it."""
        return self.image_tokens + self.text_tokens + self.new_tokens

    @staticmethod
    def of(batch: Batch, anatomy: Anatomy, config: PreTrainedConfig) -> ItemSize:
        """The size of the one item of a batch.

        Raises:
            InputError: a batch of several items.
        """
        if batch.size != 1:
            raise InputError(f"the size of one item is asked for; this batch has {batch.size}")
        (patches,), new = batch.patches, batch.n_generated[0]
        images = int(batch.image_mask.sum())
        tiles = patches.n_tiles
        base = int(((patches.image == 0) & (patches.view == BASE_VIEW)).sum())
        of_tower = of_projector = None
        if tiles and anatomy.tower.unpack is not None:
            of_tower, of_projector = (
                max(len(one) for one in anatomy.tower.unpack(config, batch.extra, merged)) for merged in (False, True)
            )
        elif tiles:
            height, width = batch.extra["pixel_values"].shape[-2:]
            of_tower = tile_positions(height, width, config.vision_config, anatomy)
            of_projector = base or images // tiles
        return ItemSize(
            image_tokens=images,
            text_tokens=batch.lengths[0] - images - new,
            after_image=int(batch.text_after_image_mask.sum()) - new,
            new_tokens=new,
            tiles=tiles,
            tile_positions=of_tower,
            projected=of_projector,
            cross_keys=0 if batch.cross_mask is None else int(batch.cross_mask.sum()),
        )

    def continued(self, new_tokens: int) -> ItemSize:
        """The same with a continuation of another length."""
        return replace(self, new_tokens=new_tokens)


def tile_positions(height: int, width: int, vision: PreTrainedConfig, anatomy: Anatomy) -> int:
    """Positions of a tile of so many pixels in the vision tower: its patches, and its CLS token where there is one."""
    patch = vision.patch_size
    rows, columns = patch if isinstance(patch, list | tuple) else (patch, patch)
    return (height // int(rows)) * (width // int(columns)) + int(anatomy.has_cls)


def trace_bytes(
    model: nn.Module, anatomy: Anatomy, sites: Sequence[Site], item: ItemSize, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes that one forward pass records of one item, by recording: what `Trace.nbytes` says once it has run.

    A batch whose rows differ in length takes more: shorter rows are padded to the longest.

    Args:
        model: the model; on the meta device it will do.
        anatomy: its anatomy.
        sites: what is recorded.
        item: the size of an item.
        dtype: of the model. What is reduced is stored in float32.

    Raises:
        InputError: a site that does not fit the model, a position mask, or a vision site where the size of the tiles is
            not known.
    """
    return {one.label: _site_bytes(model, anatomy, one, item, dtype) for one in check_sites(sites, anatomy)}


def _site_bytes(model: nn.Module, anatomy: Anatomy, site: Site, item: ItemSize, dtype: torch.dtype) -> int:
    rows = item.tiles if site.is_vision else 1
    reductions = (site.reduce, site.reduce_queries, site.reduce_keys, site.reduce_heads)
    size = dtype.itemsize if not any(reductions) or dtype == torch.float64 else 4
    total = 0
    for layer in site.layers or ():
        if site.is_attention:
            queries = 1 if site.reduce_queries else _count(site, site.queries, item, anatomy)
            keys = _count(site, site.keys, item, anatomy)
            heads = 1 if site.reduce_heads else _n_heads(site, anatomy)
            total += queries * (1 if site.reduce_keys and keys else keys) * heads
        else:
            positions = _count(site, site.positions, item, anatomy)
            total += (min(positions, 1) if site.reduce else positions) * site_width(model, anatomy, site, layer)
    return rows * total * size


def _n_heads(site: Site, anatomy: Anatomy) -> int:
    if site.heads is not None:
        return len(site.heads)
    return anatomy.n_vision_heads if site.is_vision else anatomy.n_heads


def site_width(model: nn.Module, anatomy: Anatomy, site: Site, layer: int) -> int:
    """Numbers per position of a site of states in one layer: the product of its last axes."""
    place = anatomy.place(site.name, layer)
    short = site.name.removeprefix("vision_")
    if short == "logits":
        return int(model.get_submodule(anatomy.modules["head"]).out_features)  # type: ignore[arg-type]
    if short in ("q", "k", "v", "z", "mlp_pre", "mlp_post"):
        module = model.get_submodule(place.path)
        width = int(module.in_features if place.at_input else module.out_features)  # type: ignore[arg-type]
        width //= 1 if place.third is None else 3
        return width if site.heads is None or place.heads is None else width // place.heads * len(site.heads)
    return anatomy.d_vision if site.name.startswith("vision_") else anatomy.d_model


def _count(site: Site, positions: Positions, item: ItemSize, anatomy: Anatomy) -> int:
    """How many positions of an item a site chooses."""
    if not isinstance(positions, str):
        raise InputError(f"{site.label}: a position mask belongs to a batch; an estimate takes names of positions")
    if site.name == "cross_attention" and positions == "image":
        return item.cross_keys
    if not site.is_vision:
        return {
            "all": item.length,
            "image": item.image_tokens,
            "text": item.text_tokens + item.new_tokens,
            "text_after_image": item.after_image + item.new_tokens,
            "last": 1,
            "generated": item.new_tokens,
            "before_generated": max(1, item.new_tokens),
        }[positions]
    known = item.projected if site.name == "projector_out" else item.tile_positions
    if known is None:
        raise InputError(f"{site.label}: the number of positions of a tile is not known; give the size of an image")
    if positions == "cls":
        return 1
    return known - int(anatomy.has_cls and positions == "patches" and site.name != "projector_out")
