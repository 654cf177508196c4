"""Maps over image tokens of what matters for an answer, from the model itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interventions.image_columns import prompt_of
from slitlamp.decoding.intervention import RunContext
from slitlamp.models import Batch
from slitlamp.models.patches import Patches
from slitlamp.tracing.sites import attention

PUBLISHED_LAYER, PUBLISHED_DEPTH = 14, 32
"""Of LLaVA-1.5-7B, 0-based, for `grad_att`."""


def default_layer(n_layers: int) -> int:
    """The layer as deep as LLaVA-1.5's 14 of 32 [?]."""
    return n_layers * PUBLISHED_LAYER // PUBLISHED_DEPTH


def grad_att(run: RunContext, layer: int) -> list[Tensor]:
    """Attention of the last token of the prompt to image tokens, times its positive gradient (ViCrop: Zhang et al., ICLR 2025,
    arXiv 2502.17422, `grad_att`).

    The mean over heads of A relu(dv / dA), with v the log-probability of the most probable first token of the answer and A the
    weights after the softmax. One forward and one backward pass, over the prompt alone.

    Args:
        run: with the batch; its continuation is left aside.
        layer: 0-based.

    Returns:
        Per row, float32 [image token].
    """
    batch = prompt_of(run.batch)
    site = attention(queries="last", keys="image", layers=layer)
    trace = run.trace(batch, [site], (), gradient_of=_confidence)
    assert trace.gradients is not None
    weights, slopes = (one["attention"][layer][:, :, 0].float() for one in (trace, trace.gradients))
    relevance = (weights * slopes.relu()).mean(dim=1)
    return [row[: len(places)] for row, places in zip(relevance, batch.patches, strict=True)]


def _confidence(output: Any) -> Tensor:
    """log p of each row's most probable next token, [batch]."""
    logits: Tensor = output.logits[:, -1]
    return logits.float().log_softmax(dim=-1).amax(dim=-1)


def blurred_noise(batch: Batch, seed: int) -> list[Tensor]:
    """A map that says nothing of the image: even noise on the grid of its tokens, each the mean of its 3 x 3 neighbours; the
    same for all images.

    Returns:
        Per row, float32 [image token]; 0 at tokens that stand for no patch.
    """
    return [_noise_at(places, seed).to(batch.device) for places in batch.patches]


def _noise_at(places: Patches, seed: int) -> Tensor:
    values = torch.zeros(len(places))
    for (image, view), grid in places.grids.items():
        noise = torch.rand(1, 1, *grid, generator=torch.Generator().manual_seed(seed))
        smooth = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1, count_include_pad=False)[0, 0]
        here = (places.image == image) & (places.view == view) & places.on_image
        values[here] = smooth[places.row[here], places.column[here]]
    return values
