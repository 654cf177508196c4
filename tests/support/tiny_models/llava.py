"""Tiny models of the LLaVA families."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from slitlamp.vlm import VLM
from tiny_models.common import (
    IMAGE,
    MEAN_STD,
    clip_config,
    set_generation,
    text_config,
    text_sizes,
    tiny_tokenizer,
    vision_sizes,
    without_videos,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
)


def _siglip_config() -> SiglipVisionConfig:
    sizes = vision_sizes()
    sizes.pop("initializer_range")  # its own rule of initialisation
    return SiglipVisionConfig(**sizes)


def build_llava(seed: int = 0, *, chat: bool = False, siglip: bool = False, **text: Any) -> VLM:
    """A random LLaVA-1.5; with `siglip`, on a tower without CLS."""
    torch.manual_seed(seed)
    vision: Any = clip_config()
    if siglip:
        vision = _siglip_config()
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(**text),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if siglip else "default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    set_generation(model)
    image_processor = CLIPImageProcessorPil(
        size={"height": 16, "width": 16}, do_center_crop=False, crop_size={"height": 16, "width": 16}, **MEAN_STD
    )
    processor = LlavaProcessor(
        image_processor,
        tiny_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=0 if siglip else 1,
        chat_template=CHAT_TEMPLATE if chat else None,
    )
    return VLM.wrap(model, processor, "tiny-llava")


def build_llava_next(seed: int = 0) -> VLM:
    """A random LLaVA-NeXT with tiles of 16 px."""
    torch.manual_seed(seed)
    pinpoints = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]
    config = LlavaNextConfig(
        vision_config=clip_config(),
        text_config=text_config(),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=pinpoints,
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.image_newline)
    set_generation(model)
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints, **MEAN_STD
    )
    processor = LlavaNextProcessor(
        image_processor,
        tiny_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return VLM.wrap(model, processor, "tiny-llava-next")


def build_llava_onevision(seed: int = 0) -> VLM:
    """A random LLaVA-OneVision with tiles of 16 px on a tower without CLS; grids of more than 4 tiles are shrunk."""
    torch.manual_seed(seed)
    special = ("<image>", "<video>")
    pinpoints = [[16 * rows, 16 * columns] for rows in range(1, 5) for columns in range(1, 5)]
    config = LlavaOnevisionConfig(
        vision_config=_siglip_config(),
        text_config=Qwen2Config(**text_sizes(special)),
        image_token_index=IMAGE,
        video_token_index=IMAGE + 1,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
    )
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.image_newline)
    set_generation(model, special)
    processor = without_videos(LlavaOnevisionProcessor)(
        LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints, **MEAN_STD),
        tiny_tokenizer(special),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
    )
    return VLM.wrap(model, processor, "tiny-llava-onevision")


def build_vipllava(seed: int = 0) -> VLM:
    """A random VipLLaVA, whose projector reads three layers of the tower."""
    torch.manual_seed(seed)
    config = VipLlavaConfig(
        vision_config=clip_config(),
        text_config=text_config(),
        image_token_index=IMAGE,
        vision_feature_layer=[-1, -2, 1],
    )
    model = VipLlavaForConditionalGeneration(config).eval()
    set_generation(model)
    image_processor = CLIPImageProcessorPil(
        size={"height": 16, "width": 16}, do_center_crop=False, crop_size={"height": 16, "width": 16}, **MEAN_STD
    )
    processor = LlavaProcessor(
        image_processor,
        tiny_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return VLM.wrap(model, processor, "tiny-vipllava")


BUILDERS = {
    "llava": build_llava,
    "llava siglip": lambda: build_llava(siglip=True),
    "llava_next": build_llava_next,
    "llava_onevision": build_llava_onevision,
    "vipllava": build_vipllava,
}
