"""InternVL and Aya Vision: an image is cut into tiles, then comes the whole image, in separate runs of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image

from slitlamp.errors import UnsupportedError
from slitlamp.models.patches import BASE_VIEW, TILE_VIEW, Patches, _grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def canvas_grid(processor: Any, image: Image) -> tuple[int, int]:
    """Rows and columns of tiles into which the processor cuts an image; (1, 1) for one that it leaves whole."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    of_image = processor.image_processor
    options = getattr(processor, "images_kwargs", {})  # what the processor asks of its image processor
    if not options.get("crop_to_patches", of_image.crop_to_patches) or of_image.max_patches < 2:
        return 1, 1
    columns, rows = get_optimal_tiled_canvas(
        (image.height, image.width),
        (of_image.size["height"], of_image.size["width"]),
        of_image.min_patches,
        of_image.max_patches,
    )
    return rows, columns


def internvl_patches(
    config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool
) -> list[Patches]:
    """InternVL: tiles row by row, then the whole image; a token stands for a square of patches.

    Raises:
        UnsupportedError: as `tiled_patches`.
    """
    merged = round(1 / float(config.downsample_ratio))
    return tiled_patches(config, processed, merged)


def aya_vision_patches(
    config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool
) -> list[Patches]:
    """Aya Vision: tiles row by row, then the whole image; a token stands for a square of patches.

    Raises:
        UnsupportedError: as `tiled_patches`.
    """
    return tiled_patches(config, processed, int(config.downsample_factor))


def tiled_patches(config: PreTrainedConfig, processed: Mapping[str, Any], merged: int) -> list[Patches]:
    """The tiles of each image as one high-resolution grid, and the whole image after them where there is more than one.

    Args:
        config: the model's configuration.
        processed: the processor's output, with the rows and columns of tiles of every image as `tile_grids`.
        merged: how many patches along a side one token stands for.

    Raises:
        UnsupportedError: the processor made another number of tiles than the grids have.
    """
    height, width = (int(one) for one in processed["pixel_values"].shape[-2:])
    sizes = config.vision_config.patch_size
    patch_height, patch_width = (sizes, sizes) if isinstance(sizes, int) else sizes
    per_row, per_column = height // patch_height // merged, width // patch_width // merged
    row, column = _grid(per_row, per_column)
    found = []
    for tile_rows, tile_columns in processed["tile_grids"]:
        tiles = [(r, c) for r in range(tile_rows) for c in range(tile_columns)]
        grids = {(0, BASE_VIEW): (per_row, per_column)}
        if len(tiles) > 1:
            grids[0, TILE_VIEW] = (tile_rows * per_row, tile_columns * per_column)
            all_rows = torch.cat([*(row + r * per_row for r, _ in tiles), row])
            all_columns = torch.cat([*(column + c * per_column for _, c in tiles), column])
            view = torch.full_like(all_rows, TILE_VIEW)
            view[-len(row) :] = BASE_VIEW
        else:
            all_rows, all_columns, view = row, column, torch.zeros_like(row)
        n_tiles = len(tiles) + (len(tiles) > 1)
        found.append(Patches(torch.zeros_like(all_rows), all_rows, all_columns, view, grids, n_tiles))
    made, expected = int(processed["pixel_values"].shape[0]), sum(one.n_tiles for one in found)
    if made != expected:
        raise UnsupportedError(
            f"the processor made {made} tiles, but images of these sizes, cut as its image processor is set, make {expected}"
        )
    return found
