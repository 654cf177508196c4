"""Tiny Idefics3 and SmolVLM: tiles of 16 px, each 2 x 2 tokens after a pixel shuffle of 2 x 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

from slitlamp.vlm import VLM
from tiny_models.common import IMAGE, MEAN_STD, set_generation, text_sizes, tiny_tokenizer, vision_sizes

SPECIAL = (
    "<image>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "\n",
    "\n\n",
)
SIZES = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}, **MEAN_STD}


def _smolvlm_processor(tokenizer: Any) -> Any:
    """A `SmolVLMProcessor` without what only videos need: num2words to spell numbers, and torchvision's video classes."""

    class Processor(processing_smolvlm.SmolVLMProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(argument)
            return super().check_argument_for_proper_class(argument_name, argument)

    had, processing_smolvlm.num2words = processing_smolvlm.num2words, str
    try:
        return Processor(SmolVLMImageProcessorPil(**SIZES), tokenizer, SmolVLMVideoProcessor(), image_seq_len=4)
    finally:
        processing_smolvlm.num2words = had


def build(seed: int = 0, *, smol: bool = False) -> VLM:
    """A random Idefics3, or SmolVLM, whose images become up to 3 x 3 tiles and the whole image."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(SPECIAL)
    sizes: dict[str, Any] = {
        "vision_config": vision_sizes(),
        "text_config": LlamaConfig(**text_sizes(SPECIAL)),
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "pad_token_id": 0,
    }
    model: Any
    processor: Any
    if smol:
        model = SmolVLMForConditionalGeneration(SmolVLMConfig(**sizes)).eval()
        processor = _smolvlm_processor(tokenizer)
    else:
        model = Idefics3ForConditionalGeneration(Idefics3Config(**sizes)).eval()
        processor = Idefics3Processor(Idefics3ImageProcessorPil(**SIZES), tokenizer, image_seq_len=4)
    set_generation(model, SPECIAL)
    return VLM.wrap(model, processor, "tiny-smolvlm" if smol else "tiny-idefics3")


BUILDERS: dict[str, Callable[[], VLM]] = {"idefics3": build, "smolvlm": lambda: build(smol=True)}
