"""Where the parts of each kind of vision tower are: one entry per `model_type` of a vision configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from slitlamp.errors import UnsupportedError, nearest
from slitlamp.models.blocks import Block
from slitlamp.models.patches_llama4 import llama4_unpack
from slitlamp.models.patches_mllama import mllama_unpack
from slitlamp.models.patches_pixtral import pixtral_unpack
from slitlamp.models.patches_qwen import qwen2_5_unpack, qwen_unpack

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Unpack = Callable[["PreTrainedConfig", Mapping[str, Any], bool], list[Tensor]]
"""(model configuration, inputs of the model, whether after the projector) -> per tile, int64 [position], where its positions
are in the sequence that the tower (or the projector) runs over, in raster order."""


@dataclass(frozen=True)
class VisionTower:
    """Where the parts of a vision tower are, from the tower's module.

    Attributes:
        blocks: paths that name the list of blocks in the transformers versions that are supported; the first that
            exists is used.
        block: the kind of its blocks.
        has_cls: whether the first token of a tile is a CLS token.
        more_blocks: path of a second list of blocks that the output of the first goes through.
        more_block: the kind of those, where it is another.
        unpack: for towers that run over all tiles of a batch as one sequence; None for towers that run over
            [tile, position].
        sizes: names in the configuration of the number of layers, of heads, and of the width.
    """

    blocks: tuple[str, ...]
    block: Block
    has_cls: bool
    more_blocks: str | None = None
    more_block: Block | None = None
    unpack: Unpack | None = None
    sizes: tuple[str, str, str] = ("num_hidden_layers", "num_attention_heads", "hidden_size")


CLIP = Block(
    attention="self_attn",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out_proj="self_attn.out_proj",
    attn_out="self_attn",
    ln1="layer_norm1",
    ln2="layer_norm2",
    mlp_in="mlp.fc1",
    mlp_down="mlp.fc2",
    mlp_out="mlp",
)
_PIXTRAL = Block(
    attention="attention",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    out_proj="attention.o_proj",
    attn_out="attention",
    ln1="attention_norm",
    ln2="ffn_norm",
    mlp_in="feed_forward.gate_proj",
    mlp_down="feed_forward.down_proj",
    mlp_out="feed_forward",
)
_MLLAMA = replace(CLIP, out_proj="self_attn.o_proj", ln1="input_layernorm", ln2="post_attention_layernorm")
_QWEN2 = Block(
    attention="attn",
    qkv="attn.qkv",
    out_proj="attn.proj",
    attn_out="attn",
    ln1="norm1",
    ln2="norm2",
    mlp_in="mlp.fc1",
    mlp_down="mlp.fc2",
    mlp_out="mlp",
)
_QWEN2_5 = replace(_QWEN2, mlp_in="mlp.gate_proj", mlp_down="mlp.down_proj")
_QWEN3 = replace(_QWEN2, mlp_in="mlp.linear_fc1", mlp_down="mlp.linear_fc2")
_BLIP = replace(CLIP, q=None, k=None, v=None, qkv="self_attn.qkv", out_proj="self_attn.projection")
_INTERNVL = Block(
    attention="attention",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    out_proj="attention.projection_layer",
    attn_out="attention",
    attn_gate="lambda_1",
    ln1="layernorm_before",
    ln2="layernorm_after",
    mlp_in="mlp.fc1",
    mlp_down="mlp.fc2",
    mlp_out="mlp",
    mlp_gate="lambda_2",
)
_QWEN_SIZES = ("depth", "num_heads", "hidden_size")
_CLIP_BLOCKS = ("encoder.layers", "vision_model.encoder.layers")

VISION_TOWERS: dict[str, VisionTower] = {
    "clip_vision_model": VisionTower(_CLIP_BLOCKS, CLIP, has_cls=True),
    "siglip_vision_model": VisionTower(_CLIP_BLOCKS, CLIP, has_cls=False),
    "blip_2_vision_model": VisionTower(("encoder.layers",), _BLIP, has_cls=True),
    "instructblip_vision_model": VisionTower(("encoder.layers",), _BLIP, has_cls=True),
    "internvl_vision": VisionTower(("encoder.layer",), _INTERNVL, has_cls=True),
    "idefics3_vision": VisionTower(("encoder.layers",), CLIP, has_cls=False),
    "smolvlm_vision": VisionTower(("encoder.layers",), CLIP, has_cls=False),
    "pixtral": VisionTower(("transformer.layers",), _PIXTRAL, has_cls=False, unpack=pixtral_unpack),
    "mllama_vision_model": VisionTower(
        ("transformer.layers",),
        _MLLAMA,
        has_cls=True,
        more_blocks="global_transformer.layers",
        more_block=replace(_MLLAMA, attn_gate="tanh:gate_attn", mlp_gate="tanh:gate_ffn"),
        unpack=mllama_unpack,
    ),
    "llama4_vision_model": VisionTower(("model.layers",), _MLLAMA, has_cls=True, unpack=llama4_unpack),
    "qwen2_vl_vision": VisionTower(
        ("blocks",), _QWEN2, has_cls=False, unpack=qwen_unpack, sizes=("depth", "num_heads", "embed_dim")
    ),
    "qwen2_5_vl_vision": VisionTower(("blocks",), _QWEN2_5, has_cls=False, unpack=qwen2_5_unpack, sizes=_QWEN_SIZES),
    "qwen3_vl_vision": VisionTower(("blocks",), _QWEN3, has_cls=False, unpack=qwen_unpack, sizes=_QWEN_SIZES),
}


def vision_tower_of(config: PreTrainedConfig) -> VisionTower:
    """The entry of a vision tower, from its configuration.

    Raises:
        UnsupportedError: no entry for this type of tower.
    """
    model_type = str(getattr(config, "model_type", "?"))
    if model_type in VISION_TOWERS:
        return VISION_TOWERS[model_type]
    close = nearest(model_type, VISION_TOWERS) or sorted(VISION_TOWERS)
    raise UnsupportedError(
        f"slitlamp does not know the vision tower {model_type!r}. Nearest known: {', '.join(close)}. "
        "A new entry in VISION_TOWERS (slitlamp/models/towers.py) must give the path of its blocks, the paths of a "
        "block's parts, and whether it has a CLS token."
    )
