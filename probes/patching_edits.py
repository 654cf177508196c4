"""Corrupt runs, and activations of one run put into another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from probes.patching_places import boxes_of, measured_row
from slitlamp.decoding.views import image_free
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import Batch
from slitlamp.tracing import AnyEdit, Calls, Edit, Trace
from slitlamp.tracing.probe import Labels

Corrupt = Literal["noise", "mean", "object"]
CORRUPT: tuple[str, ...] = get_args(Corrupt)


def corrupted(
    short: Batch, how: Corrupt, labels: Labels | None, tokens: Sequence[int | None], seed: int
) -> tuple[Batch, Sequence[AnyEdit]]:
    """The batch with other images of the same number of tokens.

    Args:
        short: the batch cut before the measured token.
        how: "noise" (one image of Gaussian noise for all rows) or "mean" (image embeddings replaced by their mean), see
            `slitlamp.decoding.views.image_free`; "object": the pixels in the object's boxes are replaced by the mean colour
            outside of them.
        labels, tokens: of the batch; per row, the measured token.
        seed: of the noise.

    Raises:
        UnsupportedError: "object" where pixels are not those of one whole image per row.
    """
    if how != "object":
        return image_free(short, how, seed)
    pixels = short.extra.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or any(len(one) != 1 for one in short.images):
        raise UnsupportedError(
            "the object can be painted over where a row's pixels are one image; use 'noise' or 'mean'"
        )
    painted = pixels.clone()
    height, width = pixels.shape[-2:]
    for row, token in enumerate(tokens):
        boxes = boxes_of(measured_row(labels, row, token))
        inside = torch.zeros(height, width, dtype=torch.bool, device=pixels.device)
        for left, top, right, bottom in boxes:
            rows = slice(int(top * height), max(int(top * height) + 1, -int(-bottom * height // 1)))
            inside[rows, slice(int(left * width), max(int(left * width) + 1, -int(-right * width // 1)))] = True
        if boxes and not bool(inside.all()):
            painted[row] = torch.where(inside, pixels[row][:, ~inside].mean(dim=1)[:, None, None], pixels[row])
    return short.with_pixels(painted), []


def unpacked(trace: Trace, label: str, layer: int) -> Tensor:
    """A recording of all positions, put back to the positions of its batch: [batch, position, ...], 0 at padding."""
    batch, values = trace.batch, trace[label][layer]
    assert batch is not None
    whole = values.new_zeros(batch.size, batch.length, *values.shape[2:])
    whole[batch.real_mask.to(values.device)] = values[trace.mask(label).to(values.device)]
    return whole


def packed(mask: Tensor, trace: Trace, label: str) -> Tensor:
    """A mask of the positions of a batch, in the order of a recording of all of them."""
    batch, real = trace.batch, trace.mask(label)
    assert batch is not None
    found = torch.zeros_like(real)
    found[real] = mask.to(real.device)[batch.real_mask.to(real.device)]
    return found


def patch_positions(layer: int, source: Trace, mask: Tensor) -> list[AnyEdit]:
    """The residual stream after a block, at some positions, is that of another run.

    Args:
        layer: the block.
        source: the other run, with "resid_post" at all positions.
        mask: bool [batch, position].
    """
    values = unpacked(source, "resid_post", layer)

    def put(stream: Tensor, calls: Calls) -> Tensor:
        return torch.where(mask.to(stream.device)[..., None], values.to(stream), stream)

    return [Edit("resid_post", layer, put)]


def patch_head(layer: int, head: int, source: Trace) -> list[AnyEdit]:
    """The output of a head, at every position, is that of another run, with "z" at all positions."""
    values = unpacked(source, "z", layer)[:, :, head]

    def put(outputs: Tensor, calls: Calls) -> Tensor:
        changed = outputs.clone()
        changed[:, :, head] = values.to(outputs)
        return changed

    return [Edit("z", layer, put)]


def first_order(of: Trace, clean: Trace, corrupt: Trace, masks: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """gradient * (clean - corrupt), summed (attribution patching, Nanda 2023; Syed et al. 2023, arXiv 2310.10348).

    Args:
        of: the run whose gradients are taken: of the corrupt run they estimate what putting clean activations in does, of
            the clean run what is lost when corrupt ones are.
        clean, corrupt: the runs.
        masks: bool [batch, position] of every role.

    Returns:
        Of the residual stream by role [batch, role, layer], and of the heads [batch, layer, head], in float64.
    """
    gradients: Any = of.gradients
    if gradients is None:
        raise InputError("attribution patching needs a run with gradients")
    roles, heads = [], []
    for layer in clean["resid_post"].layers:
        difference = clean["resid_post"][layer].double() - corrupt["resid_post"][layer].double()
        each = (gradients["resid_post"][layer].double() * difference).sum(dim=-1)
        each = each.masked_fill(~clean.mask("resid_post").to(each.device), 0)
        chosen = [packed(mask, clean, "resid_post").to(each.device) for mask in masks.values()]
        roles.append(torch.stack([(each * one).sum(dim=1) for one in chosen], dim=1).cpu())
    for layer in clean["z"].layers:
        difference = clean["z"][layer].double() - corrupt["z"][layer].double()
        each = (gradients["z"][layer].double() * difference).sum(dim=-1)
        each = each.masked_fill(~clean.mask("z").to(each.device)[..., None], 0)
        heads.append(each.sum(dim=1).cpu())
    return torch.stack(roles, dim=2), torch.stack(heads, dim=1)
