"""Where the image tokens of Qwen-VL models lie, and where their images are in the tower's one sequence.

Their towers run over the patches of all images of a batch as one sequence, in which the patches of a merge block (2 x 2 of
them make one image token) stand side by side. Qwen2.5-VL, besides, orders blocks by the windows of its attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slitlamp.models.patches import BASE_VIEW, Patches, _grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _token_grids(config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of the image tokens of every image. An image has one frame (a video would have more)."""
    side = int(config.vision_config.spatial_merge_size)
    return [(height // side, width // side) for _, height, width in inputs["image_grid_thw"].tolist()]


def qwen_patches(config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool) -> list[Patches]:
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: one grid per image in raster order, as many rows and columns as its size gives."""
    found = []
    for shape in _token_grids(config, processed)[:n_images]:
        row, column = _grid(*shape)
        zero = torch.zeros_like(row)
        found.append(Patches(zero, row, column, zero, {(0, BASE_VIEW): shape}, n_tiles=1))
    return found


def _in_raster_order(blocks: Tensor, shape: tuple[int, int], side: int) -> Tensor:
    """Where the patches of an image are, in raster order.

    Args:
        blocks: int64 [block], where the merge blocks of an image are in the sequence of blocks, in raster order.
        shape: rows and columns of blocks.
        side: of a block, in patches.
    """
    rows, columns = shape
    patches = blocks[:, None] * side**2 + torch.arange(side**2)
    return patches.view(rows, columns, side, side).transpose(1, 2).flatten()


def qwen_unpack(config: PreTrainedConfig, inputs: Mapping[str, Any], merged: bool) -> list[Tensor]:
    """Qwen2-VL, Qwen3-VL: images one after the other, merge blocks in raster order. The projector makes one of each block."""
    shapes = _token_grids(config, inputs)
    counts = [rows * columns for rows, columns in shapes]
    blocks = torch.arange(sum(counts)).split(counts)
    return _unpack(config, shapes, blocks, merged=merged)


def qwen2_5_unpack(config: PreTrainedConfig, inputs: Mapping[str, Any], merged: bool) -> list[Tensor]:
    """Qwen2.5-VL: images one after the other, the merge blocks of an image window by window."""
    from transformers.vision_utils import get_vision_window_index

    vision = config.vision_config
    window_index, _ = get_vision_window_index(
        inputs["image_grid_thw"].cpu(), int(vision.spatial_merge_size), int(vision.window_size), int(vision.patch_size)
    )
    shapes = _token_grids(config, inputs)
    # block window_index[i] of the raster order is at place i of the tower's
    blocks = window_index.argsort().split([rows * columns for rows, columns in shapes])
    return _unpack(config, shapes, blocks, merged=merged)


def _unpack(
    config: PreTrainedConfig, shapes: list[tuple[int, int]], blocks: tuple[Tensor, ...], *, merged: bool
) -> list[Tensor]:
    side = int(config.vision_config.spatial_merge_size)
    if merged:
        return list(blocks)
    return [_in_raster_order(one, shape, side) for one, shape in zip(blocks, shapes, strict=True)]
