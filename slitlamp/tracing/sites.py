"""Sites: the places in a VLM that can be recorded or edited, and what to record there.

Short constructors (`resid_post(layers=[2, 4], positions="image")`) describe one recording. Layers are 0-based;
`resid_post[l]` is the residual stream after block l, `resid_pre[0]` the input of the language model with the projected
image features in place. What every block adds up to: `resid_mid = resid_pre + attn_out` and
`resid_post = resid_mid + mlp_out` (`resid_post = resid_pre + attn_out + mlp_out` where attention and MLP stand side by
side, as in Cohere's models, which have no `resid_mid`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol, cast

import numpy as np
from torch import Tensor

from slitlamp.errors import unknown

Positions = (
    Literal["all", "image", "text", "text_after_image", "last", "generated", "before_generated", "cls", "patches"]
    | Tensor
)
Reduction = Literal["mean", "sum"]

TEXT_POSITIONS = ("all", "image", "text", "text_after_image", "last", "generated", "before_generated")
VISION_POSITIONS = ("all", "cls", "patches")

_CANONICAL = {
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "q": "blocks.{layer}.attn.hook_q",
    "k": "blocks.{layer}.attn.hook_k",
    "v": "blocks.{layer}.attn.hook_v",
    "z": "blocks.{layer}.attn.hook_z",
    "mlp_pre": "blocks.{layer}.mlp.hook_pre",
    "mlp_post": "blocks.{layer}.mlp.hook_post",
    "attention": "blocks.{layer}.attn.hook_pattern",
    "ln1": "blocks.{layer}.ln1.hook_out",
    "ln2": "blocks.{layer}.ln2.hook_out",
}

_WIDTHS = {
    "q": ("head", "d_head"),
    "k": ("head", "d_head"),
    "v": ("head", "d_head"),
    "z": ("head", "d_head"),
    "mlp_pre": ("d_mlp",),
    "mlp_post": ("d_mlp",),
    "logits": ("d_vocab",),
}
_KEYS = {"attention": "image", "cross_attention": "image", "vision_attention": "patches"}
"""The keys that the constructors take unless they are told otherwise."""
_QUERIES = {"vision_attention": "cls"}
_BLOCK_STATES = (
    *("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"),
    *("ln1", "ln2", "q", "k", "v", "z", "mlp_pre", "mlp_post"),
)

VISION_SITES = (*(f"vision_{name}" for name in _BLOCK_STATES), "vision_attention", "projector_out")
ATTENTION_SITES = ("attention", "cross_attention", "vision_attention")
STATE_SITES = (*_BLOCK_STATES, "logits", *(name for name in VISION_SITES if name not in ATTENTION_SITES))
SITES = STATE_SITES + ATTENTION_SITES
WITHOUT_LAYERS = ("logits", "projector_out")


@dataclass(frozen=True)
class Site:
    """One recording.

    Attributes:
        name: the place, one of `SITES`.
        layers: 0-based layers, None for all that have the site. `logits` and `projector_out` have none.
        positions: which positions are kept (rows of attention: see `queries`).
        reduce: "mean" or "sum" over the chosen positions, done before storing, accumulated and returned in float32;
            None keeps every position.
        heads: which heads are kept, None for all (`q`, `k`, `v`, `z` and attention only; of `k` and `v`, key/value
            heads).
        queries, keys: query rows and key columns that are kept (attention only).
        reduce_queries, reduce_keys, reduce_heads: reductions of attention, done before storing.
        label: the name under which the trace gives it; by default the site's name. Needed when one trace records the
            same site twice.
    """

    name: str
    layers: tuple[int, ...] | None = None
    positions: Positions = "all"
    reduce: Reduction | None = None
    heads: tuple[int, ...] | None = None
    queries: Positions = "last"
    keys: Positions = "all"
    reduce_queries: Reduction | None = None
    reduce_keys: Reduction | None = None
    reduce_heads: Reduction | None = None
    label: str = field(default="")

    @property
    def is_attention(self) -> bool:
        """Whether this records attention weights."""
        return self.name in ATTENTION_SITES

    @property
    def is_vision(self) -> bool:
        """Whether this is a place before the language model, with image tiles in place of the batch."""
        return self.name in VISION_SITES

    @property
    def has_heads(self) -> bool:
        """Whether what is recorded has an axis of heads."""
        return self.is_attention or "head" in _WIDTHS.get(self.name.removeprefix("vision_"), ())

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes of what is recorded."""
        row = "tile" if self.is_vision else "batch"
        if self.is_attention:
            dims = [("head", self.reduce_heads), ("query", self.reduce_queries), ("key", self.reduce_keys)]
            return (row, *(name for name, reduced in dims if reduced is None))
        position = () if self.reduce else ("position",)
        stream = "d_vision" if self.name.startswith("vision_") else "d_model"
        return (row, *position, *_WIDTHS.get(self.name.removeprefix("vision_"), (stream,)))

    def __repr__(self) -> str:
        """As it is written with the short constructors: what is not the default."""
        usual: dict[str, object] = {"positions": "last"} if self.name == "logits" else {}
        usual |= {"keys": _KEYS.get(self.name, "all"), "queries": _QUERIES.get(self.name, "last")}
        said = []
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name == "name" or (one.name == "label" and value == self.name):
                continue
            if isinstance(value, Tensor):
                said.append(f"{one.name}=<{tuple(value.shape)} {value.dtype}>")
            elif value != usual.get(one.name, one.default):
                said.append(f"{one.name}={list(value) if isinstance(value, tuple) else value!r}")
        return f"{self.name}({', '.join(said)})"


