"""Versions of a batch without its image: what VHD, and later every contrast, compares with."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from slitlamp.errors import InputError, unknown
from slitlamp.models.batch import Batch
from slitlamp.tracing.call import Calls
from slitlamp.tracing.session import Edit

ImageFree = Literal["deleted", "zero", "mean", "noise"]
IMAGE_FREE: tuple[str, ...] = get_args(ImageFree)


def check_image_free(how: str) -> None:
    """Refuse an unknown way of removing the image.

    Raises:
        UnknownNameError: not one of `IMAGE_FREE`.
    """
    if how not in IMAGE_FREE:
        raise unknown("way of removing the image", how, IMAGE_FREE)


def image_free(batch: Batch, how: ImageFree = "deleted", seed: int = 0) -> tuple[Batch, list[Edit]]:
    """A batch whose rows say nothing of their images.

    Args:
        batch: rows with images.
        how: "deleted": the image tokens are taken out, so that rows get shorter and positions shift (VHD, Eq. 3);
            "zero": image embeddings are set to 0 at equal length;
            "mean": each image embedding is replaced by the mean of its row's image embeddings;
            "noise": the pixels are replaced by one Gaussian noise image, the same for all rows.
        seed: of the noise.

    Returns:
        The batch to run, and the edits to run it with.

    Raises:
        InputError: a row without an image.
        UnknownNameError: an unknown `how`.
    """
    check_image_free(how)
    if not batch.has_images:
        rows = [batch.ids[row] for row, some in enumerate(batch.image_mask.any(dim=1).tolist()) if not some]
        raise InputError(f"the image cannot be removed from rows without one: {', '.join(rows[:5])}")
    if how == "deleted":
        return batch.without_images(), []
    if how == "noise":
        pixels: Tensor = batch.extra["pixel_values"]
        one = torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(seed))
        return batch.with_pixels(one.to(pixels).expand_as(pixels).contiguous()), []

    def replace(values: Tensor, calls: Calls) -> Tensor:
        if not calls.is_prefill:
            return values
        mask = calls.batch.image_mask[..., None]
        if how == "zero":
            return values.masked_fill(mask, 0)
        mean = (values.float() * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
        return torch.where(mask, mean.to(values.dtype), values)

    return batch, [Edit("resid_pre", 0, replace)]
