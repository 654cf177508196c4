"""LLaVA-OneVision and VipLLaVA: where image tokens lie on the image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from slitlamp.errors import UnsupportedError
from slitlamp.models.patches import BASE_VIEW, TILE_VIEW, Patches, _base_grid, _grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def vipllava_patches(
    config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool
) -> list[Patches]:
    """VipLLaVA: one grid per image in raster order; the tower's first token is always dropped.

    Raises:
        UnsupportedError: a tower without a CLS token, of which the model would drop the first patch.
    """
    if not has_cls:
        raise UnsupportedError(
            "VipLLaVA drops the first token of its vision tower, and this tower's first token is a patch, not CLS; use a "
            "CLIP tower"
        )
    height, width = processed["pixel_values"].shape[-2:]
    patch = int(config.vision_config.patch_size)
    shape = (int(height) // patch, int(width) // patch)
    row, column = _grid(*shape)
    zero = torch.zeros_like(row)
    return [Patches(zero, row, column, zero, {(0, BASE_VIEW): shape}, n_tiles=1) for _ in range(n_images)]


def llava_onevision_patches(
    config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool
) -> list[Patches]:
    """LLaVA-OneVision: of the only image of a prompt, the whole image, then its tiles as one grid without padding, shrunk
    where it is larger than the model takes, each row closed by a newline token; of each of several images, the whole image
    and one newline token.
    """
    from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image

    side, patch = int(config.vision_config.image_size), int(config.vision_config.patch_size)
    per_tile = side // patch
    largest = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    base_row, base_column, base_shape = _base_grid(config, side, side, has_cls=has_cls)
    alone = [count == 1 for count in processed["batch_num_images"].tolist() for _ in range(count)]
    found = []
    for size, is_alone in zip(processed["image_sizes"][:n_images], alone, strict=True):
        grids = {(0, BASE_VIEW): base_shape}
        if is_alone:
            tile_rows, tile_columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
            # unpad_image cuts rows or columns off a picture; what is left of a picture of ones is the grid the model keeps
            kept = unpad_image(torch.ones(1, tile_rows * per_tile, tile_columns * per_tile), size)
            rows, columns = int(kept.shape[1]), int(kept.shape[2])
            ratio = math.sqrt(rows * columns / (largest * per_tile**2))
            if ratio > 1.1:  # as the model does: it interpolates to a smaller grid
                rows, columns = int(rows // ratio), int(columns // ratio)
            row, column = _grid(rows, columns + 1)
            column = torch.where(column == columns, -1, column)
            grids[0, TILE_VIEW] = (rows, columns)
            n_tiles = 1 + tile_rows * tile_columns
        else:
            row, column, n_tiles = torch.tensor([-1]), torch.tensor([-1]), 1
        view = torch.full_like(row, TILE_VIEW if is_alone else BASE_VIEW)
        view = torch.cat([torch.full_like(base_row, BASE_VIEW), view])
        row, column = torch.cat([base_row, row]), torch.cat([base_column, column])
        found.append(Patches(torch.zeros_like(row), row, column, view, grids, n_tiles))
    return found