def canonical_name(site: str, layer: int) -> str:
    """TransformerLens's name of a site of the language model, for example `blocks.3.attn.hook_z`.

    Raises:
        UnknownNameError: TransformerLens has no name for the site.
    """
    if site not in _CANONICAL:
        raise unknown("site with a TransformerLens name", site, _CANONICAL)
    return _CANONICAL[site].format(layer=layer)


def _tuple(values: Iterable[int] | int | None) -> tuple[int, ...] | None:
    if values is None:
        return None
    several = values if isinstance(values, Iterable) else (values,)
    return tuple(int(one) if isinstance(one, np.integer) else one for one in several)


class _States(Protocol):
    def __call__(
        self,
        layers: Iterable[int] | int | None = None,
        positions: Positions = "all",
        reduce: Reduction | None = None,
        label: str = "",
    ) -> Site: ...


class _HeadStates(Protocol):
    def __call__(
        self,
        layers: Iterable[int] | int | None = None,
        positions: Positions = "all",
        reduce: Reduction | None = None,
        heads: Iterable[int] | None = None,
        label: str = "",
    ) -> Site: ...


def _states(name: str, what: str) -> _States:
    """The constructor of a site of states."""

    def make(
        layers: Iterable[int] | int | None = None,
        positions: Positions = "all",
        reduce: Reduction | None = None,
        label: str = "",
    ) -> Site:
        return Site(name, _tuple(layers), positions, reduce, label=label or name)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = what
    return make


def _head_states(name: str, what: str) -> _HeadStates:
    """The constructor of a site of states of heads."""

    def make(
        layers: Iterable[int] | int | None = None,
        positions: Positions = "all",
        reduce: Reduction | None = None,
        heads: Iterable[int] | None = None,
        label: str = "",
    ) -> Site:
        return Site(name, _tuple(layers), positions, reduce, _tuple(heads), label=label or name)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = what
    return make


_D = "[batch, position, d_model]"
resid_pre = _states("resid_pre", f"The residual stream before a block: {_D}. That of block 0 is the decoder's input.")
resid_mid = _states("resid_mid", f"The residual stream between a block's attention and its MLP: {_D}.")
resid_post = _states("resid_post", f"The residual stream after a block, before any final norm: {_D}.")
attn_out = _states("attn_out", f"What a block's attention adds to the residual stream: {_D}.")
mlp_out = _states("mlp_out", f"What a block's MLP adds to the residual stream: {_D}.")
ln1 = _states("ln1", f"The output of the norm before attention: {_D}.")
ln2 = _states("ln2", f"The output of the norm before the MLP: {_D}.")
mlp_pre = _states("mlp_pre", "The MLP's hidden layer before its activation (the gate's): [batch, position, d_mlp].")
mlp_post = _states("mlp_post", "The MLP's hidden layer, what its last projection takes: [batch, position, d_mlp].")
q = _head_states("q", "Queries as projected, before norms and rotation: [batch, position, head, d_head].")
k = _head_states("k", "Keys as projected, before norms and rotation: [batch, position, key/value head, d_head].")
v = _head_states("v", "Values as projected: [batch, position, key/value head, d_head].")
z = _head_states("z", "The output of each head before the output projection: [batch, position, head, d_head].")

