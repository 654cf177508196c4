"""Tiny models of BLIP-2 on OPT and of InstructBLIP on a Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    OPTConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig, Blip2VisionConfig
from transformers.models.instructblip.configuration_instructblip import (
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
)

from slitlamp.vlm import VLM
from tiny_models.common import (
    IMAGE,
    MEAN_STD,
    WORDS,
    set_generation,
    text_config,
    text_sizes,
    tiny_tokenizer,
    vision_sizes,
)

QUERIES = 5
QFORMER_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)


def _qformer_sizes() -> dict[str, Any]:
    return {
        "vocab_size": len(QFORMER_WORDS),
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "cross_attention_frequency": 1,
        "encoder_hidden_size": 16,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }


def _finished(model: Any) -> Any:
    """What the model initialises with zeros is made random, so that something comes of it."""
    torch.nn.init.normal_(model.query_tokens)
    for name, parameter in model.named_parameters():
        if name.endswith("qkv.bias"):
            torch.nn.init.normal_(parameter)
    set_generation(model.language_model)
    return model.eval()


def _image_processor() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(size={"height": 16, "width": 16}, **MEAN_STD)


def build_blip2(seed: int = 0) -> VLM:
    """A random BLIP-2 on an OPT."""
    torch.manual_seed(seed)
    sizes = text_sizes()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    ids = ("pad_token_id", "bos_token_id", "eos_token_id")
    text = OPTConfig(
        **{name: sizes[name] for name in (*names, *ids)},
        ffn_dim=sizes["intermediate_size"],
        word_embed_proj_dim=sizes["hidden_size"],
        init_std=0.2,
        dropout=0.0,
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**vision_sizes()),
        qformer_config=Blip2QFormerConfig(**_qformer_sizes()),
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    processor = Blip2Processor(
        _image_processor(),
        tiny_tokenizer(),
        num_query_tokens=QUERIES,
    )
    return VLM.wrap(_finished(Blip2ForConditionalGeneration(config)), processor, "tiny-blip2")


def build_instructblip(seed: int = 0) -> VLM:
    """A random InstructBLIP on a Llama."""
    torch.manual_seed(seed)
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**vision_sizes()),
        qformer_config=InstructBlipQFormerConfig(**_qformer_sizes()),
        text_config=text_config(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    processor = InstructBlipProcessor(
        _image_processor(),
        tiny_tokenizer(),
        BertTokenizer(vocab={word: number for number, word in enumerate(QFORMER_WORDS)}, do_lower_case=False),
        num_query_tokens=QUERIES,
    )
    return VLM.wrap(_finished(InstructBlipForConditionalGeneration(config)), processor, "tiny-instructblip")


BUILDERS: dict[str, Callable[[], VLM]] = {"blip-2": build_blip2, "instructblip": build_instructblip}
