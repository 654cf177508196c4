"""A tiny InternVL: tiles of 16 px, up to 4 per image, 2 x 2 patches to a token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor, Qwen2Config
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

from slitlamp.vlm import VLM
from tiny_models.common import IMAGE, MEAN_STD, set_generation, text_sizes, tiny_tokenizer, vision_sizes, without_videos

SPECIAL = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>")


def build(seed: int = 0) -> VLM:
    """A random InternVL on a Qwen2, its tower with norms of queries and keys."""
    torch.manual_seed(seed)
    vision = vision_sizes(image_size=[16, 16], patch_size=[4, 4], use_qk_norm=True, attention_bias=True)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision, use_absolute_position_embeddings=True),
        text_config=Qwen2Config(**text_sizes(SPECIAL)),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    model = InternVLForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "lambda_" in name or "position_embeddings" in name or "cls_token" in name:
            torch.nn.init.normal_(parameter)
    set_generation(model, SPECIAL)
    named = {
        "context_image_token": "<IMG_CONTEXT>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "video_token": "<video>",
    }
    processor = without_videos(InternVLProcessor)(
        GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=4, **MEAN_STD),
        tiny_tokenizer(SPECIAL, extra_special_tokens=named),
        image_seq_length=4,
    )
    return VLM.wrap(model, processor, "tiny-internvl")


BUILDERS: dict[str, Callable[[], VLM]] = {"internvl": build}
