"""Sites: the places in a VLM that can be recorded or edited, and what to record there.

Short constructors (`resid_post(layers=[2, 4], positions="image")`) describe one recording. Layers are 0-based;
`resid_post[l]` is the residual stream after block l, `resid_pre[0]` the input of the language model with the projected
image features in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from slitlamp.errors import InputError, unknown
from slitlamp.models.anatomy import Anatomy

Positions = (
    Literal["all", "image", "text", "text_after_image", "last", "generated", "before_generated", "cls", "patches"]
    | Tensor
)
Reduction = Literal["mean", "sum"]

TEXT_POSITIONS = ("all", "image", "text", "text_after_image", "last", "generated", "before_generated")
VISION_POSITIONS = ("all", "cls", "patches")

_CANONICAL = {
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "z": "blocks.{layer}.attn.hook_z",
    "attention": "blocks.{layer}.attn.hook_pattern",
}

STATE_SITES = ("resid_pre", "resid_post", "z", "mlp_out", "vision_resid_post", "projector_out")
ATTENTION_SITES = ("attention", "vision_attention")
SITES = STATE_SITES + ATTENTION_SITES
VISION_SITES = ("vision_resid_post", "vision_attention", "projector_out")


@dataclass(frozen=True)
class Site:
    """One recording.

    Attributes:
        name: the place: `resid_pre`, `resid_post`, `z`, `mlp_out`, `attention`, `vision_resid_post`,
            `vision_attention`, `projector_out`.
        layers: 0-based layers, None for all. `projector_out` has none.
        positions: which positions are kept (rows of attention: see `queries`).
        reduce: "mean" or "sum" over the chosen positions, done before storing, accumulated and returned in float32;
            None keeps every position.
        heads: which heads are kept, None for all (`z` and attention only).
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
    def axes(self) -> tuple[str, ...]:
        """The names of the axes of what is recorded."""
        row = "tile" if self.is_vision else "batch"
        if self.is_attention:
            dims = [("head", self.reduce_heads), ("query", self.reduce_queries), ("key", self.reduce_keys)]
            return (row, *(name for name, reduced in dims if reduced is None))
        position = () if self.reduce else ("position",)
        width = {"z": ("head", "d_head"), "vision_resid_post": ("d_vision",)}.get(self.name, ("d_model",))
        return (row, *position, *width)


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


def _state(
    name: str, layers: Iterable[int] | int | None, positions: object, reduce: object, label: str, heads: object = None
) -> Site:
    return Site(
        name=name,
        layers=_tuple(layers),
        positions=cast(Positions, positions),
        reduce=cast("Reduction | None", reduce),
        heads=_tuple(cast("Sequence[int] | None", heads)),
        label=label or name,
    )


def resid_pre(
    layers: Iterable[int] | int | None = None,
    positions: Positions = "all",
    reduce: Reduction | None = None,
    label: str = "",
) -> Site:
    """The residual stream before a block: [batch, position, d_model]. `resid_pre[0]` is the language model's input."""
    return _state("resid_pre", layers, positions, reduce, label)


def resid_post(
    layers: Iterable[int] | int | None = None,
    positions: Positions = "all",
    reduce: Reduction | None = None,
    label: str = "",
) -> Site:
    """The residual stream after a block, before any final norm: [batch, position, d_model]."""
    return _state("resid_post", layers, positions, reduce, label)


def z(
    layers: Iterable[int] | int | None = None,
    positions: Positions = "all",
    reduce: Reduction | None = None,
    heads: Iterable[int] | None = None,
    label: str = "",
) -> Site:
    """The output of each head before the output projection: [batch, position, head, d_head]."""
    return _state("z", layers, positions, reduce, label, heads)


def mlp_out(
    layers: Iterable[int] | int | None = None,
    positions: Positions = "all",
    reduce: Reduction | None = None,
    label: str = "",
) -> Site:
    """The output of a block's MLP, before it is added to the residual stream: [batch, position, d_model]."""
    return _state("mlp_out", layers, positions, reduce, label)


def vision_resid_post(
    layers: Iterable[int] | int | None = None,
    positions: Positions = "all",
    reduce: Reduction | None = None,
    label: str = "",
) -> Site:
    """The residual stream after a block of the vision tower: [tile, position, d_vision]; positions are "all", "cls"
    or "patches".

    A tile is one picture given to the tower: an image, or one of the several that LLaVA-NeXT cuts an image into.
    """
    return _state("vision_resid_post", layers, positions, reduce, label)


