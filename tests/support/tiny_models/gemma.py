"""Tiny PaliGemma (on Gemma, and on Gemma 2 with soft-capping and sliding windows) and Gemma 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from slitlamp.vlm import VLM
from tiny_models.common import IMAGE, MEAN_STD, set_generation, text_sizes, tiny_tokenizer, vision_sizes

SIDE = {"size": {"height": 16, "width": 16}, **MEAN_STD}
WINDOW = 8
"""Positions that a sliding layer sees: fewer than a prompt has, so that the window matters."""


def _vision() -> SiglipVisionConfig:
    return SiglipVisionConfig(**vision_sizes(vision_use_head=False))


def build_paligemma(seed: int = 0, *, second: bool = False) -> VLM:
    """A random PaliGemma with 16 tokens per image; `second`: PaliGemma 2."""
    torch.manual_seed(seed)
    special = ("<image>", "\n")
    tokenizer = tiny_tokenizer(special, start=False, extra_special_tokens={"image_token": "<image>"})
    image_processor = SiglipImageProcessorPil(**SIDE)
    image_processor.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor, tokenizer)  # adds tokens of its own to the tokenizer
    sizes: dict[str, Any] = text_sizes(vocab_size=len(tokenizer), head_dim=8)
    text = (
        Gemma2Config(
            **sizes,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        )
        if second
        else GemmaConfig(**sizes)
    )
    config = PaliGemmaConfig(
        vision_config=_vision(),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=32,
    )
    model = PaliGemmaForConditionalGeneration(config).eval()
    set_generation(model, special)
    return VLM.wrap(model, processor, "tiny-paligemma2" if second else "tiny-paligemma")


def build_gemma3(seed: int = 0) -> VLM:
    """A random Gemma 3 with 4 tokens per image, of 4 patches each; its second layer attends in full."""
    torch.manual_seed(seed)
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    special = (*named.values(), "\n", "\n\n")
    tokenizer = tiny_tokenizer(special, extra_special_tokens=named)
    text = Gemma3TextConfig(
        **text_sizes(special, head_dim=12),  # heads wider together than the model
        query_pre_attn_scalar=8,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    config = Gemma3Config(
        vision_config=_vision(),
        text_config=text,
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    set_generation(model, special)
    processor = Gemma3Processor(Gemma3ImageProcessorPil(**SIDE), tokenizer, image_seq_length=4)
    return VLM.wrap(model, processor, "tiny-gemma3")


BUILDERS: dict[str, Callable[[], VLM]] = {
    "paligemma": build_paligemma,
    "paligemma gemma2": lambda: build_paligemma(second=True),
    "gemma3": build_gemma3,
}
