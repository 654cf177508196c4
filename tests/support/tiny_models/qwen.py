"""Tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size in patches of 4 px, one token for 2 x 2 of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from slitlamp.vlm import VLM
from tiny_models.common import MEAN_STD, set_generation, text_sizes, tiny_tokenizer, token_id, without_videos

SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
)
_VISION: dict[str, Any] = {
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.2,
}


def _build(model_class: Any, config_class: Any, processor_class: Any, *, chat: bool, **sizes: Any) -> VLM:
    """A model and its processor.

    Args:
        model_class, config_class, processor_class: of the family.
        chat: whether the processor has a chat template.
        sizes: arguments of the configuration.
    """
    config = config_class(
        **sizes,
        image_token_id=token_id("<|image_pad|>", SPECIAL),
        video_token_id=token_id("<|video_pad|>", SPECIAL),
        vision_start_token_id=token_id("<|vision_start|>", SPECIAL),
        vision_end_token_id=token_id("<|vision_end|>", SPECIAL),
    )
    model = model_class(config).eval()
    set_generation(model, SPECIAL)
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48},
        **MEAN_STD,
    )
    tokenizer = tiny_tokenizer(SPECIAL, start=False, bos_token=None)
    template = CHAT_TEMPLATE if chat else None
    processor = without_videos(processor_class)(image_processor, tokenizer, None, chat_template=template)
    return VLM.wrap(model, processor, f"tiny-{config.model_type}")


def _text(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return {**text_sizes(SPECIAL), "bos_token_id": None, "rope_parameters": rope, **changes}


def build_qwen2_vl(seed: int = 0, *, chat: bool = False) -> VLM:
    """A random Qwen2-VL."""
    torch.manual_seed(seed)
    return _build(
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig,
        Qwen2VLProcessor,
        chat=chat,
        text_config=_text(),
        vision_config={**_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    )


def build_qwen2_5_vl(seed: int = 0, *, chat: bool = False) -> VLM:
    """A random Qwen2.5-VL: the tower attends within windows of 2 x 2 image tokens in layers 0 and 2."""
    torch.manual_seed(seed)
    return _build(
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        chat=chat,
        text_config=_text(),
        vision_config={
            **_VISION,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 24,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    )


def build_qwen3_vl(seed: int = 0, *, chat: bool = False) -> VLM:
    """A random Qwen3-VL: features of the tower's layers 0 and 1 are added after text layers 0 and 1."""
    torch.manual_seed(seed)
    return _build(
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        Qwen3VLProcessor,
        chat=chat,
        text_config=_text(head_dim=8),
        vision_config={
            **_VISION,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 24,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    )


BUILDERS: dict[str, Callable[[], VLM]] = {
    "qwen2_vl": build_qwen2_vl,
    "qwen2_5_vl": build_qwen2_5_vl,
    "qwen3_vl": build_qwen3_vl,
}
