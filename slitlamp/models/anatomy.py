"""The anatomy of a loaded VLM: its sizes and the modules that its family's entry names, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models.blocks import Place
from slitlamp.models.decoders import decoder_of
from slitlamp.models.families import Family, family_of
from slitlamp.models.towers import VisionTower, vision_tower_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Anatomy:
    """Sizes of a VLM and the paths of its modules.

    Attributes:
        family, tower: the entries of the family and of the vision tower.
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp, d_vocab: of the language model; `n_kv_heads < n_heads`
            means grouped-query attention.
        n_vision_layers, n_vision_heads, d_vision: of the vision tower.
        has_cls: whether the vision tower's first token is a CLS token.
        image_token_id: the id that marks image positions in `input_ids`.
        blocks, vision_blocks: module paths of every block.
        modules: the other module paths by role: `decoder`, `final_norm`, `head`, `vision_tower`, `projector`,
            and `generator`, whose `generate` makes the tokens.
        places: site -> layer -> where its values pass.
        attention_types: per layer, the kind of attention: `full_attention`, `sliding_attention`, `chunked_attention`,
            `cross_attention`.
        attention_softcap, logit_softcap: c of c tanh(x / c) on attention scores and on logits; None where there is none.
        deepstack_layers: layers after which features of the vision tower are added at image positions (DeepStack), so
            that `resid_pre` of the next layer is more than `resid_post` of this one.
    """

    family: Family
    tower: VisionTower
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
    places: Mapping[str, Mapping[int, Place]] = field(repr=False)
    attention_types: tuple[str, ...]
    attention_softcap: float | None
    logit_softcap: float | None
    deepstack_layers: tuple[int, ...]

    def __repr__(self) -> str:
        shared = f", {self.n_kv_heads} key/value heads" if self.n_kv_heads != self.n_heads else ""
        whole = {"logits": 1, "projector_out": 1}
        sites = [
            site if len(of) == whole.get(site, self.n_vision_layers if site.startswith("vision_") else self.n_layers)
            else f"{site} (in {len(of)} layers)"
            for site, of in sorted(self.places.items())
        ]  # fmt: skip
        return "\n  ".join(
            [
                f"Anatomy of a {self.family.name}",
                f"language model: {self.n_layers} layers of {self.n_heads} heads x {self.d_head}{shared}, "
                f"d_model {self.d_model}, d_mlp {self.d_mlp}, d_vocab {self.d_vocab}",
                f"vision tower: {self.n_vision_layers} layers of {self.n_vision_heads} heads, d_vision {self.d_vision}, "
                f"{'CLS' if self.has_cls else 'no CLS'}",
                f"sites: {', '.join(sites)}",
            ]
        )

    def layers(self, site: str) -> tuple[int, ...]:
        """The layers that have a site; () if none has."""
        return tuple(self.places.get(site, ()))

    def place(self, site: str, layer: int) -> Place:
        """Where the values of a site pass.

        Raises:
            UnsupportedError: this model, or this layer of it, has no such site.
        """
        if layer not in self.places.get(site, {}):
            having = self.layers(site)
            where = f"layers that have it: {list(having)}" if having else "no layer of this model has it"
            raise UnsupportedError(f"layer {layer} of this {self.family.name} has no {site!r}; {where}")
        return self.places[site][layer]

    def attention(self, layer: int) -> str:
        """Module path of a block's attention."""
        site = "cross_attention" if layer in self.places.get("cross_attention", {}) else "attention"
        return self.place(site, layer).path

    def out_proj(self, layer: int) -> str:
        """Module path of the projection that puts the heads of a block together."""
        return self.place("z", layer).path

    def mlp(self, layer: int) -> str:
        """Module path of what adds a block's MLP output to the residual stream."""
        return self.place("mlp_out", layer).path

    def vision_attention_of(self, layer: int) -> str:
        """Module path of a vision block's self-attention."""
        return self.place("vision_attention", layer).path


