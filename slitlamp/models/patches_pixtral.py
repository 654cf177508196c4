"""Where the image tokens of models on a Pixtral tower lie, and where their images are in the tower's one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slitlamp.models.patches import BASE_VIEW, Patches, _grid, llava_patches

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _grids(config: PreTrainedConfig, inputs: Mapping[str, Any], *, merged: bool) -> list[tuple[int, int]]:
    """Rows and columns of every image, in patches, or in what the projector makes of them."""
    side = int(config.vision_config.patch_size)
    if merged:
        side *= int(getattr(config, "spatial_merge_size", 1))
    return [(int(height) // side, int(width) // side) for height, width in inputs["image_sizes"]]


def pixtral_patches(
    config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool
) -> list[Patches]:
    """Mistral 3, and LLaVA on a Pixtral tower: one grid per image, as many rows and columns as its size gives.

    The tokens that end a row and the image ([IMG_BREAK], [IMG_END]) are text to the model.
    """
    found = []
    for shape in _grids(config, processed, merged=True)[:n_images]:
        row, column = _grid(*shape)
        zero = torch.zeros_like(row)
        found.append(Patches(zero, row, column, zero, {(0, BASE_VIEW): shape}, n_tiles=1))
    return found


def pixtral_unpack(config: PreTrainedConfig, inputs: Mapping[str, Any], merged: bool) -> list[Tensor]:
    """The tower's sequence is that of all images, one after the other, each in raster order; so is the projector's."""
    counts = [rows * columns for rows, columns in _grids(config, inputs, merged=merged)]
    return list(torch.arange(sum(counts)).split(counts))


def llava_tower_patches(
    config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool
) -> list[Patches]:
    """LLaVA, whose released models stand on a CLIP or on a Pixtral tower: the rule of its tower."""
    rule = pixtral_patches if config.vision_config.model_type == "pixtral" else llava_patches
    return rule(config, processed, n_images, has_cls)
