"""Attention changed by hand in a copy of a model under its own eager attention: the reference for edits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tiny_models import BUILDERS

from slitlamp.models import Batch
from slitlamp.vlm import VLM

Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(weights [batch, head, query, key], query positions [batch, query], key positions [key]) -> new weights."""

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "smolvlm", "paligemma gemma2", "gemma3")
"""GQA in all; packed towers, image tokens in several places, sliding windows, soft-capped scores."""


def built(name: str, implementation: str) -> VLM:
    vlm = BUILDERS[name]()
    vlm.model.set_attn_implementation(implementation)
    return vlm


def logits_with_mask(vlm: VLM, batch: Batch, biases: dict[int, torch.Tensor]) -> torch.Tensor:
    """The reference: a copy under eager attention whose modules are handed a mask [batch, head or 1, T, T] with the bias."""
    model: Any = copy.deepcopy(vlm.model)
    model.set_attn_implementation("eager")

    def add(bias: torch.Tensor) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            mask = kwargs["attention_mask"]
            assert mask.is_floating_point()
            return args, {**kwargs, "attention_mask": mask + bias}

        return hook

    for layer, bias in biases.items():
        model.get_submodule(vlm.anatomy.attention(layer)).register_forward_pre_hook(add(bias), with_kwargs=True)
    with torch.no_grad():
        return model(**batch.inputs(), use_cache=False).logits


def pairs(batch: Batch, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """-inf at the pairs [batch, 1, T, T] of some queries and keys, but for each position with itself."""
    cut = queries[:, None, :, None] & keys[:, None, None, :] & ~torch.eye(batch.length, dtype=torch.bool)
    return torch.zeros(cut.shape).masked_fill(cut & batch.real_mask[:, None, :, None], -torch.inf)


def by_hand(
    vlm: VLM, rules: list[tuple[int, Rule, torch.Tensor | None]], biases: dict[int, torch.Tensor], tower: str = ""
) -> Any:
    """A copy under eager attention whose modules give the sum of their values by the weights of some rules.

    Args:
        rules: (layer, rule, bool [batch, query] of the rows, or None for all), in order.
        biases: layer -> what is added to the mask, before the softmax.
        tower: "vision_" for the vision tower.
    """
    model: Any = copy.deepcopy(vlm.model)
    model.set_attn_implementation("eager")
    values: dict[int, torch.Tensor] = {}

    def path(site: str, layer: int) -> str:
        return vlm.anatomy.place(tower + site, layer).path

    def add(bias: torch.Tensor) -> Any:
        return lambda module, args, kwargs: (args, {**kwargs, "attention_mask": kwargs["attention_mask"] + bias})

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            values[layer] = output

        return hook

    def sum_up(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            weights = output[1]
            places = torch.arange(weights.shape[-1])
            for other, rule, rows in rules:
                if other == layer:
                    found = rule(weights, places[None].expand(weights.shape[0], -1), places)
                    weights = found if rows is None else torch.where(rows[:, None, :, None], found, weights)
            heads = weights.shape[1]
            value = values[layer].unflatten(
                -1, (-1, vlm.anatomy.d_head if not tower else values[layer].shape[-1] // heads)
            )
            value = value.repeat_interleave(heads // value.shape[2], dim=2)
            mixed = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)
            return (model.get_submodule(path("z", layer))(mixed), weights, *output[2:])

        return hook

    for layer, bias in biases.items():
        model.get_submodule(path("attention", layer)).register_forward_pre_hook(add(bias), with_kwargs=True)
    for layer in {layer for layer, _, _ in rules}:
        model.get_submodule(path("v", layer)).register_forward_hook(keep(layer))
        model.get_submodule(path("attention", layer)).register_forward_hook(sum_up(layer))
    return model


def outputs(model: Any, batch: Batch) -> Any:
    with torch.no_grad():
        return model(**batch.inputs(), use_cache=False, output_attentions=True)
