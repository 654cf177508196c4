"""Where the image tokens of PaliGemma and Gemma 3 lie: one square grid per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from slitlamp.errors import UnsupportedError
from slitlamp.models.patches import BASE_VIEW, Patches, _grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _square(side: int) -> Patches:
    row, column = _grid(side, side)
    zero = torch.zeros_like(row)
    return Patches(zero, row, column, zero, {(0, BASE_VIEW): (side, side)}, n_tiles=1)


def paligemma_patches(
    config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool
) -> list[Patches]:
    """PaliGemma: every patch of the tower is a token, in raster order."""
    vision = config.vision_config
    return [_square(int(vision.image_size) // int(vision.patch_size)) for _ in range(n_images)]


def gemma3_patches(
    config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool
) -> list[Patches]:
    """Gemma 3: `mm_tokens_per_image` tokens, each the mean of a square of patches, in raster order.

    Raises:
        UnsupportedError: the processor cut crops out of the images (pan and scan).
    """
    pictures = len(processed["pixel_values"])
    if pictures != n_images:
        raise UnsupportedError(
            f"{pictures} pictures for {n_images} images: pan and scan, which adds crops of an image, is not supported; "
            "set do_pan_and_scan to False in the processor's images_kwargs"
        )
    return [_square(int(config.mm_tokens_per_image**0.5)) for _ in range(n_images)]