def _module(model: nn.Module, path: str, role: str, family: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedError(
            f"the {family} entry says that the {role} is at {path!r}, but this {type(model).__name__} has no such "
            f"module ({error}). Its children: {', '.join(name for name, _ in model.named_children())}."
        ) from error


def _first(model: nn.Module, paths: Sequence[str], role: str, family: str) -> str:
    """The first path that names a module."""
    for path in paths:
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    raise UnsupportedError(
        f"the {family} entry expects the {role} at one of {', '.join(paths)}, but this {type(model).__name__} has none of "
        f"them. Its children: {', '.join(name for name, _ in model.named_children())}."
    )


def _count(model: nn.Module, path: str, role: str, family: str) -> int:
    return len(list(_module(model, path, role, family).children()))


def _expect(found: int, expected: int, role: str, path: str) -> None:
    if found != expected:
        raise UnsupportedError(f"the configuration says {expected} {role}, but {path!r} holds {found}")


def read_anatomy(model: PreTrainedModel) -> Anatomy:
    """Find and check the parts of a model.

    Raises:
        UnsupportedError: the family, its text decoder or its vision tower has no entry, or an entry does not fit this
            model.
    """
    config = model.config
    family = family_of(config)
    text, vision = config.get_text_config(decoder=True), config.vision_config
    decoder, tower = decoder_of(text), vision_tower_of(vision)

    root = _first(model, family.decoder, "text decoder", family.name)
    n_layers = _count(model, f"{root}.{decoder.blocks}", "decoder blocks", family.name)
    _expect(n_layers, int(text.num_hidden_layers), "decoder blocks", f"{root}.{decoder.blocks}")
    blocks = tuple(f"{root}.{decoder.blocks}.{layer}" for layer in range(n_layers))

    tower_module = _module(model, family.vision_tower, "vision tower", family.name)
    stacks = [_first(tower_module, tower.blocks, "vision blocks", family.name)]
    stacks += [] if tower.more_blocks is None else [tower.more_blocks]
    stacked = {
        f"{family.vision_tower}.{stack}.{number}": tower.block
        if stack == stacks[0]
        else tower.more_block or tower.block
        for stack in stacks
        for number in range(_count(tower_module, stack, "vision blocks", family.name))
    }
    vision_blocks = tuple(stacked)
    vision_layers, vision_heads, vision_width = (int(getattr(vision, name)) for name in tower.sizes)
    if tower.more_blocks is None:
        _expect(len(vision_blocks), vision_layers, "vision blocks", f"{family.vision_tower}.{stacks[0]}")

    n_heads = int(text.num_attention_heads)
    n_kv_heads = int(getattr(text, "num_key_value_heads", None) or n_heads)
    modules = {
        "decoder": root,
        "final_norm": f"{root}.{decoder.final_norm}",
        "head": _first(model, family.head, "head", family.name),
        "vision_tower": family.vision_tower,
        "projector": family.projector,
        "generator": family.generator,
    }
    for role, path in modules.items():
        _module(model, path, role, family.name)
    for path in family.kept:
        owner, _, name = path.rpartition(".")
        if not hasattr(_module(model, owner, "owner of an attribute to keep", family.name), name):
            raise UnsupportedError(f"the {family.name} entry names {path!r}, which this {type(model).__name__} lacks")
    places: dict[str, dict[int, Place]] = {}
    for layer, block in enumerate(blocks):
        for site, place in decoder.block_of(text, layer).places(block, n_heads, n_kv_heads).items():
            places.setdefault(site, {})[layer] = place
    for layer, (block, kind) in enumerate(stacked.items()):
        for site, place in kind.places(block, vision_heads, vision_heads).items():
            places.setdefault(f"vision_{site}", {})[layer] = place
    places["projector_out"] = {0: Place(family.projector)}
    places["logits"] = {0: Place(family.generator)}
    d_head = int(getattr(text, "head_dim", None) or text.hidden_size // n_heads)
    _check_places(model, places, family.name, {"z": n_heads * d_head, "vision_z": vision_width})

    cross = places.get("cross_attention", {})
    types = getattr(text, "layer_types", None) or ["full_attention"] * n_layers
    return Anatomy(
        family=family,
        tower=tower,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_model=int(text.hidden_size),
        d_head=d_head,
        d_mlp=_mlp_width(text),
        d_vocab=int(text.vocab_size),
        n_vision_layers=len(vision_blocks),
        n_vision_heads=vision_heads,
        d_vision=vision_width,
        has_cls=tower.has_cls,
        image_token_id=_image_token_id(config),
        blocks=blocks,
        vision_blocks=vision_blocks,
        modules=modules,
        places=places,
        attention_types=tuple("cross_attention" if n in cross else str(one) for n, one in enumerate(types)),
        attention_softcap=getattr(text, "attn_logit_softcapping", None),
        logit_softcap=getattr(text, "final_logit_softcapping", None),
        deepstack_layers=tuple(range(len(getattr(vision, "deepstack_visual_indexes", None) or ()))),
    )


def _check_places(
    model: nn.Module, places: Mapping[str, Mapping[int, Place]], family: str, widths: Mapping[str, int]
) -> None:
    """Every place exists, and the heads that an output projection takes make up its width."""
    for site, by_layer in places.items():
        for place in by_layer.values():
            module = _module(model, place.path, site, family)
            if place.gate is not None:
                owner, _, name = place.gate.rpartition(".")
                if not hasattr(_module(model, owner, site, family), name):
                    raise UnsupportedError(f"the {family} entry names {place.gate!r}, which this model does not have")
            found, wanted = getattr(module, "in_features", None), widths.get(site)
            if wanted is not None and found is not None and found != wanted:
                raise UnsupportedError(f"{place.path} takes {found} features, but its heads make {wanted}")


def _mlp_width(text: PreTrainedConfig) -> int:
    # the first is that of Llama 4's layers without experts, whose hidden layer is a site
    names = ("intermediate_size_mlp", "intermediate_size", "ffn_dim", "n_inner")
    return next(int(getattr(text, name)) for name in names if getattr(text, name, None) is not None)


def _image_token_id(config: PreTrainedConfig) -> int:
    for name in ("image_token_id", "image_token_index"):
        value: Any = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise InputError("the configuration names no image token (image_token_id)")
