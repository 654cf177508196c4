"""Versions of a batch with other pixels: of one shade, or blacked out where a map says little of the image is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import Batch

Shade = Literal["black", "grey", "white"]
SHADES: tuple[str, ...] = get_args(Shade)
BARELY = 1e-6
"""A normalised pixel that is not quite 0."""
ONE_TILE = ("llava", "vipllava", "paligemma", "gemma3")
"""Families whose tower takes each image as one picture, of the same size for all."""


def of_shade(batch: Batch, shade: Shade) -> Tensor:
    """Pixels of one shade, in the layout of the batch's: everywhere in an image, what a processor fills it up with included.

    Args:
        batch: with pixels.
        shade: "black" (0), "grey" (half of full brightness) or "white" (1), before the processor's normalisation.

    Raises:
        InputError: a batch that does not say what its processor makes of black and white.
        UnknownNameError: another shade.
    """
    if shade not in SHADES:
        raise unknown("shade", str(shade), SHADES)
    pixels: Tensor = batch.extra["pixel_values"]
    black, white = (torch.tensor(one, dtype=torch.float32) for one in _range_of(batch))
    colour = {"black": black, "grey": (black + white) / 2, "white": white}[shade]
    if batch.extra.get("image_grid_thw") is not None:  # [patch of any image, channel x frame x pixel]
        return colour.repeat_interleave(pixels.shape[1] // len(colour)).expand(len(pixels), -1).to(pixels)
    filled = colour[:, None, None].expand(pixels.shape).to(pixels)
    sizes = batch.extra.get("image_sizes")
    if sizes is not None and pixels.ndim == 4:  # each image filled up with zeros to the size of the largest
        kept = torch.zeros_like(pixels)
        for number, (height, width) in enumerate(sizes):
            kept[number, :, :height, :width] = 1
        return filled * kept
    filled = filled.masked_fill(filled == 0, BARELY)  # a grey of 0 would be taken for filling
    return torch.where(filling_tiles(pixels), 0, filled)


def filling_tiles(pixels: Tensor) -> Tensor:
    """bool [..., 1, 1, 1], true at the tiles of [..., channel, row, column] that fill up a row: they are 0, by which some
    families know them.
    """
    return (pixels == 0).flatten(-3).all(dim=-1)[..., None, None, None]


def _range_of(batch: Batch) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not batch.black:
        raise InputError(
            "this batch does not say what its processor makes of black and white pixels; make it by vlm.encode, or give it "
            "black=... and white=..."
        )
    return batch.black, batch.white


def check_one_tile(anatomy: Anatomy, whose: str) -> None:
    """Refuse families in which a map of image tokens does not lie on one picture per image.

    Raises:
        UnsupportedError: an image in several tiles, of its own size, or read by a Q-Former or by cross-attention.
    """
    family = anatomy.family
    if family.model_type not in ONE_TILE or anatomy.tower.unpack is not None:
        raise UnsupportedError(
            f"{whose}: {family.name} does not give its tower each image as one picture with one grid of tokens, on which a map "
            "could be laid; families that do: LLaVA-1.5 (on a CLIP or SigLIP tower), VipLLaVA, PaliGemma, Gemma 3"
        )


def masked(batch: Batch, maps: Sequence[Tensor], keep: float) -> Batch:
    """The batch with the pixels below a quantile of a map blacked out (the augmented view of AGLA, arXiv 2406.12718).

    A map is laid on the grid of its image's tokens and made as large as the picture by bilinear interpolation; of each
    picture, pixels of at least the (1 - keep) quantile stay, also all of those that tie with it.

    Args:
        batch: rows with images, of a family that `check_one_tile` lets through.
        maps: per row, [image token], in the order of the row's image tokens.
        keep: the share of the pixels that stay, above 0, at most 1.

    Raises:
        InputError: a row without an image, a map of another length, or a share out of range.
        UnsupportedError: images that are not one picture each.
    """
    check_keep(keep, "a masked view")
    if not batch.has_images:
        raise InputError("a masked view needs an image in every row")
    pixels: Tensor = batch.extra["pixel_values"]
    if pixels.ndim != 4 or sum(map(len, batch.images)) != len(pixels) or "image_sizes" in batch.extra:
        raise UnsupportedError(
            f"pixels of shape {list(pixels.shape)} for {sum(map(len, batch.images))} images: a map of image tokens is laid on "
            "images that are one picture each"
        )
    black = torch.tensor(_range_of(batch)[0])[:, None, None].to(pixels)
    shown: list[Tensor] = []
    for row, (places, values) in enumerate(zip(batch.patches, maps, strict=True)):
        if list(values.shape) != [len(places)]:
            raise InputError(
                f"item {batch.ids[row]!r}: a map of shape {list(values.shape)} for {len(places)} image tokens"
            )
        for image in range(len(batch.images[row])):
            grid = places.to_grid(values.float(), image=image)[None, None]
            large = torch.nn.functional.interpolate(grid, pixels.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
            shown.append(large >= large.flatten().quantile(1 - keep))
    return batch.with_pixels(torch.where(torch.stack(shown)[:, None].to(pixels.device), pixels, black))


def check_keep(keep: float, whose: str) -> None:
    """Refuse a share of pixels out of range.

    Raises:
        InputError: it is not above 0 and at most 1.
    """
    if not 0 < keep <= 1:
        raise InputError(f"{whose}: keep must be above 0 and at most 1, found {keep!r}")
