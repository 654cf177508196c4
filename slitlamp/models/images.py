"""Taking images from the user: paths, PIL images or arrays, checked before a model sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from PIL.Image import Image

from slitlamp.errors import InputError

SMALLEST_SIDE = 4
LARGEST_ASPECT = 200.0

ImageLike = str | Path | Image | np.ndarray[Any, Any]
Window = tuple[float, float, float, float]
"""A part of a picture: left, top, right, bottom in shares of its width and height."""
WHOLE: Window = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class CenterCrop:
    """What a processor does that cuts out the middle of a picture (CLIP's, so that of LLaVA-1.5, of any that is not square).

    Attributes:
        shortest: to which length the shorter side is resized first; None where `resized` says both.
        resized: (height, width) to which the picture is resized; None where it keeps its shape, or is not resized.
        height, width: of what is cut out; black bars are added where the picture is smaller.
    """

    shortest: int | None
    resized: tuple[int, int] | None
    height: int
    width: int

    @staticmethod
    def of(image_processor: Any) -> CenterCrop | None:
        """From an image processor; None where it does not crop."""
        if not getattr(image_processor, "do_center_crop", False):
            return None
        size = dict(image_processor.size or {}) if getattr(image_processor, "do_resize", True) else {}
        crop = dict(image_processor.crop_size)
        tall, wide, shortest = (size.get(name) for name in ("height", "width", "shortest_edge"))
        resized = None if tall is None or wide is None else (int(tall), int(wide))
        return CenterCrop(None if shortest is None else int(shortest), resized, int(crop["height"]), int(crop["width"]))

    def window(self, size: tuple[int, int]) -> Window:
        """The part that is cut out of a picture of (width, height); beyond 0 and 1 where bars are added."""
        width, height = size
        if self.resized is not None:
            height, width = self.resized
        elif self.shortest is not None:
            short = min(width, height)
            width, height = (int(self.shortest * side / short) for side in (width, height))
        left, top = (width - self.width) // 2, (height - self.height) // 2
        return left / width, top / height, (left + self.width) / width, (top + self.height) / height


def load_image(source: ImageLike, where: str = "image") -> Image:
    """An RGB image from a path, a PIL image (RGB or L) or a uint8 array [height, width, 3].

    Args:
        source: the image.
        where: how messages call it.

    Raises:
        InputError: missing or corrupt file, a mode other than RGB or L, a side under 4 pixels, an aspect ratio over
            200, or an array of another type or shape.
    """
    if isinstance(source, str | Path):
        image = _open(Path(source), where)
        where = f"{where} ({source})"
    elif isinstance(source, Image):
        image = source
    elif isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise InputError(
                f"{where}: an array must be uint8 [height, width, 3]; this one is {source.dtype} {list(source.shape)}"
            )
        image = PIL.Image.fromarray(source)
    else:
        raise InputError(f"{where}: expected a path, a PIL image or a uint8 array, found {type(source).__name__}")

    width, height = image.size
    if min(width, height) < SMALLEST_SIDE:
        raise InputError(f"{where}: {width} x {height} pixels; each side must have at least {SMALLEST_SIDE}")
    if max(width, height) / min(width, height) > LARGEST_ASPECT:
        raise InputError(
            f"{where}: {width} x {height} pixels; the sides may differ by a factor of {LARGEST_ASPECT:g} at most"
        )
    if image.mode == "L":
        return image.convert("RGB")
    if image.mode != "RGB":
        raise InputError(
            f"{where}: mode {image.mode!r}, but only RGB and L are taken, since how to drop an alpha channel, a "
            "palette or an ink space is yours to choose; for example image.convert('RGB')"
        )
    return image


def _open(path: Path, where: str) -> Image:
    if not path.is_file():
        raise InputError(f"{where}: no such file: {path}")
    try:
        with PIL.Image.open(path) as opened:
            opened.load()
            return opened.copy()
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise InputError(f"{where}: {path} cannot be read as an image ({error})") from error


def per_prompt(images: Sequence[Any] | None, n_prompts: int) -> list[list[ImageLike]]:
    """The images of each prompt as a list of lists.

    Args:
        images: None (no images at all), or one entry per prompt: an image, None, or a list of images.
        n_prompts: number of prompts.

    Raises:
        InputError: not one entry per prompt.
    """
    if images is None:
        return [[] for _ in range(n_prompts)]
    if isinstance(images, str | Path | Image | np.ndarray):
        raise InputError("images must be a list with one entry per prompt; for one prompt, write images=[image]")
    if len(images) != n_prompts:
        raise InputError(
            f"{len(images)} image entries for {n_prompts} prompts; give one entry per prompt (an image, None, or a "
            "list of images)"
        )
    return [[] if one is None else list(one) if isinstance(one, list | tuple) else [one] for one in images]