def projector_out(reduce: Reduction | None = None, label: str = "") -> Site:
    """The output of the projector: [tile, position, d_model]."""
    return _state("projector_out", None, "all", reduce, label)


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
    return Site(
        "attention",
        _tuple(layers),
        heads=_tuple(heads),
        queries=queries,
        keys=keys,
        reduce_queries=reduce_queries,
        reduce_keys=reduce_keys,
        reduce_heads=reduce_heads,
        label=label or "attention",
    )


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
    return Site(
        "vision_attention",
        _tuple(layers),
        heads=_tuple(heads),
        queries=queries,
        keys=keys,
        reduce_queries=reduce_queries,
        reduce_keys=reduce_keys,
        reduce_heads=reduce_heads,
        label=label or "vision_attention",
    )


def layers_of(site: str, anatomy: Anatomy) -> int:
    """How many layers a site has in a model."""
    if site == "projector_out":
        return 1
    return anatomy.n_vision_layers if site in VISION_SITES else anatomy.n_layers


def check_sites(sites: Sequence[Site], anatomy: Anatomy) -> list[Site]:
    """Sites with their layers spelled out, checked against a model.

    Raises:
        UnknownNameError: an unknown site, position name, reduction, or layer or head outside the model.
        InputError: two recordings under one label, or no recording.
    """
    if not sites:
        raise InputError("a trace of no site records nothing; ask for one, such as sites.resid_post(layers=[2])")
    checked: list[Site] = []
    seen: set[str] = set()
    for site in sites:
        if not isinstance(site, Site):
            raise InputError(f"a trace takes sites such as sites.resid_post(layers=[2]); found {site!r}")
        if site.name not in SITES:
            raise unknown("site", site.name, SITES)
        if site.label in seen:
            raise InputError(f"two recordings are called {site.label!r}; give one another name with label=...")
        seen.add(site.label)
        checked.append(_check_site(site, anatomy))
    return checked


def _check_site(site: Site, anatomy: Anatomy) -> Site:
    known = VISION_POSITIONS if site.is_vision else TEXT_POSITIONS
    chosen = (site.queries, site.keys) if site.is_attention else (site.positions,)
    for positions in chosen:
        if isinstance(positions, str) and positions not in known:
            raise unknown(f"position for {site.name}", positions, known)
        if not isinstance(positions, str | Tensor) or (site.is_vision and isinstance(positions, Tensor)):
            names = ", ".join(repr(name) for name in known)
            mask = "" if site.is_vision else ", or a bool tensor [batch, position]"
            raise InputError(f"{site.name}: positions are one of {names}{mask}; found {type(positions).__name__}")
        if isinstance(positions, Tensor) and (positions.dtype != torch.bool or positions.ndim != 2):
            raise InputError(
                f"{site.name}: a position mask must be bool [batch, position], found {positions.dtype} "
                f"{list(positions.shape)}"
            )
        if isinstance(positions, str) and positions == "cls" and not anatomy.has_cls:
            raise InputError(f"{site.name}: this model's vision tower has no CLS token")
    for reduction in (site.reduce, site.reduce_queries, site.reduce_keys, site.reduce_heads):
        if reduction not in (None, "mean", "sum"):
            raise unknown("reduction", str(reduction), ("mean", "sum"))
    n_layers = layers_of(site.name, anatomy)
    n_heads = anatomy.n_vision_heads if site.is_vision else anatomy.n_heads
    layers = tuple(range(n_layers)) if site.layers is None else site.layers
    _check_numbers(f"layer of {site.name}", layers, n_layers)
    if site.heads is not None:
        _check_numbers(f"head of {site.name}", site.heads, n_heads)
    return replace(site, layers=layers)


def _check_numbers(kind: str, numbers: Sequence[int], count: int) -> None:
    if not numbers:
        raise InputError(f"no {kind} is asked for")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
            raise InputError(f"{kind}: {number!r} is not one of 0 to {count - 1}")
    if len(set(numbers)) != len(numbers):
        raise InputError(f"{kind}: {list(numbers)} names one twice")
