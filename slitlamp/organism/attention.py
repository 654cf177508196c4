"""Attention for training on CPU: batched matrix products and a softmax.

At the embedded model's sizes (heads of 24 channels, rows of about 200 positions, a mask) this takes half the time
of torch's fused CPU kernel, whose backward pass dominates a training step. The result is the same function.
"""

from typing import Final

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlavaForConditionalGeneration
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION: Final = "slitlamp_organism_bmm"


def bmm_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention under an additive mask.

    Takes `[batch, head, position, channel]`, returns `[batch, position, head, channel]` and no weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scale, key.transpose(-1, -2))
    if attention_mask is not None:
        scores = scores.add_(attention_mask)
    return torch.matmul(torch.softmax(scores, dim=-1), value).transpose(1, 2).contiguous(), None


def use_training_attention(model: LlavaForConditionalGeneration) -> None:
    """Switch both towers of `model` to the training kernel."""
    AttentionInterface.register(IMPLEMENTATION, bmm_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)
