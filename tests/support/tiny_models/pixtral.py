"""Tiny Mistral 3, and a LLaVA on a Pixtral tower: images of any size, in patches of 4 px."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from slitlamp.vlm import VLM
from tiny_models.common import IMAGE, MEAN_STD, set_generation, text_sizes, tiny_tokenizer, vision_sizes

SPECIAL = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def _processor_class() -> Any:
    """`PixtralProcessor`, whose module takes one function from a module that needs torchvision; the PIL one has it too."""
    wanted = "transformers.models.pixtral.image_processing_pixtral"
    had = sys.modules.get(wanted)
    sys.modules[wanted] = image_processing_pil_pixtral
    try:
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor
    finally:
        if had is None:
            del sys.modules[wanted]
        else:
            sys.modules[wanted] = had
    return PixtralProcessor


def build(seed: int = 0, *, llava: bool = False) -> VLM:
    """A random Mistral 3, one token per 2 x 2 patches; with `llava`, a LLaVA as Pixtral 12B, one token per patch."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vision_config": PixtralVisionConfig(**vision_sizes(image_size=32)),
        "text_config": MistralConfig(**text_sizes(SPECIAL, head_dim=12, sliding_window=None)),
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    }
    model: Any
    if llava:
        model = LlavaForConditionalGeneration(LlavaConfig(**sizes, vision_feature_select_strategy="full")).eval()
    else:
        model = Mistral3ForConditionalGeneration(Mistral3Config(**sizes, spatial_merge_size=2)).eval()
    set_generation(model, SPECIAL)
    image_processor = PixtralImageProcessorPil(
        size={"longest_edge": 32}, patch_size={"height": 4, "width": 4}, **MEAN_STD
    )
    processor = _processor_class()(
        image_processor, tiny_tokenizer(SPECIAL), patch_size=4, spatial_merge_size=1 if llava else 2
    )
    return VLM.wrap(model, processor, "tiny-llava-pixtral" if llava else "tiny-mistral3")


BUILDERS: dict[str, Callable[[], VLM]] = {"mistral3": build, "llava pixtral": lambda: build(seed=1, llava=True)}
