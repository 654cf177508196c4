"""A tiny Llama 4: tiles of 16 px, each 2 x 2 tokens after a pixel shuffle of 2 x 2."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4Processor
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict

from slitlamp.vlm import VLM
from tiny_models.common import MEAN_STD, set_generation, text_sizes, tiny_tokenizer, token_id, vision_sizes

SPECIAL = (
    *("<|patch|>", "<|image|>", "<|image_start|>", "<|image_end|>"),
    *("<|tile_x_separator|>", "<|tile_y_separator|>"),
)
SIDE = 16


class ImageProcessor(PilBackend):
    """What `Llama4ImageProcessor` gives, which needs torchvision: tiles row by row, then the whole image.

    An image of up to 3 x 3 tiles is filled up with black to whole tiles; a larger one is made smaller first.
    """

    resample = PILImageResampling.BILINEAR

    def _preprocess(self, images: list[np.ndarray], **options: Any) -> BatchFeature:
        tiles, ratios = [], []
        for image in images:
            largest = max(image.shape[-2:])
            if largest > 3 * SIDE:
                height, width = (max(1, side * 3 * SIDE // largest) for side in image.shape[-2:])
                image = self.resize(image, SizeDict(height=height, width=width), self.resample)
            rows, columns = (math.ceil(side / SIDE) for side in image.shape[-2:])
            below, beside = rows * SIDE - image.shape[-2], columns * SIDE - image.shape[-1]
            whole = np.pad(image, ((0, 0), (0, below), (0, beside)))
            if rows * columns > 1:
                cut = whole.reshape(3, rows, SIDE, columns, SIDE).transpose(1, 3, 0, 2, 4)
                tiles += list(cut.reshape(-1, 3, SIDE, SIDE))
            tiles.append(self.resize(image, SizeDict(height=SIDE, width=SIDE), self.resample))
            ratios.append([rows, columns])
        pixels = [self.normalize(self.rescale(one, 1 / 255), self.image_mean, self.image_std) for one in tiles]
        data = {"pixel_values": np.stack(pixels), "aspect_ratios": np.array(ratios)}
        return BatchFeature(data, tensor_type=options["return_tensors"])


def build(seed: int = 0, *, chunk: int = 256) -> VLM:
    """A random Llama 4: experts in layer 1 alone, no rotary embedding in layer 2, the other layers attend within chunks.

    Args:
        seed: of the weights.
        chunk: how many positions a chunk has.
    """
    torch.manual_seed(seed)
    sizes = text_sizes(SPECIAL, head_dim=8, intermediate_size=24, intermediate_size_mlp=48)
    config = Llama4Config(
        vision_config=vision_sizes(
            vision_output_dim=32,
            projector_input_dim=32,
            projector_output_dim=32,
            intermediate_size=64,
            pixel_shuffle_ratio=0.5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        text_config={
            **sizes,
            "moe_layers": [1],
            "num_local_experts": 4,
            "no_rope_layers": [1, 1, 0],
            "attention_chunk_size": chunk,
        },
        image_token_index=token_id("<|patch|>", SPECIAL),
        boi_token_index=token_id("<|image_start|>", SPECIAL),
        eoi_token_index=token_id("<|image_end|>", SPECIAL),
    )
    model = Llama4ForConditionalGeneration(config).eval()
    set_generation(model, SPECIAL)
    processor = Llama4Processor(
        ImageProcessor(size={"height": SIDE, "width": SIDE}, **MEAN_STD),
        tiny_tokenizer(SPECIAL),
        patch_size=4,
        chat_template=None,
    )
    return VLM.wrap(model, processor, "tiny-llama4")


BUILDERS: dict[str, Callable[[], VLM]] = {"llama4": build}
