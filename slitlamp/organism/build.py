"""The embedded model's architecture and processor, and how they are saved."""

import os
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from slitlamp.organism.scenes import IMAGE_SIZE
from slitlamp.organism.tokenizer import BOS, EOS, IMAGE, PAD, TOKEN_ID, VOCABULARY, build_tokenizer

PATCH_SIZE: Final = 8
N_IMAGE_TOKENS: Final = (IMAGE_SIZE // PATCH_SIZE) ** 2
IMAGE_MEAN: Final = 0.5
IMAGE_STD: Final = 0.25
VISION_FEATURE_LAYER: Final = -2
VISION_WIDTH: Final = 128
DEFAULT_WIDTH: Final = 192
"""Width of the decoder."""


def build_config(width: int = DEFAULT_WIDTH) -> LlavaConfig:
    """Configuration of the embedded LLaVA; `width` is the decoder's d_model, a multiple of 16."""
    if width <= 0 or width % 16:
        raise ValueError(f"width must be a positive multiple of 16 (8 heads of even size), found {width}")
    token_ids: dict[str, Any] = {
        "bos_token_id": TOKEN_ID[BOS],
        "eos_token_id": TOKEN_ID[EOS],
        "pad_token_id": TOKEN_ID[PAD],
    }
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        projection_dim=VISION_WIDTH,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **token_ids,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN_ID[IMAGE],
        image_seq_length=N_IMAGE_TOKENS,
        vision_feature_layer=VISION_FEATURE_LAYER,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        **token_ids,
    )


def build_model(seed: int, width: int = DEFAULT_WIDTH) -> LlavaForConditionalGeneration:
    """A freshly initialised float32 model; a pure function of its arguments, the global generator is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(build_config(width))
    model.generation_config = GenerationConfig(
        bos_token_id=TOKEN_ID[BOS],
        eos_token_id=TOKEN_ID[EOS],
        pad_token_id=TOKEN_ID[PAD],
        do_sample=False,
        max_new_tokens=80,
    )
    return model.eval()


def build_processor() -> LlavaProcessor:
    """The processor: 64-pixel PIL image processor without cropping, word-level tokenizer, 64 image tokens."""
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[IMAGE_MEAN] * 3,
        image_std=[IMAGE_STD] * 3,
    )
    tokenizer = build_tokenizer()
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def save_organism(model: LlavaForConditionalGeneration, processor: LlavaProcessor, path: str | Path) -> Path:
    """Write model and processor as a folder that plain `from_pretrained` loads; weights as fp16 safetensors.

    The folder appears whole or not at all: it is written beside its place and renamed. `model` is not changed.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists; remove it or choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    half = LlavaForConditionalGeneration(model.config).half()
    half.load_state_dict({name: tensor.half() for name, tensor in model.state_dict().items()})
    half.generation_config = model.generation_config
    half.save_pretrained(partial, safe_serialization=True)
    processor.save_pretrained(partial)
    partial.rename(path)
    return path
