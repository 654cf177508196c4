"""What the builders of tiny models share: a tokenizer of a few words, sizes, generation settings, random images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

WORDS = "is there a dog cat in the image ? describe this . what where red blue it and USER: ASSISTANT: yes no".split()
PAD, START, END, UNKNOWN, IMAGE = range(5)  # ids; further special tokens follow, then the words
BASE_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
MEAN_STD: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}


def vocab_size(special: Sequence[str] = ("<image>",)) -> int:
    """How many ids the tokenizer with these special tokens has."""
    return len(BASE_TOKENS) + len(special) + len(WORDS)


def token_id(token: str, special: Sequence[str] = ("<image>",)) -> int:
    """The id of a token of the tokenizer with these special tokens."""
    return [*BASE_TOKENS, *special, *WORDS].index(token)


def tiny_tokenizer(
    special: Sequence[str] = ("<image>",), *, start: bool = True, **options: Any
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: <pad>, <s>, </s>, <unk>, then the special tokens from id 4, then a few words.

    Args:
        special: tokens that are found in a text also without spaces around them; the image token first (id 4).
        start: whether a text is given a start token.
        options: of the tokenizer's class, for example `extra_special_tokens={"image_token": "<image>"}` where a processor
            reads `tokenizer.image_token`.
    """
    tokens = [*BASE_TOKENS, *special, *WORDS]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if start:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (*BASE_TOKENS, *special)])
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**named, **options})


def text_sizes(special: Sequence[str] = ("<image>",), **changes: Any) -> dict[str, Any]:
    """Arguments of a tiny text configuration with grouped-query attention: 3 layers, 4 query heads on 2 key/value heads.

    Args:
        special: the special tokens of its tokenizer.
        changes: what is to be different.
    """
    sizes = {
        "vocab_size": vocab_size(special),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
        "initializer_range": 0.2,  # large enough that attention is far from uniform
    }
    return {**sizes, **changes}


def vision_sizes(**changes: Any) -> dict[str, Any]:
    """Arguments of a tiny vision configuration: 3 layers, 2 heads, 16 px in patches of 4 px."""
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "initializer_range": 0.2,
    }
    return {**sizes, **changes}


def text_config(**changes: Any) -> LlamaConfig:
    """A tiny Llama (`text_sizes`)."""
    return LlamaConfig(**text_sizes(**changes))


def clip_config(**changes: Any) -> CLIPVisionConfig:
    """A tiny CLIP tower: 16 patches and a CLS token."""
    return CLIPVisionConfig(**vision_sizes(**changes))


def set_generation(model: Any, special: Sequence[str] = ("<image>",)) -> None:
    """End token 2; a random model may well emit image and padding tokens, which a trained one does not."""
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, END
    ids = range(len(BASE_TOKENS), len(BASE_TOKENS) + len(special))
    model.generation_config.suppress_tokens = [PAD, START, *ids]


def without_videos(processor_class: Any) -> Any:
    """A processor's class that takes no processor of videos, which would need torchvision."""

    class Processor(processor_class):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name != "video_processor":
                return super().check_argument_for_proper_class(argument_name, argument)
            return None

    Processor.__name__ = Processor.__qualname__ = processor_class.__name__
    return Processor


def random_image(seed: int, width: int = 20, height: int = 16) -> PIL.Image.Image:
    """An image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)
