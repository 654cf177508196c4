"""The attention tap: ordinary SDPA for the output, attention weights only for the rows that somebody asked for.

It is registered with transformers' public attention interface under the name `slitlamp_sdpa`, together with SDPA's mask
function (without that, padded batches would get no mask). Weights of the chosen query rows are computed from the same
queries and keys; the matrix of all rows by all columns is never built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from slitlamp.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NAME = "slitlamp_sdpa"

Rows = Callable[[Callable[[Tensor | None], Tensor], Tensor], None]
"""Gets a function from query rows [row, chosen] (None: all) to weights [row, head, chosen, key], and the queries."""

_observers: WeakKeyDictionary[nn.Module, list[Rows]] = WeakKeyDictionary()


def attention_rows(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    is_causal: bool,
    rows: Tensor | None,
) -> Tensor:
    """Attention weights of some query rows: softmax(q k^T * scaling + mask) in float32.

    Args:
        query: [batch, head, query, d_head].
        key: [batch, kv head, key, d_head]; each is shared by head / kv head query heads.
        mask: None, or bool (true: may attend) or additive, broadcastable to [batch, head, query, key].
        scaling: factor of the scores; None for 1 / sqrt(d_head).
        is_causal: whether query i sees keys 0 to i; only without a mask.
        rows: int64 [batch, chosen], query positions; None for all.

    Returns:
        [batch, head, chosen, key], in the dtype of the query.
    """
    batch, n_heads, n_queries, width = query.shape
    n_kv_heads, n_keys = key.shape[1], key.shape[2]
    if rows is None:
        rows = torch.arange(n_queries, device=query.device)[None, :].expand(batch, -1)
    chosen = torch.take_along_dim(query, rows[:, None, :, None].expand(-1, n_heads, -1, width), dim=2)
    grouped = chosen.reshape(batch, n_kv_heads, n_heads // n_kv_heads * rows.shape[1], width)
    scores = (grouped @ key.transpose(2, 3)).reshape(batch, n_heads, rows.shape[1], n_keys).float()
    scores = scores * (scaling if scaling is not None else width**-0.5)
    if mask is not None:
        wide = mask.expand(batch, mask.shape[1], n_queries, mask.shape[-1])[..., :n_keys]
        mask_rows = torch.take_along_dim(wide, rows[:, None, :, None].expand(-1, mask.shape[1], -1, n_keys), dim=2)
        scores = scores.masked_fill(~mask_rows, -torch.inf) if mask_rows.dtype == torch.bool else scores + mask_rows
    elif is_causal:
        later = torch.arange(n_keys, device=query.device)[None, None, None, :] > rows[:, None, :, None]
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(dim=-1).to(query.dtype)


def _tapped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    output = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    observers = _observers.get(module)
    if observers:
        causal = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", True)) if causal is None else bool(causal)
        is_causal = causal and attention_mask is None and query.shape[2] > 1

        def weights(rows: Tensor | None) -> Tensor:
            return attention_rows(
                query, key, attention_mask, scaling=kwargs.get("scaling"), is_causal=is_causal, rows=rows
            )

        for observe in observers:
            observe(weights, query)
    result: tuple[Tensor, None] = output
    return result


AttentionInterface.register(NAME, _tapped)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations that choose an attention implementation, the model's first, each once."""
    from transformers import PreTrainedModel

    found: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            found.setdefault(id(module.config), module.config)
    for config in list(found.values()):
        for name in config.sub_configs:
            sub = getattr(config, name, None)
            if sub is not None:
                found.setdefault(id(sub), sub)
    return list(found.values())


@contextmanager
def tapped(model: PreTrainedModel) -> Iterator[None]:
    """Run a model's attention through the tap; on exit its implementations are what they were.

    Raises:
        UnsupportedError: the model does not take its attention from transformers' attention interface.
    """
    before = [(config, config._attn_implementation) for config in _configs(model)]
    odd = sorted({str(name) for _, name in before} - {"eager", "sdpa", NAME, "None"})
    if odd:
        raise UnsupportedError(
            f"this model runs attention by {', '.join(odd)}, which cannot be recorded yet; load it with "
            "attn_implementation='sdpa'"
        )
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


@contextmanager
def observed(observers: dict[nn.Module, list[Rows]]) -> Iterator[None]:
    """Let observers see the attention of some modules; on exit none is left."""
    try:
        for module, functions in observers.items():
            _observers.setdefault(module, []).extend(functions)
        yield
    finally:
        for module, functions in observers.items():
            left = [one for one in _observers.get(module, []) if one not in functions]
            if left:
                _observers[module] = left
            else:
                _observers.pop(module, None)
