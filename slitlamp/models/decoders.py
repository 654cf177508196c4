"""Where the parts of each kind of text decoder are: one entry per `model_type` of a text configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slitlamp.errors import UnsupportedError, nearest
from slitlamp.models.blocks import Block

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Decoder:
    """Where the parts of a text decoder are, from the decoder's module.

    Attributes:
        block: the kind of its blocks, or (text configuration, layer) -> kind.
        blocks: path of the list of blocks.
        final_norm: path of the norm after the last block.
    """

    block: Block | Callable[[PreTrainedConfig, int], Block]
    blocks: str = "layers"
    final_norm: str = "norm"

    def block_of(self, config: PreTrainedConfig, layer: int) -> Block:
        """The kind of one block."""
        return self.block if isinstance(self.block, Block) else self.block(config, layer)


LLAMA = Block(
    attention="self_attn",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out_proj="self_attn.o_proj",
    attn_out="self_attn",
    ln1="input_layernorm",
    ln2="post_attention_layernorm",
    mlp_in="mlp.gate_proj",
    mlp_down="mlp.down_proj",
    mlp_out="mlp",
)
# a norm before and a norm after attention and MLP
GEMMA2 = replace(
    LLAMA, attn_out="post_attention_layernorm", ln2="pre_feedforward_layernorm", mlp_out="post_feedforward_layernorm"
)

COHERE = replace(LLAMA, ln2=None)  # attention and MLP side by side
_OPT = replace(
    LLAMA,
    out_proj="self_attn.out_proj",
    ln1="self_attn_layer_norm",
    ln2="final_layer_norm",
    mlp_in="fc1",
    mlp_down="fc2",
    mlp_out="fc2",
)


def _opt_block(config: PreTrainedConfig, layer: int) -> Block:
    if not config.do_layer_norm_before:
        raise UnsupportedError(
            "this OPT has its norms after attention and MLP (do_layer_norm_before=False, as opt-350m), so that no sum of "
            "parts is its residual stream; use another size of OPT"
        )
    return _OPT


_MLLAMA_CROSS = replace(
    LLAMA,
    attention="cross_attn",
    q="cross_attn.q_proj",
    k=None,  # keys and values are of the image's tokens, not of positions
    v=None,
    out_proj="cross_attn.o_proj",
    attn_out="cross_attn",
    attn_gate="tanh:cross_attn_attn_gate",
    mlp_out=None,  # multiplied by a mask of rows, too, which is no part of the model
    cross=True,
)


def _mllama_block(config: PreTrainedConfig, layer: int) -> Block:
    return _MLLAMA_CROSS if layer in config.cross_attention_layers else LLAMA


_LLAMA4 = replace(LLAMA, mlp_in="feed_forward.gate_proj", mlp_down="feed_forward.down_proj", mlp_out="feed_forward")
_LLAMA4_EXPERTS = replace(_LLAMA4, mlp_in=None, mlp_down=None)  # one hidden layer per expert


def _llama4_block(config: PreTrainedConfig, layer: int) -> Block:
    return _LLAMA4_EXPERTS if layer in config.moe_layers else _LLAMA4


DECODERS: dict[str, Decoder] = {
    "llama": Decoder(LLAMA),
    "mistral": Decoder(LLAMA),
    "qwen2": Decoder(LLAMA),
    "qwen3": Decoder(LLAMA),
    "cohere": Decoder(COHERE),
    "cohere2": Decoder(COHERE),
    "gemma": Decoder(LLAMA),
    "gemma2": Decoder(GEMMA2),
    "gemma3_text": Decoder(GEMMA2),
    "ministral3": Decoder(LLAMA),
    "llama4_text": Decoder(_llama4_block),
    "mllama_text_model": Decoder(_mllama_block),
    "opt": Decoder(_opt_block, final_norm="final_layer_norm"),
    "qwen2_vl_text": Decoder(LLAMA),
    "qwen2_5_vl_text": Decoder(LLAMA),
    "qwen3_vl_text": Decoder(LLAMA),
}


def decoder_of(config: PreTrainedConfig) -> Decoder:
    """The entry of a text decoder, from its configuration.

    Raises:
        UnsupportedError: no entry for this type of decoder, or an encoder-decoder.
    """
    model_type = str(getattr(config, "model_type", "?"))
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"the text model {model_type!r} is an encoder-decoder, whose answer is not a continuation of the prompt; slitlamp "
            "reads models whose text model is a decoder alone"
        )
    if model_type in DECODERS:
        return DECODERS[model_type]
    close = nearest(model_type, DECODERS) or sorted(DECODERS)
    raise UnsupportedError(
        f"slitlamp does not know the text decoder {model_type!r}. Nearest known: {', '.join(close)}. "
        "A new entry in DECODERS (slitlamp/models/decoders.py) must give the paths of a block's parts."
    )
