"""The anatomy of a loaded VLM: its sizes and the modules that its family's entry names, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from slitlamp.errors import UnsupportedError
from slitlamp.models.families import Family, VisionTower, family_of, vision_tower_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Anatomy:
    """Sizes of a VLM and the paths of its modules.

    Attributes:
        family: the entry of the family.
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp, d_vocab: of the language model; `n_kv_heads < n_heads`
            means grouped-query attention.
        n_vision_layers, n_vision_heads, d_vision: of the vision tower.
        has_cls: whether the vision tower's first token is a CLS token.
        image_token_id: the id that marks image positions in `input_ids`.
        blocks, vision_blocks: module paths of every block.
        modules: the other module paths by role: `final_norm`, `head`, `vision_tower`, `projector`.
    """

    family: Family
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_vision_layers: int
    n_vision_heads: int
    d_vision: int
    has_cls: bool
    image_token_id: int
    blocks: tuple[str, ...]
    vision_blocks: tuple[str, ...]
    modules: dict[str, str]
    vision_attention: str

    def attention(self, layer: int) -> str:
        """Module path of a block's self-attention."""
        return f"{self.blocks[layer]}.{self.family.attention}"

    def out_proj(self, layer: int) -> str:
        """Module path of the projection that puts the heads of a block together."""
        return f"{self.attention(layer)}.{self.family.out_proj}"

    def mlp(self, layer: int) -> str:
        """Module path of a block's MLP."""
        return f"{self.blocks[layer]}.{self.family.mlp}"

    def vision_attention_of(self, layer: int) -> str:
        """Module path of a vision block's self-attention."""
        return f"{self.vision_blocks[layer]}.{self.vision_attention}"


def _module(model: nn.Module, path: str, role: str, family: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedError(
            f"the {family} entry says that the {role} is at {path!r}, but this {type(model).__name__} has no such "
            f"module ({error}). Its children: {', '.join(name for name, _ in model.named_children())}."
        ) from error


def read_anatomy(model: PreTrainedModel) -> Anatomy:
    """Find and check the parts of a model.

    Raises:
        UnsupportedError: the family or its vision tower has no entry, or the entry does not fit this model.
    """
    config = model.config
    family = family_of(config)
    text, vision = config.get_text_config(), config.vision_config
    tower: VisionTower = vision_tower_of(vision)

    tower_module = _module(model, family.vision_tower, "vision tower", family.name)
    vision_path = next((path for path in tower.blocks if _has(tower_module, path)), None)
    if vision_path is None:
        raise UnsupportedError(
            f"the {family.name} entry expects the vision blocks at one of {', '.join(tower.blocks)} "
            f"in {family.vision_tower!r}, but "
            f"its children are {', '.join(name for name, _ in tower_module.named_children())}"
        )
    vision_root = f"{family.vision_tower}.{vision_path}"
    n_layers = _count(model, family.blocks, "decoder blocks", family.name, int(text.num_hidden_layers))
    n_vision_layers = _count(model, vision_root, "vision blocks", family.name, int(vision.num_hidden_layers))
    n_heads = int(text.num_attention_heads)
    anatomy = Anatomy(
        family=family,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=int(getattr(text, "num_key_value_heads", None) or n_heads),
        d_model=int(text.hidden_size),
        d_head=int(getattr(text, "head_dim", None) or text.hidden_size // n_heads),
        d_mlp=int(text.intermediate_size),
        d_vocab=int(text.vocab_size),
        n_vision_layers=n_vision_layers,
        n_vision_heads=int(vision.num_attention_heads),
        d_vision=int(vision.hidden_size),
        has_cls=tower.has_cls,
        image_token_id=int(config.image_token_id),
        blocks=tuple(f"{family.blocks}.{layer}" for layer in range(n_layers)),
        vision_blocks=tuple(f"{vision_root}.{layer}" for layer in range(n_vision_layers)),
        modules={
            "final_norm": family.final_norm,
            "head": family.head,
            "vision_tower": family.vision_tower,
            "projector": family.projector,
        },
        vision_attention=tower.attention,
    )
    for role, path in anatomy.modules.items():
        _module(model, path, role, family.name)
    for layer in range(n_layers):
        _module(model, anatomy.mlp(layer), "MLP", family.name)
        projection = _module(model, anatomy.out_proj(layer), "output projection", family.name)
        width = getattr(projection, "in_features", None)
        if width is not None and width != n_heads * anatomy.d_head:
            raise UnsupportedError(
                f"{anatomy.out_proj(layer)} takes {width} features, but {n_heads} heads of {anatomy.d_head} "
                f"make {n_heads * anatomy.d_head}"
            )
    for layer in range(n_vision_layers):
        _module(model, anatomy.vision_attention_of(layer), "vision attention", family.name)
    return anatomy


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _count(model: nn.Module, path: str, role: str, family: str, expected: int) -> int:
    blocks = _module(model, path, role, family)
    found = len(list(blocks.children()))
    if found != expected:
        raise UnsupportedError(f"the configuration says {expected} {role}, but {path!r} holds {found}")
    return found