_V = "[tile, position, d_vision]"
_TILE = (
    'Positions are "all", "cls" or "patches". A tile is one picture given to the tower: an image, or one of the several '
    "that some families cut an image into."
)
vision_resid_pre = _states("vision_resid_pre", f"The residual stream before a block of the tower: {_V}. {_TILE}")
vision_resid_mid = _states("vision_resid_mid", f"Between attention and MLP of a block of the tower: {_V}. {_TILE}")
vision_resid_post = _states("vision_resid_post", f"The residual stream after a block of the tower: {_V}. {_TILE}")
vision_attn_out = _states("vision_attn_out", f"What attention adds in a block of the tower: {_V}. {_TILE}")
vision_mlp_out = _states("vision_mlp_out", f"What the MLP adds in a block of the tower: {_V}. {_TILE}")
vision_ln1 = _states("vision_ln1", f"The norm before attention in the tower: {_V}. {_TILE}")
vision_ln2 = _states("vision_ln2", f"The norm before the MLP in the tower: {_V}. {_TILE}")
vision_mlp_pre = _states(
    "vision_mlp_pre", f"The MLP's hidden layer before its activation: [tile, position, d_mlp]. {_TILE}"
)
vision_mlp_post = _states("vision_mlp_post", f"The MLP's hidden layer: [tile, position, d_mlp]. {_TILE}")
vision_q = _head_states("vision_q", f"Queries of the tower as projected: [tile, position, head, d_head]. {_TILE}")
vision_k = _head_states("vision_k", f"Keys of the tower as projected: [tile, position, head, d_head]. {_TILE}")
vision_v = _head_states("vision_v", f"Values of the tower as projected: [tile, position, head, d_head]. {_TILE}")
vision_z = _head_states("vision_z", f"Outputs of the tower's heads: [tile, position, head, d_head]. {_TILE}")


def logits(positions: Positions = "last", reduce: Reduction | None = None, label: str = "") -> Site:
    """The model's logits, soft-capped or scaled where the model does so: [batch, position, d_vocab].

    `generate` computes those of the last position alone.
    """
    return Site("logits", None, positions, reduce, label=label or "logits")


def projector_out(reduce: Reduction | None = None, label: str = "") -> Site:
    """The output of the projector: [tile, position, d_model]."""
    return Site("projector_out", None, "all", reduce, label=label or "projector_out")


def _attention(name: str, layers: object, heads: object, label: str, **rest: Any) -> Site:
    return Site(
        name,
        _tuple(cast("Sequence[int] | None", layers)),
        heads=_tuple(cast("Sequence[int] | None", heads)),
        label=label or name,
        **rest,
    )


def attention(
    queries: Positions = "last",
    keys: Positions = "image",
    layers: Iterable[int] | int | None = None,
    heads: Iterable[int] | None = None,
    reduce_queries: Reduction | None = None,
    reduce_keys: Reduction | None = None,
    reduce_heads: Reduction | None = None,
    label: str = "",
) -> Site:
    """Attention weights after the softmax, of the chosen query rows and key columns: [batch, head, query, key].

    The softmax runs over all keys; columns are chosen after it. The full matrix is never built.
    """
    reductions = {"reduce_queries": reduce_queries, "reduce_keys": reduce_keys, "reduce_heads": reduce_heads}
    return _attention("attention", layers, heads, label, queries=queries, keys=keys, **reductions)


def cross_attention(
    queries: Positions = "last",
    layers: Iterable[int] | int | None = None,
    heads: Iterable[int] | None = None,
    reduce_queries: Reduction | None = None,
    reduce_keys: Reduction | None = None,
    reduce_heads: Reduction | None = None,
    label: str = "",
) -> Site:
    """Attention weights of text over the tokens of the images, in layers that read them by cross-attention (Mllama):
    [batch, head, query, image token], the image tokens in the order of `Batch.patches`.
    """
    reductions = {"reduce_queries": reduce_queries, "reduce_keys": reduce_keys, "reduce_heads": reduce_heads}
    return _attention("cross_attention", layers, heads, label, queries=queries, keys="image", **reductions)


def vision_attention(
    queries: Positions = "cls",
    keys: Positions = "patches",
    layers: Iterable[int] | int | None = None,
    heads: Iterable[int] | None = None,
    reduce_queries: Reduction | None = None,
    reduce_keys: Reduction | None = None,
    reduce_heads: Reduction | None = None,
    label: str = "",
) -> Site:
    """Attention weights of the vision tower: [tile, head, query, key]; by default the CLS token's over the patches."""
    reductions = {"reduce_queries": reduce_queries, "reduce_keys": reduce_keys, "reduce_heads": reduce_heads}
    return _attention("vision_attention", layers, heads, label, queries=queries, keys=keys, **reductions)


def __dir__() -> list[str]:
    """The constructors, for tab completion after `sl.sites.`, with what else is public here."""
    return [*SITES, "SITES", "Site", "canonical_name"]
