"""What is done where the model runs under nnsight, which may be a server: finding a site's values, choosing, reducing.

Functions here and those that they call are sent to a server as source. They take and give tensors and plain values only, and
use nothing but torch and functions of that kind.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from slitlamp.errors import UnsupportedError
from slitlamp.tracing.attention_recorder import Gathered
from slitlamp.tracing.attention_rows import attention_rows, block_rows, take_keys
from slitlamp.tracing.places import Tiles, View
from slitlamp.tracing.reductions import reduce_axis, take

_view, _gather = View.of, Tiles.gather  # as functions: their classes are not sent


def follow(tracer: Any, model: Any, wanted: Any, found: list[Any]) -> None:
    """Put what one recording wants into a list, one entry per forward call of the model."""
    if wanted.once:
        found.append(see(model, wanted, 0))
        return
    for step in tracer.iter[:]:
        found.append(see(model, wanted, step))


def see(model: Any, wanted: Any, step: int) -> Any:
    """What one recording wants of one forward call: step 0 runs over the prompt, chosen and reduced here; of later steps, over
    one token, the values are given as they are.
    """
    if wanted.kind == "attention":
        return see_attention(model, wanted, step)
    values = shaped(model, wanted, _raw(model, wanted))
    if step > 0:
        return values.detach().clone()
    chosen = wanted.positions
    if wanted.heads is not None:
        values = values[:, :, wanted.heads]
    if wanted.vision:
        chosen = on_tiles(chosen, values.shape[0], values.shape[1], wanted, values.device)
    elif wanted.kind == "logits" and values.shape[1] < wanted.length:  # the model computed those of the last positions
        index = chosen.index.to(values.device) - (wanted.length - values.shape[1])
        chosen = SimpleNamespace(index=index.clamp(min=0), valid=chosen.valid, full=chosen.full, everything=False)
        chosen.count = index.shape[1]
    taken = take(values, chosen, axis=1)
    if wanted.reduce is not None:
        taken = reduce_axis(taken, None if chosen.full else chosen.valid, 1, wanted.reduce)
    return taken, chosen.valid


def at(model: Any, path: str) -> Any:
    """The part of a model at a path."""
    for part in path.split(".") if path else ():
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def _raw(model: Any, wanted: Any) -> Tensor:
    part = at(model, wanted.path)
    if wanted.kind == "logits":
        logits: Tensor = part.output.logits
        return logits
    if wanted.at_input:
        args, kwargs = part.inputs
        given: Tensor = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "hidden_state"]
        return given
    output = part.output
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def shaped(model: Any, wanted: Any, values: Tensor) -> Tensor:
    """Values as [row, position, (head,) width], as `slitlamp.tracing.places.View` gives them."""
    tiles: Any = None
    if wanted.tiles is not None:
        tiles = SimpleNamespace(index=wanted.tiles[0], valid=wanted.tiles[1])
        tiles.gather = partial(_gather, tiles)
    view: Any = SimpleNamespace(
        place=SimpleNamespace(third=wanted.third, heads=wanted.n_heads),
        tiles=tiles,
        rows=None if wanted.vision else wanted.rows,
        gate=None if wanted.gate is None else partial(_gate, model, wanted),
    )
    return _view(view, values)


def _gate(model: Any, wanted: Any) -> Tensor:
    owner, _, name = wanted.gate.rpartition(".")
    gate: Tensor = getattr(at(model, owner), name)
    return gate.tanh() if wanted.tanh else gate


def on_tiles(positions: str, n_tiles: int, n_positions: int, wanted: Any, device: Any) -> Any:
    """The chosen positions of the vision tower: "all", "cls" (the first) or "patches" (all but the CLS)."""
    first = 1 if wanted.has_cls and positions == "patches" else 0
    last = 1 if positions == "cls" else n_positions
    index = torch.arange(first, last, device=device)[None, :].expand(n_tiles, -1)
    valid = torch.ones_like(index, dtype=torch.bool)
    if wanted.tiles is not None:
        valid = wanted.tiles[1].to(device)[:, first:last]
        index = torch.where(valid, index, 0)
    full = bool(valid.all())
    everything = full and last - first == n_positions
    return SimpleNamespace(index=index, valid=valid, full=full, everything=everything, count=last - first)


def see_attention(model: Any, wanted: Any, step: int) -> Any:
    """Attention weights, recomputed from the queries, keys and mask that the attention function was given.

    Returns:
        Of the prompt: what is recorded, bool [row, query], bool [row, key]. Of a later step: the weights
        [row, head, 1, key], over the chosen keys (reduced, if so asked) where those are the same in every step, else over
        all keys since the first.
    """
    args, options = getattr(at(model, wanted.path).source, wanted.operation).inputs
    module, query, key = args[0], args[1], args[2]
    mask = args[4] if len(args) > 4 else options.get("attention_mask")
    kind = module.config._attn_implementation
    if kind not in ("sdpa", "eager") or options.get("s_aux") is not None or options.get("position_bias") is not None:
        raise UnsupportedError(
            f"attention by {kind}, with sinks or with a position bias cannot be recorded under nnsight; load the model with "
            "attn_implementation='sdpa', or record with the hooks"
        )
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True)) if causal is None else bool(causal)
    weights = partial(
        attention_rows,
        query.detach(),
        key.detach(),
        mask,
        heads=wanted.heads,
        scaling=options.get("scaling"),
        softcap=options.get("softcap") if kind == "eager" else None,
        is_causal=kind == "sdpa" and causal and mask is None and query.shape[2] > 1,
    )
    n_keys = key.shape[2]
    if step > 0:
        rows = weights(rows=slice(None))
        if not wanted.cross:  # a sliding window's cache holds the last keys alone
            rows = torch.nn.functional.pad(rows, (wanted.length + step - n_keys, 0))
        if not wanted.fixed_keys:
            return rows
        keys = wanted.keys
        rows = take_keys(rows, keys.index.to(rows.device))
        rows = rows.masked_fill(~keys.valid.to(rows.device)[:, None, None, :], 0)
        if wanted.reduce_keys is not None:
            rows = reduce_axis(rows, None if keys.full else keys.valid, 3, wanted.reduce_keys)
        return rows
    queries, keys = wanted.queries, wanted.keys
    if wanted.vision:
        queries, keys = (on_tiles(one, query.shape[0], query.shape[2], wanted, query.device) for one in (queries, keys))
    chosen: Any = SimpleNamespace(queries=queries, keys=keys, first=0)
    n_heads = query.shape[1] if wanted.heads is None else len(wanted.heads)
    gathered = Gathered(wanted, chosen)
    block = block_rows(query.shape[0], n_heads, n_keys)
    for start in range(0, queries.count, block):
        slots = slice(start, min(start + block, queries.count))
        rows_of = slots if queries.everything else queries.index.to(query.device)[:, slots]
        gathered.add(weights(rows=rows_of), slice(None), slots)
    return gathered.result(), queries.valid, keys.valid
