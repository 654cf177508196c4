"""Emoji sprites: a committed 32-pixel atlas, its builder, and premultiplied resizing.

The drawings are Google's Noto Color Emoji (SIL Open Font License 1.1). `atlas.png` is what normal use reads; the
font is needed only to rebuild it.
"""

from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from slitlamp.organism.categories import CATEGORIES, CATEGORY_NAMES

CELL: Final = 32
COLUMNS: Final = 10
FONT_SIZE: Final = 109
"""The only strike that Noto Color Emoji's bitmap table holds."""
OPAQUE: Final = 128
"""A sprite pixel with at least this alpha (of 255) counts as the object's own."""


def build_atlas(font_path: str | Path) -> Image.Image:
    """Draw the atlas of all categories from the font file as a palette image with alpha.

    Cell `i` (row `i // 10`, column `i % 10`) holds category `i`, cropped to its drawing, long side 32 px, at the
    cell's top left corner.
    """
    font = ImageFont.truetype(str(font_path), FONT_SIZE)
    rows = -(-len(CATEGORIES) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for index, category in enumerate(CATEGORIES):
        glyph = Image.new("RGBA", (136, 136))
        ImageDraw.Draw(glyph).text((0, 0), chr(category.codepoint), font=font, embedded_color=True)
        pixels = _isolate(category.name, np.asarray(glyph))
        sprite = _fit(_crop(pixels), CELL)
        atlas.paste(Image.fromarray(_unpremultiply(sprite)), (index % COLUMNS * CELL, index // COLUMNS * CELL))
    return atlas.quantize(256, method=Image.Quantize.FASTOCTREE)


@lru_cache(maxsize=1)
def _atlas() -> NDArray[np.uint8]:
    with (files("slitlamp.organism") / "atlas.png").open("rb") as stream:
        return np.asarray(Image.open(stream).convert("RGBA"))


@cache
def sprite(category: str, size: int) -> NDArray[np.uint8]:
    """Return the category's drawing with long side `size` px: premultiplied RGBA, uint8 `[height, width, 4]`.

    The array is read-only because it is cached and shared.
    """
    index = CATEGORY_NAMES.index(category)
    top, left = index // COLUMNS * CELL, index % COLUMNS * CELL
    resized = _fit(_crop(_atlas()[top : top + CELL, left : left + CELL]), size)
    resized = _trim(resized)
    resized.setflags(write=False)
    return resized


def _crop(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return _bounded(pixels, 16)


def _trim(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cut rows and columns without an opaque pixel, so that the array's extent is the object's box."""
    return np.ascontiguousarray(_bounded(pixels, OPAQUE))


def _bounded(pixels: NDArray[np.uint8], threshold: int) -> NDArray[np.uint8]:
    rows, columns = np.nonzero(pixels[..., 3] >= threshold)
    return pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _fit(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize straight-alpha RGBA to long side `size`; return premultiplied RGBA.

    Every channel is resized on its own after premultiplication: PIL's RGBA resize leaves pale halos.
    """
    alpha = pixels[..., 3:].astype(np.uint16)
    premultiplied = np.concatenate([(pixels[..., :3] * alpha + 127) // 255, alpha], axis=2).astype(np.uint8)
    height, width = pixels.shape[:2]
    scale = size / max(height, width)
    target = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    channels = [Image.fromarray(np.ascontiguousarray(premultiplied[..., c])) for c in range(4)]
    return np.stack([np.asarray(channel.resize(target, method)) for channel in channels], axis=2)


def _unpremultiply(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    alpha = np.maximum(pixels[..., 3:].astype(np.uint16), 1)
    colour = np.minimum((pixels[..., :3].astype(np.uint16) * 255 + alpha // 2) // alpha, 255)
    return np.concatenate([colour, pixels[..., 3:]], axis=2).astype(np.uint8)


def _isolate(name: str, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Keep only the object where the emoji also shows a person, a second object, or a coloured block."""
    pixels = pixels.copy()
    red, green, blue = (pixels[..., c].astype(np.int16) for c in range(3))
    row, column = np.indices(red.shape)
    match name:
        case "fork":
            keep = np.asarray(column < 62)
        case "tie":
            keep = np.asarray((red > blue + 20) & (column > 40) & (column < 96))
        case "couch":
            keep = np.asarray(row >= 62)
        case "sink":
            keep = np.asarray(red > 140)
        case "skis":
            keep = np.asarray((row < 88) | ((blue > red + 40) & (row < 118)))
        case "snowboard":
            keep = np.asarray((red > 150) & (green < 120) & (row > 86))
        case "surfboard":
            board = (green > blue) | (np.minimum(np.minimum(red, green), blue) > 200)
            keep = np.asarray(board & (row > 92) & (column < 100))
        case _:
            return pixels
    pixels[..., 3] = np.where(keep, pixels[..., 3], 0)
    return pixels
