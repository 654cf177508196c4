"""BLIP-2 and InstructBLIP: image tokens are queries that read the whole image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from slitlamp.models.patches import Patches

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def qformer_patches(
    config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool
) -> list[Patches]:
    """BLIP-2 and InstructBLIP: the queries of the Q-Former in their order; none has a place on the image."""
    nowhere = torch.full((int(config.num_query_tokens),), -1)
    zero = torch.zeros_like(nowhere)
    return [Patches(zero, nowhere, nowhere, zero, {}, n_tiles=1) for _ in range(n_images)]
