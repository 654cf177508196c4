"""Versions of a batch without its image, or with less of it: what VHD and every contrast compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from slitlamp.decoding.edits import knock_out
from slitlamp.decoding.pixel_views import Shade, filling_tiles, of_shade
from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import Batch
from slitlamp.tracing.attention_edit import AttentionEdit
from slitlamp.tracing.call import Calls
from slitlamp.tracing.session import Edit

ImageFree = Literal["deleted", "unk", "zero", "mean", "noise", Shade]
IMAGE_FREE: tuple[str, ...] = get_args(ImageFree)


def check_image_free(how: str) -> None:
    """Refuse an unknown way of removing the image.

    Raises:
        UnknownNameError: not one of `IMAGE_FREE`.
    """
    if how not in IMAGE_FREE:
        raise unknown("way of removing the image", how, IMAGE_FREE)


def image_free(batch: Batch, how: ImageFree = "deleted", seed: int = 0) -> tuple[Batch, list[Edit]]:
    """A batch whose rows say nothing of their images, but for their number and, unless deleted, their sizes.

    Args:
        batch: rows with images.
        how: "deleted": the image tokens are taken out, so that rows get shorter and positions shift (VHD, Eq. 3); text
            that a family writes around them (Qwen-VL: `<|vision_start|>`, `<|vision_end|>`; separators of tiles) stays;
            "unk": each image (several images: each of them) is replaced by one token, the tokenizer's unknown word, as text
            (VDD); otherwise as "deleted";
            "zero": image embeddings are set to 0 at equal length;
            "mean": each image embedding is replaced by the mean of its row's image embeddings;
            "noise": the pixels are replaced by one Gaussian noise image, the same for all rows; where the tower takes
            images of any size, by one of each size;
            "black", "grey", "white": the pixels are replaced by those of one shade, which the processor then normalises.
            What DeepStack adds to the residual stream (Qwen3-VL) is treated as the embeddings are.
        seed: of the noise.

    Returns:
        The batch to run, and the edits to run it with.

    Raises:
        InputError: a row without an image.
        UnsupportedError: "zero" or "mean" in a family that reads the image by cross-attention, which has no image
            embeddings; "unk" with a tokenizer that has no such token.
        UnknownNameError: an unknown `how`.
    """
    check_image_free(how)
    _check_images(batch)
    if how == "deleted":
        return batch.without_images(), []
    if how == "unk":
        return _unknown_word(batch), []
    if how == "noise":
        return batch.with_pixels(_noise(batch, seed)), []
    if how in ("black", "grey", "white"):
        return batch.with_pixels(of_shade(batch, how)), []
    if batch.cross_mask is not None:
        raise UnsupportedError(
            f"this family reads the image by cross-attention: it has no image embeddings for {how!r} to replace; use "
            "'deleted' or 'noise'"
        )

    def replace(values: Tensor, calls: Calls) -> Tensor:
        return _replaced(values, calls.batch.image_mask, how)

    after = [edit for layer in batch.deepstack_layers for edit in _deepstack_edits(layer, how)]
    return batch, [Edit("resid_pre", 0, replace, prefill_only=True), *after]


def _check_images(batch: Batch) -> None:
    if not batch.has_images:
        rows = [batch.ids[row] for row, some in enumerate(batch.image_mask.any(dim=1).tolist()) if not some]
        raise InputError(f"the image cannot be removed from rows without one: {', '.join(rows[:5])}")


def _unknown_word(batch: Batch) -> Batch:
    """The batch with one unknown word, a token of text, in the place of each image."""
    if batch.unk_token_id is None:
        raise UnsupportedError(
            "this model's tokenizer has no token for unknown words (unk_token) to put in the place of an image; use 'deleted'"
        )
    slots = batch.with_image_slots(1)
    return replace(
        slots,
        input_ids=slots.input_ids.masked_fill(slots.image_mask, batch.unk_token_id),
        image_mask=torch.zeros_like(slots.image_mask),
    )


def _replaced(values: Tensor, mask: Tensor, how: str) -> Tensor:
    """Values [batch, position, d_model] with 0, or the mean of the row's, where the mask [batch, position] is true."""
    mask = mask.to(values.device)[..., None]
    if how == "zero":
        return values.masked_fill(mask, 0)
    mean = (values.float() * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
    return torch.where(mask, mean.to(values.dtype), values)


def _deepstack_edits(layer: int, how: str) -> list[Edit]:
    """Edits that replace what DeepStack adds after a layer, which is the difference between two sites."""
    before: list[Tensor] = []

    def keep(values: Tensor, calls: Calls) -> Tensor:
        before[:] = [values]
        return values

    def replace(values: Tensor, calls: Calls) -> Tensor:
        stream = before.pop().to(values.device)
        mask = calls.batch.image_mask.to(values.device)
        return torch.where(mask[..., None], stream + _replaced(values - stream, mask, how), values)

    return [
        Edit("resid_post", layer, keep, prefill_only=True),
        Edit("resid_pre", layer + 1, replace, prefill_only=True),
    ]


def _noise(batch: Batch, seed: int) -> Tensor:
    """Pixels of noise in the layout of the batch's, which does not depend on what else is in the batch."""
    pixels: Tensor = batch.extra["pixel_values"]
    sizes = batch.extra.get("image_sizes")
    grids: Tensor | None = batch.extra.get("image_grid_thw")
    if grids is not None:  # [patch of any image, channel x frame x pixel]
        width = pixels.shape[1] // (3 * batch.frames)
        drawn = [_draw(seed, int(count), 3, 1, width) for count in grids.prod(dim=-1).tolist()]
        return torch.cat([one.expand(-1, -1, batch.frames, -1).flatten(1) for one in drawn]).to(pixels)
    noise = torch.zeros(pixels.shape)
    if sizes is not None and pixels.ndim == 4:  # each image filled up with zeros to the size of the largest
        for number, (height, width) in enumerate(sizes):
            noise[number, :, :height, :width] = _draw(seed, pixels.shape[1], height, width)
        return noise.to(pixels)
    generator = torch.Generator().manual_seed(seed)
    for tile in noise.flatten(1, -4).unbind(1) if pixels.ndim > 4 else [noise]:
        tile.copy_(torch.randn(pixels.shape[-3:], generator=generator))
    return torch.where(filling_tiles(pixels), 0, noise.to(pixels))


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


DIFFUSION_STEPS = 1000
"""Of VCD's schedule, from the image (0) to noise (999)."""


def diffused(batch: Batch, step: int = 500, seed: int = 0) -> Batch:
    """The batch with Gaussian noise on its images, as a diffusion model would have put it on at a step (VCD).

    v' = sqrt(abar_T) v + sqrt(1 - abar_T) eps on the normalised pixels v, with abar_T the product of 1 - beta_t for t = 0 to T
    and beta_t = sigmoid(linspace(-6, 6, 1000))_t (0.005 - 1e-5) + 1e-5. (VCD: Leng et al., CVPR 2024, arXiv 2311.16922, with
    the schedule of its released code.)

    Args:
        batch: rows with images.
        step: T, 0 to 999.
        seed: of eps, which is drawn once, the same for all images of a size (see `image_free`, "noise").

    Raises:
        InputError: a row without an image, or a step outside the schedule.
    """
    check_diffusion_step(step)
    _check_images(batch)
    betas = torch.linspace(-6, 6, DIFFUSION_STEPS, dtype=torch.float64).sigmoid() * (0.005 - 1e-5) + 1e-5
    kept = float((1 - betas[: step + 1]).prod())
    pixels: Tensor = batch.extra["pixel_values"]
    return batch.with_pixels(math.sqrt(kept) * pixels + math.sqrt(1 - kept) * _noise(batch, seed))


def check_diffusion_step(step: int) -> None:
    """Refuse a step outside the schedule.

    Raises:
        InputError: not one of 0 to 999.
    """
    if not 0 <= step < DIFFUSION_STEPS:
        raise InputError(f"a diffusion step must be one of 0 to {DIFFUSION_STEPS - 1}, found {step!r}")


def only_tokens(batch: Batch, chosen: Sequence[Tensor], embedded: Tensor) -> Batch:
    """A batch with some image tokens alone: the others are taken out, so that rows get shorter and positions shift.

    The features of the kept tokens are put in at the input of the first block; no pixels are left. Where the model gives
    image tokens positions by row and column (Qwen-VL), the kept ones are counted as text is.

    Args:
        batch: rows with images.
        chosen: per row, int64 [kept], which image tokens are kept, numbered from 0 among the row's, in the order in which they
            are to stand; they stand where, in the prompt's order, the kept ones stood.
        embedded: [batch, image token, d_model], the inputs of the first block at image tokens: `resid_pre` of layer 0.

    Raises:
        InputError: a row without an image.
        UnsupportedError: a family that reads the image elsewhere than at the input of the first block: by cross-attention, or
            after several blocks (DeepStack).
    """
    _check_images(batch)
    if batch.cross_mask is not None or batch.deepstack_layers:
        how = "by cross-attention" if batch.cross_mask is not None else "in several layers (DeepStack)"
        raise UnsupportedError(f"this family reads the image {how}: it cannot be given some image tokens alone")
    features = [embedded[row, numbers.to(embedded.device)] for row, numbers in enumerate(chosen)]
    return batch.with_image_tokens(chosen, features)


def soft_prompt(batch: Batch, embeddings: Tensor) -> Batch:
    """A batch with given embeddings in the place of each image (the soft image prompt of LACING, arXiv 2411.12591).

    Rows change their length where the image had another number of tokens, and positions shift; no pixels are left. Where the
    model gives image tokens positions by row and column (Qwen-VL), these are counted as text is.

    Args:
        batch: rows with images.
        embeddings: [token, d_model], inputs of the first block (`resid_pre` of layer 0).

    Raises:
        InputError: a row without an image.
        UnsupportedError: a family that reads the image by cross-attention.
    """
    _check_images(batch)
    if batch.cross_mask is not None:
        raise UnsupportedError(
            "this family reads the image by cross-attention: it has no image embeddings for a soft prompt to replace"
        )
    slots = batch.with_image_slots(len(embeddings))
    n_images = (slots.image_mask.sum(dim=1) // len(embeddings)).tolist()
    return slots.with_features([embeddings.repeat(n, 1) for n in n_images])


def blocked(batch: Batch, anatomy: Anatomy, rho: float = 0.99, seed: int = 0) -> tuple[Batch, list[AttentionEdit]]:
    """A batch in which no position attends to the image, but for a few image tokens (BDHS: Amirloo et al., arXiv 2407.02477).

    For the i-th image token of a row a number rho_i is drawn evenly from [0, 1), the same for all rows; tokens of rho_i < rho
    are hidden in all heads of all layers, before the softmax, at prefill and in every decode step, from text and from other
    image tokens alike. Each keeps its attention to itself, so that no position is left with nothing to attend to. Whether the
    paper hides image tokens from one another as well is not known to us.

    Args:
        batch: rows with images.
        anatomy: of the model.
        rho: 0.99, the paper's, leaves 1 in 100; 0 hides none; 1 all.
        seed: of the draw.

    Returns:
        The batch to run, and the edits to run it with.

    Raises:
        InputError: a row without an image, or rho out of range.
        UnsupportedError: a family that reads the image by cross-attention.
    """
    check_rho(rho)
    _check_images(batch)
    if batch.cross_mask is not None:
        raise UnsupportedError(
            "this family reads the image by cross-attention: its text does not attend to image tokens among its positions, "
            "which could be blocked; use 'deleted' or 'noise'"
        )
    number = (batch.image_mask.cumsum(dim=1) - 1).clamp(min=0).cpu()
    # numpy's draws do not depend on how many are drawn after them
    drawn = torch.from_numpy(np.random.default_rng(seed).random(int(number.max()) + 1))
    hidden = batch.image_mask & (drawn[number] < rho).to(batch.device)
    return batch, knock_out(anatomy.layers("attention"), "all", hidden)


def check_rho(rho: float) -> None:
    """Refuse a share of blocked image tokens out of range.

    Raises:
        InputError: it is not between 0 and 1.
    """
    if not 0 <= rho <= 1:
        raise InputError(f"rho, the share of image tokens that are blocked, must be between 0 and 1, found {rho!r}")
