"""A trace as a `transformer_lens.ActivationCache`, under TransformerLens's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.tracing.sites import _CANONICAL, Site, canonical_name

if TYPE_CHECKING:
    from transformer_lens import ActivationCache

    from slitlamp.models.batch import Batch
    from slitlamp.tracing.lens_model import LensModel
    from slitlamp.tracing.trace import Trace


def activation_cache(trace: Trace, labels: Iterable[str] | None = None) -> ActivationCache:
    """The recordings of one forward pass as a `transformer_lens.ActivationCache`.

    States are [batch, position, ...] and patterns [batch, head, query, key], over the positions of the batch, padding
    included (0 there). Recordings with `positions="last"` give caches of that one position. Besides what was recorded it
    has `hook_embed` (from `resid_pre` of block 0: what enters the first block, the image's features included),
    `blocks.{l}.ln1.hook_scale` (from `resid_pre`), `blocks.{l}.ln2.hook_scale` (from `resid_mid`) and
    `ln_final.hook_scale` (from `resid_post` of the last block). `cache.model` knows the model's sizes and weights, with the
    final norm folded into `W_U`.

    Args:
        trace: of `vlm.forward`.
        labels: which recordings; by default all that TransformerLens has a name for.

    Raises:
        ImportError: transformer_lens is not installed.
        UnknownNameError: a label that was not asked for in the trace.
        InputError: a trace of `generate` or of nothing; a recording that was reduced, of some heads only, or of other
            positions; recordings of different positions.
        UnsupportedError: a model whose final norm TransformerLens cannot apply.
    """
    try:
        from transformer_lens import ActivationCache
    except ImportError as error:
        raise ImportError("to_activation_cache needs TransformerLens: pip install transformer-lens") from error
    from slitlamp.tracing.lens_model import LensModel

    if trace.source is None or trace.batch is None:
        raise InputError("this trace has recorded nothing: call vlm.forward inside its with-block")
    if trace.decoding:
        raise InputError(
            "a TransformerLens cache is of one forward pass, and this trace is of generate; record "
            "vlm.forward(generation.teacher_forced()) instead"
        )
    chosen = _chosen(trace, labels)
    _check(chosen)
    entries: dict[str, Tensor] = {}
    for site in chosen:
        record = trace.record(site.label)
        for layer in record.layers:
            name = canonical_name(site.name, layer)
            if name in entries:
                raise InputError(f"two recordings give {name}; choose one with labels=[...]")
            place = _place_pattern if site.is_attention else _place_states
            entries[name] = place(record[layer], trace.batch, site)
    source = trace.source
    lens = LensModel(source.model, source.anatomy, source.tokenizer)
    return ActivationCache({**_derived(entries, lens), **entries}, lens)


def _chosen(trace: Trace, labels: Iterable[str] | None) -> list[Site]:
    if labels is None:
        chosen = [site for site in trace.sites.values() if site.name in _CANONICAL]
        if not chosen:
            raise InputError(f"TransformerLens has a name for none of these recordings: {', '.join(trace.sites)}")
        return chosen
    chosen = []
    for label in labels:
        if label not in trace.sites:
            raise unknown("recording", label, trace.sites)
        if trace.sites[label].name not in _CANONICAL:
            raise UnsupportedError(f"TransformerLens has no name for {trace.sites[label].name!r} (recording {label!r})")
        chosen.append(trace.sites[label])
    return chosen


def _check(sites: list[Site]) -> None:
    by_positions: dict[str, str] = {}
    for site in sites:
        rows = site.queries if site.is_attention else site.positions
        if not isinstance(rows, str) or rows not in ("all", "last"):
            raise InputError(_refusal(site, "covers other positions"))
        if any((site.reduce, site.reduce_queries, site.reduce_keys, site.reduce_heads)):
            raise InputError(_refusal(site, "was reduced"))
        if site.heads is not None:
            raise InputError(_refusal(site, "covers some heads"))
        if site.is_attention and not (isinstance(site.keys, str) and site.keys == "all"):
            raise InputError(_refusal(site, "covers some keys"))
        by_positions.setdefault(rows, site.label)
    if len(by_positions) > 1:
        raise InputError(
            f"{by_positions['all']!r} covers all positions and {by_positions['last']!r} the last; a cache has one kind: "
            "choose recordings with labels=[...]"
        )


def _refusal(site: Site, why: str) -> str:
    whole = 'queries="all", keys="all"' if site.is_attention else 'positions="all"'
    return (
        f"{site.label!r} {why}, which a TransformerLens cache cannot hold; record it whole ({whole}, or the last position "
        "alone), or leave it out with labels=[...]"
    )


def _places(batch: Batch) -> list[Tensor]:
    """Per row, the positions that are not padding."""
    return [row.nonzero()[:, 0] for row in batch.real_mask]


def _place_states(values: Tensor, batch: Batch, site: Site) -> Tensor:
    """[row, packed position, ...] back to the positions of the batch."""
    if site.positions == "last" or bool(batch.real_mask.all()):
        return values
    whole = values.new_zeros(batch.size, batch.length, *values.shape[2:])
    for row, places in enumerate(_places(batch)):
        whole[row, places.to(values.device)] = values[row, : len(places)]
    return whole


def _place_pattern(weights: Tensor, batch: Batch, site: Site) -> Tensor:
    """[row, head, packed query, packed key] back to the positions of the batch."""
    if bool(batch.real_mask.all()):
        return weights
    n_queries = 1 if site.queries == "last" else batch.length
    whole = weights.new_zeros(batch.size, weights.shape[1], n_queries, batch.length)
    for row, places in enumerate(_places(batch)):
        keys = places.to(weights.device)
        queries = torch.zeros_like(keys[:1]) if site.queries == "last" else keys
        whole[row][:, queries[:, None], keys[None, :]] = weights[row, :, : len(queries), : len(keys)]
    return whole


def _derived(entries: Mapping[str, Tensor], lens: LensModel) -> dict[str, Tensor]:
    """Entries that TransformerLens's methods ask for and that follow from those recorded."""
    anatomy, found = lens.anatomy, {}
    for layer in range(anatomy.n_layers):
        for norm, site in (("ln1", "resid_pre"), ("ln2", "resid_mid")):
            stream = entries.get(canonical_name(site, layer))
            if stream is not None and layer in anatomy.layers(norm):
                found[f"blocks.{layer}.{norm}.hook_scale"] = lens.norm_scale(anatomy.place(norm, layer).path, stream)
    first, last = canonical_name("resid_pre", 0), canonical_name("resid_post", anatomy.n_layers - 1)
    if first in entries:
        found["hook_embed"] = entries[first]
    if last in entries:
        found["ln_final.hook_scale"] = lens.norm_scale(anatomy.modules["final_norm"], entries[last])
    return found
