"""What is run: a random LLaVA of 8 layers and hidden size 512, the embedded model, and their prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from slitlamp import VLM
from slitlamp.models import Batch

PAD, START, END, UNKNOWN, IMAGE = range(5)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")


def random_llava(
    *, layers: int = 8, width: int = 512, heads: int = 8, mlp: int = 1408, words: int = 995, side: int = 24
) -> VLM:
    """A random LLaVA-1.5 whose images make `side` x `side` tokens, as the real one's make 24 x 24.

    Its vision tower is small on purpose: what the tower takes is the same with and without recording, and would only
    hide what recording costs.
    """
    torch.manual_seed(0)
    patch = 14
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=patch * side,
        patch_size=patch,
    )
    text = LlamaConfig(
        vocab_size=len(SPECIAL) + words,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=16384,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
        initializer_range=0.05,  # large enough that attention is not uniform
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2)
    config.architectures = ["LlavaForConditionalGeneration"]  # the TransformerBridge finds its adapter by this
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, END
    model.generation_config.suppress_tokens = [PAD, START, IMAGE]
    size = {"height": vision.image_size, "width": vision.image_size}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        _tokenizer(words),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return VLM.wrap(model, processor, f"random LLaVA, {layers} layers x {width}")


def _tokenizer(words: int) -> PreTrainedTokenizerFast:
    tokens = [*SPECIAL, *(f"w{number}" for number in range(words))]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def prompt(vlm: VLM, images: int, length: int, rows: int = 1) -> Batch:
    """Rows of that many positions: images of random pixels, then random words."""
    rng = np.random.default_rng(0)
    side = vlm.model.config.vision_config.image_size
    per_image = (side // vlm.model.config.vision_config.patch_size) ** 2
    n_words = length - 1 - images * per_image
    pixels, texts = [], []
    for _ in range(rows):
        pixels.append(
            [PIL.Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(images)]
        )
        numbers = rng.integers(0, vlm.model.config.text_config.vocab_size - len(SPECIAL), n_words)
        texts.append(" ".join(["<image>"] * images + [f"w{number}" for number in numbers]))
    batch = vlm.encode(pixels, texts)
    assert batch.lengths == [length] * rows
    return batch


def scene(vlm: VLM) -> Batch:
    """One scene of the embedded model's data set, with the prompt that asks for a description."""
    import slitlamp as sl

    item = sl.load_dataset("emoji_scenes/captions").take(1).items[0]
    return vlm.encode([item.image], [item.prompt])


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: on the command line.
        title: in table and figure.
        model: makes the model.
        batch: makes the batch.
        new_tokens: generated after the prompt; 0 for one forward pass.
        target: largest time of slitlamp over the plain run; None where no figure was promised.
    """

    name: str
    title: str
    model: Callable[..., VLM]
    batch: Callable[[VLM], Batch]
    new_tokens: int = 0
    target: float | None = None

    def options(self, batch: Batch) -> dict[str, Any]:
        """Arguments of `generate` that give exactly `new_tokens` tokens."""
        return {"max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens}


CASES = {
    one.name: one
    for one in (
        Case("prefill-600", "prefill, 600 tokens", random_llava, lambda vlm: prompt(vlm, 1, 600), target=1.10),
        Case("prefill-3000", "prefill, 3,000 tokens", random_llava, lambda vlm: prompt(vlm, 5, 3000), target=1.05),
        Case("prefill-8000", "prefill, 8,000 tokens", random_llava, lambda vlm: prompt(vlm, 13, 8000)),
        Case("decode-600", "600 tokens, then 64 decoded", random_llava, lambda vlm: prompt(vlm, 1, 600), 64, 1.10),
        Case("decode-embedded", "embedded model, 64 decoded", VLM.organism, scene, 64, 1.25),
    )
}
