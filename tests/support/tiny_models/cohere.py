"""A tiny Aya Vision: tiles of 16 px, up to 4 per image, 2 x 2 patches to a token, on a Cohere 2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Cohere2Config,
    SiglipVisionConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from slitlamp.vlm import VLM
from tiny_models.common import IMAGE, MEAN_STD, set_generation, text_sizes, tiny_tokenizer, vision_sizes

SPECIAL = (
    "<|IMG_PATCH|>",
    "<image>",
    "<|START_OF_IMG|>",
    "<|END_OF_IMG|>",
    "TILE_GLOBAL",
    *(f"TILE_{number}" for number in range(1, 5)),
)


def build(seed: int = 0) -> VLM:
    """A random Aya Vision; layers 0 and 1 of its decoder see 8 positions back, layer 2 all."""
    torch.manual_seed(seed)
    sizes = vision_sizes()
    sizes.pop("initializer_range")  # its own rule of initialisation
    text = Cohere2Config(
        **text_sizes(SPECIAL),
        logit_scale=0.25,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**sizes),
        text_config=text,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        downsample_factor=2,
        image_token_index=IMAGE,
    )
    model = AyaVisionForConditionalGeneration(config).eval()
    set_generation(model, SPECIAL)
    processor = AyaVisionProcessor(
        GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, max_patches=4, **MEAN_STD),
        tiny_tokenizer(SPECIAL),
        patch_size=4,
        img_size=16,
        downsample_factor=2,
    )
    return VLM.wrap(model, processor, "tiny-aya-vision")


BUILDERS: dict[str, Callable[[], VLM]] = {"aya_vision": build}
