"""A tiny Mllama: tiles of 16 px, up to 4 per image; its second layer and its fourth attend to the image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from slitlamp.vlm import VLM
from tiny_models.common import IMAGE, MEAN_STD, set_generation, text_sizes, tiny_tokenizer

CROSS_LAYERS = [1, 3]
SPECIAL = ("<|image|>", "<|python_tag|>")


def build(seed: int = 0) -> VLM:
    """A random Mllama with open gates."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(SPECIAL, start=False, extra_special_tokens={"image_token": "<|image|>"})
    vision = MllamaVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_global_layers=2,
        attention_heads=2,
        image_size=16,
        patch_size=4,
        max_num_tiles=4,
        intermediate_layers_indices=[0, 2],
        vision_output_dim=16 * 3,
        initializer_range=0.2,
    )
    config = MllamaConfig(
        vision_config=vision,
        text_config=MllamaTextConfig(**text_sizes(SPECIAL, num_hidden_layers=4), cross_attention_layers=CROSS_LAYERS),
        image_token_index=IMAGE,
    )
    model = MllamaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.numel() == 1:  # initialised shut, so that nothing would come of the image
            nn.init.uniform_(parameter, 0.5, 1.5)
    set_generation(model, SPECIAL)
    processor = MllamaProcessor(
        MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=4, **MEAN_STD), tokenizer
    )
    return VLM.wrap(model, processor, "tiny-mllama")


BUILDERS: dict[str, Callable[[], VLM]] = {"mllama": build}
