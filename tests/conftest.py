"""What holds for every test: no network, no package installed behind our back; and tiny random models of the real classes."""

from __future__ import annotations

import os
from typing import Any

# Before any test imports transformers or huggingface_hub, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
# transformer_lens runs `pip install torchvision` by itself when a processor fails to load; this makes that fail.
os.environ["PIP_NO_INDEX"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# transformer_lens runs `pip install torchvision` by itself when a processor fails to load; this makes that fail.
os.environ["PIP_NO_INDEX"] = "1"

import numpy as np
import PIL.Image
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from slitlamp.vlm import VLM

WORDS = "is there a dog cat in the image ? describe this . what where red blue it and USER: ASSISTANT: yes no".split()
CHAT_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
)
MEAN_STD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of a few words."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<pad>", "<s>", "</s>", "<unk>", "<image>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def text_config(**changes: Any) -> LlamaConfig:
    """A tiny Llama with grouped-query attention (4 query heads on 2 key/value heads)."""
    sizes = {
        "vocab_size": 5 + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,  # large enough that attention is far from uniform
    }
    return LlamaConfig(**{**sizes, **changes})


def clip_config() -> CLIPVisionConfig:
    """A tiny CLIP tower: 16 px, patches of 4: 16 patches and a CLS token."""
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        initializer_range=0.2,
    )


def _set_generation(model: Any) -> None:
    """End token 2; a random model may well emit image and padding tokens, which a trained one does not."""
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    model.generation_config.suppress_tokens = [0, 1, 4]


def build_llava(seed: int = 0, *, chat: bool = False, siglip: bool = False, **text: Any) -> VLM:
    """A random LLaVA-1.5; with `siglip`, on a tower without CLS."""
    torch.manual_seed(seed)
    vision: Any = clip_config()
    if siglip:
        vision = SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(**text),
        image_token_index=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if siglip else "default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    _set_generation(model)
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
        image_token_index=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=pinpoints,
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.model.image_newline)
    _set_generation(model)
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


def random_image(seed: int, width: int = 20, height: int = 16) -> PIL.Image.Image:
    """An image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


@pytest.fixture(scope="session", name="build_llava")
def build_llava_fixture() -> Any:
    """The function that builds a random LLaVA-1.5, for tests that need another configuration."""
    return build_llava


@pytest.fixture(scope="session")
def llava() -> VLM:
    return build_llava()


@pytest.fixture(scope="session")
def llava_chat() -> VLM:
    return build_llava(chat=True)


@pytest.fixture(scope="session")
def llava_siglip() -> VLM:
    return build_llava(siglip=True)


@pytest.fixture(scope="session")
def llava_next() -> VLM:
    return build_llava_next()


@pytest.fixture(params=["llava", "llava_siglip", "llava_next"])
def any_vlm(request: pytest.FixtureRequest) -> VLM:
    """Each family in turn."""
    vlm: VLM = request.getfixturevalue(request.param)
    return vlm


@pytest.fixture(scope="session")
def image() -> Any:
    """A function that makes an image of random pixels from a seed (and a size)."""
    return random_image


@pytest.fixture(scope="session")
def organism() -> VLM:
    """The embedded model."""
    return VLM.organism()
