"""Mllama (Llama 3.2 Vision): which keys of its cross-attention are tokens of an image, and where they lie.

Its decoder has one token per image in the prompt, which no feature replaces. The image is read by cross-attention, whose
keys are the projected states of the vision tower: for every image of a row, for every tile up to the largest number of
tiles, a CLS token and the patches of the tile. Padding (tiles and images that a row does not have) is among the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slitlamp.errors import InputError
from slitlamp.models.patches import BASE_VIEW, Patches, _grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_PATCHES_PADDED_TO = 8
"""The tower pads the patches of a tile, with their CLS token, to a multiple of this."""


def _tiles(config: PreTrainedConfig, ratio: int) -> tuple[int, int]:
    """Rows and columns of tiles, from the id of an aspect ratio; (0, 0) where there is no image."""
    if ratio == 0:
        return 0, 0
    rows, columns = config.vision_config.supported_aspect_ratios[ratio - 1]
    return int(rows), int(columns)


def _side(config: PreTrainedConfig) -> int:
    return int(config.vision_config.image_size) // int(config.vision_config.patch_size)


def mllama_patches(
    config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool
) -> list[Patches]:
    """Mllama: the keys of cross-attention, tile by tile, each a CLS token and its patches, as one grid of the image."""
    side = _side(config)
    base_row, base_column = _grid(side, side)
    cls = torch.full((1,), -1)
    found = []
    for ratio in processed["aspect_ratio_ids"].flatten().tolist():
        rows, columns = _tiles(config, ratio)
        if not rows:
            continue
        places = [(row, column) for row in range(rows) for column in range(columns)]
        row = torch.cat([torch.cat([cls, base_row + tile * side]) for tile, _ in places])
        column = torch.cat([torch.cat([cls, base_column + tile * side]) for _, tile in places])
        zero = torch.zeros_like(row)
        grids = {(0, BASE_VIEW): (rows * side, columns * side)}
        found.append(Patches(zero, row, column, zero, grids, n_tiles=rows * columns))
    return found


def mllama_cross_keys(config: PreTrainedConfig, inputs: Mapping[str, Any]) -> Tensor | None:
    """bool [batch, key], true at the tokens of an image's real tiles; None without images.

    Raises:
        InputError: prompts with different numbers of images and text before an image. Mllama lets a token that has no
            image before it read every key, those of images that only other prompts have included, so its answer would
            depend on the other prompts of the batch.
    """
    if "aspect_ratio_ids" not in inputs:
        return None
    ratios = inputs["aspect_ratio_ids"]
    tiles = torch.tensor([[_product(_tiles(config, ratio)) for ratio in row] for row in ratios.tolist()])
    reads = inputs["cross_attention_mask"].flatten(2).any(dim=2)  # [batch, position]
    reads_all = bool((~reads & inputs["attention_mask"].bool()).any())
    if reads_all and bool(((tiles == 0) & (tiles > 0).any(dim=0)).any()):
        raise InputError(
            "prompts with different numbers of images in one batch, and text before an image: Mllama lets such text read "
            "the padding that stands for missing images, so that answers would depend on the other prompts. Put prompts "
            "with equal numbers of images in one batch"
        )
    real = torch.arange(int(config.vision_config.max_num_tiles)) < tiles[:, :, None]  # [batch, image, tile]
    return real.flatten(1).repeat_interleave(_side(config) ** 2 + 1, dim=1)


def _product(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def mllama_unpack(config: PreTrainedConfig, inputs: Mapping[str, Any], merged: bool) -> list[Tensor]:
    """Of every real tile its CLS token and patches, in the sequences [image, tiles x padded patches] of the tower, or in
    what the projector gives, [batch, image, tile, patch]; both with all axes before the width as one.

    The tower's attention runs over all tiles of an image, and masks padding only where padding looks at padding: weights
    within a tile, which is what this leaves of it, sum to less than 1.
    """
    length = _side(config) ** 2 + 1
    padded = length if merged else -(-length // _PATCHES_PADDED_TO) * _PATCHES_PADDED_TO
    most = int(config.vision_config.max_num_tiles)
    found = []
    for image, ratio in enumerate(inputs["aspect_ratio_ids"].flatten().tolist()):
        for tile in range(_product(_tiles(config, ratio))):
            found.append((image * most + tile) * padded + torch.arange(length))
    return found
