"""A LLaVA built by hand in which the answer takes one known way: from bright patches to the last position, in one head.

The residual stream has three directions that are used: 0, how bright an image token is (0 for all others); 1, what the last
position has read; 2, a constant. One head of one layer reads direction 0 by uniform attention and writes direction 1; all
else adds nothing. "yes" reads direction 1, "no" the constant. So an image with bright patches is answered "yes".
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import PIL.Image
import torch
from tiny_models.common import token_id
from tiny_models.llava import build_llava

from slitlamp.models import Batch
from slitlamp.vlm import VLM

YES, NO = token_id("yes"), token_id("no")
BOX = (0.25, 0.25, 0.75, 0.75)
"""Where the bright patches are: rows and columns 1 and 2 of 4."""


def planted_llava(layer: int = 1, head: int = 2, *, reads_image: bool = True) -> VLM:
    """The model; without `reads_image` the head writes nothing, and the answer is always "no"."""
    vlm = build_llava()
    model = vlm.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        tower = next(module for path, module in model.named_modules() if path.endswith("embeddings"))
        tower.patch_embedding.weight[0, 0].fill_(1 / 16)  # mean of the first channel: -2 dark, 2 bright
        tower.position_embedding.weight[:, 1] = 3.0  # a constant, so that the norm keeps the brightness
        projector = model.model.multi_modal_projector
        projector.linear_1.weight[0, 0] = 3.0
        projector.linear_2.weight[0, 0] = 1.0  # GELU: dark is 0
        projector.linear_2.bias[2] = 1.0
        model.get_input_embeddings().weight[:, 2] = 1.0
        attention = model.model.language_model.layers[layer].self_attn
        width = vlm.anatomy.d_head
        groups = vlm.anatomy.n_heads // vlm.anatomy.n_kv_heads
        attention.v_proj.weight[head // groups * width, 0] = 1.0
        if reads_image:
            attention.o_proj.weight[1, head * width] = 1.0
        model.lm_head.weight[:, 2] = -1.0
        model.lm_head.weight[YES, 2], model.lm_head.weight[YES, 1] = 0.0, 1.5
        model.lm_head.weight[NO, 2] = 0.5
    return vlm


def picture(bright: bool, seed: int = 0) -> PIL.Image.Image:
    """A dark image of 16 x 16 pixels, its middle bright or not; a little noise makes images differ."""
    pixels = np.random.default_rng(seed).integers(0, 8, (16, 16, 3), dtype=np.uint8)
    if bright:
        pixels[4:12, 4:12] += np.uint8(240)
    return PIL.Image.fromarray(pixels)


def asked(vlm: VLM, bright: list[bool], *, right: list[bool] | None = None) -> tuple[Batch, list[pd.DataFrame]]:
    """Questions about a dog, which is where the image is bright, with the model's answers and their labels."""
    batch = vlm.encode(
        images=[picture(one, seed) for seed, one in enumerate(bright)],
        prompts=[
            "<image> is there a dog in the image ?" if i % 2 else "<image> is there a dog ?" for i in range(len(bright))
        ],
        ids=[f"item{i}" for i in range(len(bright))],
    )
    answers = vlm.generate(batch, max_new_tokens=1).tokens
    labels = [
        pd.DataFrame(
            {
                "token": [0],
                "word": ["yes" if answer[0] == YES else "no"],
                "label": ["correct" if (answer[0] == YES) == one and (right is None or right[row]) else "wrong"],
                "category": ["dog"],
                "frequency": [0.5],
                "truth": ["yes" if one else "no"],
                "boxes": [[BOX] if one else []],
            }
        )
        for row, (answer, one) in enumerate(zip(answers, bright, strict=True))
    ]
    return batch.with_continuation(answers), labels
