"""Llama 4: where its image tokens lie, and where CLS tokens and patches are in what its tower runs over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slitlamp.errors import UnsupportedError
from slitlamp.models.patches import Patches
from slitlamp.models.patches_tiles import tiled_patches

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def llama4_patches(
    config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool
) -> list[Patches]:
    """Llama 4: tiles row by row, a text token after each, then the whole image; a token stands for a square of patches.

    The processor keeps to itself how it cut an image, so this is read off the tokens: the token after the last tile ends
    a row of tiles, so the first tile that it follows is the last of its row.

    Raises:
        UnsupportedError: tokens laid out otherwise, or another number of tiles in the pixels.
    """
    grids = [grid for ids in processed["input_ids"].tolist() for grid in _tile_grids(config, ids)]
    merged = round(1 / float(config.vision_config.pixel_shuffle_ratio))
    return tiled_patches(config, {**processed, "tile_grids": grids}, merged)


def _tile_grids(config: PreTrainedConfig, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Rows and columns of tiles of the images of one prompt; (1, 1) for one that was not cut."""
    start, end, patch = config.boi_token_index, config.eoi_token_index, config.image_token_index
    found: list[tuple[int, int]] = []
    after: list[int] = []  # the token after each tile of the image under way
    for place, token in enumerate(ids):
        if token == start:
            after = []
        elif place and ids[place - 1] == patch and token != patch:
            after.append(token)
            if token == end:
                *tiles, _ = after  # the last is the whole image
                columns = tiles.index(tiles[-1]) + 1 if tiles else 1
                rows = max(1, len(tiles) // columns)
                if tiles and rows * columns != len(tiles):
                    raise UnsupportedError(f"{len(tiles)} tiles of an image in rows of {columns}")
                found.append((rows, columns))
    return found


def llama4_unpack(config: PreTrainedConfig, inputs: Mapping[str, Any], merged: bool) -> list[Tensor]:
    """The tower runs over [tile, patches and CLS token]: the CLS token, which is its last, comes first. The projector runs
    over the tokens of all tiles as one sequence.
    """
    vision = config.vision_config
    n_tiles = int(inputs["pixel_values"].shape[0])
    n_patches = (int(vision.image_size) // int(vision.patch_size)) ** 2
    if merged:
        n_tokens = round(n_patches * float(vision.pixel_shuffle_ratio) ** 2)
        return list(torch.arange(n_tiles * n_tokens).view(n_tiles, n_tokens))
    places = torch.arange(n_tiles * (n_patches + 1)).view(n_tiles, n_patches + 1)
    return list(places.roll(1, dims=1))
