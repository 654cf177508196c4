"""Attention weights of chosen query rows and heads, from the queries and keys that an attention function was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from slitlamp.errors import UnsupportedError

BLOCK_ELEMENTS = 2**20
"""Weights that are held at once, over rows, heads, queries and keys: 4 MB in float32. A single query row may need more."""


def block_rows(rows: int, heads: int, keys: int) -> int:
    """How many query rows make a block of at most `BLOCK_ELEMENTS` weights; at least one."""
    return max(1, BLOCK_ELEMENTS // max(1, rows * heads * keys))


QueryRows = Tensor | slice
"""Query rows: int64 [row, chosen], or a slice that is the same in every row of the batch."""


@dataclass(eq=False, slots=True)
class AttentionCall:
    """One call of the attention function by an attention module.

    Attributes:
        module: the module that called it.
        number: 0 for the first call during this forward of the module, 1 for the second, and so on. A Qwen vision tower,
            for example, makes one call per image.
        query: [row, head, query, d_head].
        n_keys: keys that the queries were multiplied with; in a sliding-window layer that decodes, only the last ones.
        weights: (query rows, heads or None for all) -> [row, chosen head, chosen query, key], in the dtype of the query:
            the weights that the output of this call was made with.
        output, value: [row, query, head, d_head] and [row, kv head, key, d_head]: what the call gave, and the values that
            it weighed; None where a call runs over several sequences in one row.
    """

    module: nn.Module
    number: int
    query: Tensor
    n_keys: int
    weights: Callable[[QueryRows, Sequence[int] | None], Tensor]
    output: Tensor | None = None
    value: Tensor | None = None

    @property
    def is_cross(self) -> bool:
        """Whether the keys come from another sequence than the queries (Mllama's layers that read the image)."""
        named = "CrossAttention" in type(self.module).__name__
        return named or bool(getattr(self.module, "is_cross_attention", False))

    def block_rows(self, heads: Sequence[int] | None) -> int:
        """How many query rows to take at once, so that no more than `BLOCK_ELEMENTS` weights are held."""
        return block_rows(self.query.shape[0], self.query.shape[1] if heads is None else len(heads), self.n_keys)


class Observer(Protocol):
    """Sees the attention of one module.

    `see` is called for every call of the attention function, in order; `end` once the module's forward is over. The
    weights must be taken inside `see`: what they are computed from is gone afterwards.
    """

    def see(self, call: AttentionCall) -> None:
        """One call of the attention function."""

    def end(self) -> None:
        """The module's forward is over."""


def take_rows(values: Tensor, rows: QueryRows) -> Tensor:
    """Query rows of [row, head, query, ...] along axis 2; a single row of the batch or of queries stands for all."""
    if values.shape[2] == 1:
        return values
    if isinstance(rows, slice):
        return values[:, :, rows]
    if rows.shape[0] == 1:
        return values[:, :, rows[0]]
    of_row = torch.arange(rows.shape[0], device=rows.device)[:, None]
    return values.expand(rows.shape[0], -1, -1, -1)[of_row, :, rows].movedim(1, 2)


def slopes(call: AttentionCall, gradient: Tensor) -> AttentionCall:
    """A call whose "weights" are the derivatives by the weights of the given one: d/dA[h, q, k] = <d/d output[q, h], value[k]>.

    The output is the sum of the values by the weights, so that no matrix need be in the graph. Each weight counts as a
    variable of its own, those of keys that a query may not see included.

    Args:
        call: of the attention function.
        gradient: with respect to its output, [row, query, head, d_head].
    """
    by_head = gradient.transpose(1, 2)
    value: Tensor = call.value  # type: ignore[assignment]  # a call without values has no gradient to be given
    groups = by_head.shape[1] // value.shape[1]

    def weights(rows: QueryRows, heads: Sequence[int] | None) -> Tensor:
        chosen = list(range(by_head.shape[1])) if heads is None else list(heads)
        return take_rows(by_head[:, chosen], rows) @ value[:, [head // groups for head in chosen]].transpose(2, 3)

    return replace(call, weights=weights)


def take_keys(values: Tensor, index: Tensor) -> Tensor:
    """Key columns of [row, head, query, key], int64 [row, chosen]: [row, head, query, chosen]."""
    if index.shape[0] == 1:
        return values[..., index[0]]
    if values.shape[2] == 1:  # a decode step: one small operation
        return torch.take_along_dim(values, index[:, None, None, :], dim=3)
    return torch.stack([one[..., columns] for one, columns in zip(values, index, strict=True)])


def row_index(rows: QueryRows, n_queries: int, device: torch.device) -> Tensor:
    """Query rows as int64 [row or 1, chosen]."""
    return torch.arange(n_queries, device=device)[rows][None, :] if isinstance(rows, slice) else rows


def attention_scores(
    query: Tensor, key: Tensor, *, scaling: float | None = None, softcap: float | None = None
) -> Tensor:
    """Attention scores before any mask: softcap(q k^T * scaling); q k^T in the dtype of the model, what follows in float32.

    Args:
        query: [batch, head, query, d_head].
        key: [batch, kv head, key, d_head]; each is shared by head / kv head query heads.
        scaling, softcap: as of `attention_rows`.

    Returns:
        [batch, head, query, key], float32 or, of a model in float64, that.
    """
    batch, n_heads, n_rows, width = query.shape
    n_kv_heads, n_keys = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, n_kv_heads, n_heads // n_kv_heads * n_rows, width)
    scores = (grouped @ key.transpose(2, 3)).reshape(batch, n_heads, n_rows, n_keys)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores.mul_(scaling if scaling is not None else width**-0.5)
    if softcap is None:
        return scores
    scores.div_(softcap).tanh_()
    return scores * softcap if scores.requires_grad else scores.mul_(softcap)


def attention_rows(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    rows: QueryRows = slice(None),
    heads: Sequence[int] | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool = False,
    offset: int = 0,
    window: int | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """Attention weights of some query rows and heads: softmax(softcap(q k^T * scaling) + mask).

    q k^T is computed in the dtype of the model, as HF's eager attention does; what follows in float32. Only the chosen
    rows and heads are computed. A row that may attend to nothing has weights 0, which is what SDPA gives for it.

    Args:
        query: [batch, head, query, d_head].
        key: [batch, kv head, key, d_head]; each is shared by head / kv head query heads.
        mask: None, or bool (true: may attend) or additive, broadcastable to [batch, head, query, key or more].
        rows: query rows.
        heads: query heads; None for all.
        scaling: factor of the scores; None for 1 / sqrt(d_head).
        softcap: scores s become softcap * tanh(s / softcap).
        is_causal: whether query i sees keys 0 to i + `offset` only.
        offset: how many keys come before the key of query 0.
        window: query i sees only keys less than this many places away from i + `offset`.
        padding: bool [batch, key], true where a key is real.

    Returns:
        [batch, chosen head, chosen query, key], in the dtype of the query.

    Raises:
        UnsupportedError: a mask of other than four axes.
    """
    if mask is not None and mask.ndim != 4:
        raise UnsupportedError(f"an attention mask of shape {list(mask.shape)}; expected [batch, head, query, key]")
    n_queries, n_keys = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    if heads is not None:
        chosen = list(heads)
        query, key = query[:, chosen], key[:, [head // groups for head in chosen]]
        mask = mask if mask is None or mask.shape[1] == 1 else mask[:, chosen]
    taken = query[:, :, rows] if isinstance(rows, slice) else take_rows(query, rows) if n_queries > 1 else query
    scores = attention_scores(taken, key, scaling=scaling, softcap=softcap)

    hidden: Tensor | None = None
    if mask is not None:
        mask_rows = take_rows(mask.detach()[..., :n_keys], rows)
        if mask_rows.dtype == torch.bool:
            hidden = ~mask_rows
        else:
            scores.add_(mask_rows)
            hidden = mask_rows == -torch.inf
    if is_causal or window is not None:
        places = row_index(rows, n_queries, query.device)[:, None, :, None] + offset
        of_keys = torch.arange(n_keys, device=query.device)
        far = of_keys > places if is_causal else of_keys < 0
        if window is not None:
            far = far | (of_keys <= places - window) | (of_keys >= places + window)
        hidden = far if hidden is None else hidden | far
    if padding is not None:
        absent = ~padding[:, None, None, :n_keys]
        hidden = absent if hidden is None else hidden | absent
    if hidden is None:
        return scores.softmax(dim=-1).to(query.dtype)
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1)
    # a row that sees nothing: 0, not 0 / 0
    weights = weights.masked_fill(hidden, 0) if weights.requires_grad else weights.masked_fill_(hidden, 0)
    return weights.to(query.dtype)


@dataclass(eq=False, slots=True)
class DecodeCall:
    """What is kept of a call of the attention function in a decode step until it is recorded.

    Attributes:
        query: [row, head, 1, d_head].
        key: [row, kv head, key, d_head]; None once a later step has it, too.
        mask, scaling: as of `attention_rows`.
        n_keys: its keys.
    """

    query: Tensor
    key: Tensor | None
    mask: Tensor | None
    scaling: float | None
    n_keys: int

    @property
    def kind(self) -> tuple[object, ...]:
        """Calls of one kind can be computed together."""
        return (self.query.shape, self.query.device, self.n_keys, self.scaling, id(self.mask))


def decode_rows(steps: Sequence[Sequence[DecodeCall]], heads: Sequence[int] | None) -> Tensor:
    """Attention weights of decode steps, of several layers at once; the same as `attention_rows` gives for each.

    Args:
        steps: per step, one call per layer: of one kind, with a `key` each. The keys of the last step must be those of the
            steps before it, and one more for every step; only one step may have a mask.
        heads: query heads; None for all.

    Returns:
        [batch, step, layer, chosen head, 1, key of the last step], in the dtype of the query; 0 at later keys.
    """
    last = steps[-1]
    batch, n_heads, _, width = last[0].query.shape
    n_kv_heads, n_keys = last[0].key.shape[1], last[0].key.shape[2]  # type: ignore[union-attr]  # asked for
    groups, n_steps = n_heads // n_kv_heads, len(steps)
    parts = []
    for layer, call in enumerate(last):
        queries = call.query if n_steps == 1 else torch.cat([step[layer].query for step in steps], dim=2)
        grouped = queries.reshape(batch * n_kv_heads, groups * n_steps, width)
        parts.append(torch.bmm(grouped, call.key.flatten(0, 1).transpose(1, 2)))  # type: ignore[union-attr]
    scores = torch.stack([one.view(batch, n_heads, n_steps, n_keys) for one in parts], dim=1)
    scores = scores.permute(0, 3, 1, 2, 4).unsqueeze(4)
    if heads is not None:
        scores = scores[:, :, :, list(heads)]
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = scores.mul_(last[0].scaling if last[0].scaling is not None else width**-0.5)
    if n_steps > 1:
        ends = torch.arange(n_keys - n_steps, n_keys, device=scores.device)
        later = torch.arange(n_keys, device=scores.device) > ends[:, None]
        return (
            scores.masked_fill_(later[None, :, None, None, None, :], -torch.inf).softmax(dim=-1).to(last[0].query.dtype)
        )
    if last[0].mask is None:
        return scores.softmax(dim=-1).to(last[0].query.dtype)
    mask = last[0].mask[:, None, None, :, :, :n_keys]
    if heads is not None and mask.shape[3] > 1:
        mask = mask[:, :, :, list(heads)]
    hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    if mask.dtype != torch.bool:
        scores = scores.add_(mask)
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1)
    return weights.masked_fill_(hidden, 0).to(last[0].query.dtype)
