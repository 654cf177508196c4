"""Sites checked against a model before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models.anatomy import Anatomy
from slitlamp.tracing.sites import SITES, TEXT_POSITIONS, VISION_POSITIONS, WITHOUT_LAYERS, Site


def check_sites(sites: Sequence[Site], anatomy: Anatomy) -> list[Site]:
    """Sites with their layers spelled out, checked against a model.

    Raises:
        UnknownNameError: an unknown site, position name, reduction, or layer or head outside the model.
        InputError: two recordings under one label, or no recording.
        UnsupportedError: a site that this model, or one of the layers asked for, does not have.
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
    if site.name == "cross_attention" and (isinstance(site.keys, Tensor) or site.keys != "image"):
        raise InputError('cross_attention: its keys are the tokens of the images: keys="image"')
    for reduction in (site.reduce, site.reduce_queries, site.reduce_keys, site.reduce_heads):
        if reduction not in (None, "mean", "sum"):
            raise unknown("reduction", str(reduction), ("mean", "sum"))
    having = anatomy.layers(site.name)
    if not having:
        raise UnsupportedError(f"this {anatomy.family.name} has no {site.name!r}; it has: {', '.join(anatomy.places)}")
    layers = having if site.layers is None else site.layers
    n_layers = n_layers_of(site.name, anatomy)
    _check_numbers(f"layer of {site.name}", layers, n_layers)
    for layer in layers:
        anatomy.place(site.name, layer)
    if site.heads is not None:
        if not site.has_heads:
            raise InputError(f"{site.name} has no heads to choose from")
        _check_numbers(f"head of {site.name}", site.heads, _n_heads(site, anatomy))
    return replace(site, layers=layers)


def n_layers_of(site: str, anatomy: Anatomy) -> int:
    """How many layers the part of the model has that a site is in."""
    if site in WITHOUT_LAYERS:
        return 1
    return anatomy.n_vision_layers if site.startswith("vision_") else anatomy.n_layers


def _n_heads(site: Site, anatomy: Anatomy) -> int:
    if site.is_vision:
        return anatomy.n_vision_heads
    return anatomy.n_kv_heads if site.name in ("k", "v") else anatomy.n_heads


def _check_numbers(kind: str, numbers: Sequence[int], count: int) -> None:
    if not numbers:
        raise InputError(f"no {kind} is asked for")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
            raise InputError(f"{kind}: {number!r} is not one of 0 to {count - 1} (they count from 0)")
    if len(set(numbers)) != len(numbers):
        raise InputError(f"{kind}: {list(numbers)} names one twice")
