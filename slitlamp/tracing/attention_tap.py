"""The attention tap: the model's own attention for the output, weights only for the rows that somebody asked for.

For every attention implementation that can be tapped there is one of the same kind under a name of ours (`slitlamp_sdpa`,
`slitlamp_eager`, `slitlamp_flash_attention_2`), registered with transformers' public attention interface together with
the mask function of the original (without that, padded batches would get another mask, or none). While attention is
recorded, the configurations of the recorded modules carry our names; the output is computed by the original:

- sdpa, flash attention: the original function runs as ever; rows are recomputed from the same queries, keys and mask.
- eager: the model's own eager function runs in blocks of query rows; rows are what that function returns.

Edits of attention (`slitlamp.tracing.attention_edit`) go the same way: under sdpa the edited rows are computed anew by the
original with the edited mask, under eager each block gets its own; flash attention takes no such mask and is refused. Edits after
the softmax (`slitlamp.tracing.weights_edit`) sum the values by the edited weights of their rows, under both.

The matrix of all rows by all columns is never built.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from slitlamp.errors import UnsupportedError
from slitlamp.tracing.attention_edit import EditedMask, Editor
from slitlamp.tracing.attention_rows import (
    AttentionCall,
    DecodeCall,
    Observer,
    QueryRows,
    attention_rows,
    attention_scores,
    block_rows,
    take_rows,
)
from slitlamp.tracing.pause import Pause
from slitlamp.tracing.weights_edit import EditedWeights

PREFIX = "slitlamp_"
_BY_ROW = {"dropout", "scaling", "softcap", "sinks", "position_bias"}
"""Parameters of an eager attention function under which its rows do not depend on each other."""

Output = tuple[Tensor, Tensor | None]


@dataclass
class _Watch:
    """Who watches and edits a module, and how many calls of the attention function its present forward has made."""

    observers: list[Observer]
    editor: Editor | None = None
    calls: int = 0

    def edits(
        self, query: Tensor, key: Tensor, mask: Tensor | None, options: Mapping[str, Any], *, is_causal: bool = False
    ) -> EditedMask | None:
        """The edits in a call of the attention function; None where there are none."""
        if self.editor is None:
            return None
        scores = partial(_scores, query, key, options)
        return self.editor.of_call(query, key.shape[2], mask, scores, is_causal=is_causal)

    def edited_weights(
        self, query: Tensor, n_keys: int, weights: Callable[[QueryRows, Sequence[int] | None], Tensor]
    ) -> EditedWeights | None:
        """The edits after the softmax in a call of the attention function; None where there are none."""
        if self.editor is None or self.editor.after is None:
            return None
        return self.editor.after.of_call(query, n_keys, weights, self.calls)

    def see(
        self,
        module: nn.Module,
        query: Tensor,
        n_keys: int,
        weights: Callable[..., Tensor],
        output: Tensor | None = None,
        value: Tensor | None = None,
    ) -> None:
        call = AttentionCall(module, self.calls, query, n_keys, weights, output, value)
        self.calls += 1
        if torch.is_grad_enabled():
            with torch.no_grad():
                self._show(call)
        else:
            self._show(call)

    def remember(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> bool:
        """Whether the observers take a call of a decode step without looking at it now."""
        for number, observer in enumerate(self.observers):
            later = getattr(observer, "later", None)
            # one for each, for they are changed
            if later is None or not later(DecodeCall(query, key, mask, scaling, key.shape[2])):
                assert number == 0, "observers of one run agree on what a decode step is"
                return False
        self.calls += 1
        return True

    def _show(self, call: AttentionCall) -> None:
        for observer in self.observers:
            observer.see(call)


def _scores(query: Tensor, key: Tensor, options: Mapping[str, Any], rows: QueryRows) -> Tensor:
    """Scores of some query rows before the mask, from the options that the attention function was given."""
    if options.get("position_bias") is not None:
        raise UnsupportedError("edits relative to attention scores do not know a model's position bias (position_bias)")
    taken = take_rows(query, rows)
    return attention_scores(taken, key, scaling=options.get("scaling"), softcap=options.get("softcap"))


_observers: dict[int, _Watch] = {}
"""By the identity of the watched module, for as long as `observed` holds it."""


def _refuse(module: nn.Module, options: Mapping[str, Any], names: Mapping[str, str]) -> None:
    for name, what in names.items():
        if options.get(name) is not None:
            raise UnsupportedError(
                f"{type(module).__name__} runs attention with {what} ({name}), which cannot be recorded under this "
                "attention implementation; load the model with attn_implementation='eager'"
            )


_SINKS = {"s_aux": "attention sinks", "cache": "a paged cache"}
_NOT_UNDER_SDPA = {**_SINKS, "position_bias": "a position bias"}
_NOT_UNDER_FLASH = {**_SINKS, "block_table": "a paged cache"}


def _tapped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Output:
    output: Output = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
    watch = _observers.get(id(module))
    if watch is not None:
        _refuse(module, options, _NOT_UNDER_SDPA)
        causal = options.get("is_causal")
        causal = bool(getattr(module, "is_causal", True)) if causal is None else bool(causal)
        is_causal = causal and attention_mask is None and query.shape[2] > 1
        edited = watch.edits(query, key, attention_mask, options, is_causal=is_causal)
        if edited is not None:
            options = {**options, "is_causal": False}  # it is in the mask

            def attend(rows: Tensor, mask: Tensor) -> Tensor:
                taken = take_rows(query, rows)
                again: Output = ALL_ATTENTION_FUNCTIONS["sdpa"](module, taken, key, value, mask, **options)
                return again[0]

            output = (edited.rewrite(output[0], attend), None)

        def weights(rows: QueryRows, heads: Sequence[int] | None) -> Tensor:
            if edited is not None:
                taken, mask = take_rows(query, rows), edited.of(rows)
                return attention_rows(taken, key, mask, heads=heads, scaling=options.get("scaling"))
            return attention_rows(
                query,
                key,
                attention_mask,
                rows=rows,
                heads=heads,
                scaling=options.get("scaling"),
                is_causal=is_causal,
            )

        changed = watch.edited_weights(query, key.shape[2], weights)
        if changed is not None:
            output = (changed.rewrite(output[0], value), None)
        elif query.shape[2] == 1:
            mask = attention_mask if edited is None else edited.of(slice(None))
            if watch.remember(query, key, mask, options.get("scaling")):
                return output
        watch.see(module, query, key.shape[2], weights if changed is None else changed.of, output[0], value)
    return output


class _Renamed:
    """An object with some attributes changed: the module as flash attention must see it, under its own name."""

    def __init__(self, wrapped: object, **changed: object) -> None:
        self.__dict__.update(changed)
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def _tapped_flash(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> Output:
    # the kernel is looked up by the name in the module's configuration
    renamed = _Renamed(module, config=_Renamed(module.config, _attn_implementation=name))
    output: Output = ALL_ATTENTION_FUNCTIONS[name](renamed, query, key, value, attention_mask, **options)
    watch = _observers.get(id(module))
    if watch is not None:
        if watch.editor is not None:
            raise UnsupportedError(
                f"{type(module).__name__} runs attention by {name}, which takes no mask of (query, key) pairs, so that its "
                "attention cannot be edited; load the model with attn_implementation='sdpa'"
            )
        _refuse(module, options, _NOT_UNDER_FLASH)
        causal = options.get("is_causal")
        causal = bool(module.is_causal) if causal is None else bool(causal)
        window = options.get("sliding_window")
        choices = {
            "scaling": options.get("scaling"),
            "softcap": options.get("softcap"),
            "is_causal": causal and query.shape[2] > 1,
            "window": window if window is not None and key.shape[2] > window else None,
        }
        lengths = options.get("cu_seq_lens_q")
        if attention_mask is None and lengths is not None:  # several sequences in one row: each attends to itself
            for start, end in _sequences(module, lengths, options.get("cu_seq_lens_k")):
                one, its_keys = query[:, :, start:end], key[:, :, start:end]
                watch.see(module, one, end - start, partial(_weights, one, its_keys, choices))
        else:
            _refuse_packed(module, query, options.get("position_ids"), attention_mask)
            padding = None if attention_mask is None else attention_mask.bool()
            if padding is not None:
                key, value = key[:, :, : padding.shape[1]], value[:, :, : padding.shape[1]]
            choices |= {"padding": padding, "offset": key.shape[2] - query.shape[2]}
            watch.see(module, query, key.shape[2], partial(_weights, query, key, choices), output[0], value)
    return output


def _weights(
    query: Tensor, key: Tensor, choices: Mapping[str, Any], rows: QueryRows, heads: Sequence[int] | None
) -> Tensor:
    return attention_rows(query, key, rows=rows, heads=heads, **choices)


def _sequences(module: nn.Module, queries: Tensor, keys: Tensor | None) -> list[tuple[int, int]]:
    ends = queries.tolist()
    if keys is None or keys.tolist() != ends:
        raise UnsupportedError(
            f"{type(module).__name__} packs queries and keys of different lengths into one row, which cannot be recorded; "
            "load the model with attn_implementation='sdpa'"
        )
    return list(pairwise(ends))


def _refuse_packed(module: nn.Module, query: Tensor, places: Tensor | None, mask: Tensor | None) -> None:
    """Flash attention takes position ids that start anew for a second sequence packed into the same row."""
    if places is None or mask is not None or query.shape[0] != 1 or places.shape[-1] == 1:
        return
    rising = torch.arange(places.shape[-1], device=places.device) + places.min()
    if bool((places != rising).any()):
        raise UnsupportedError(
            f"{type(module).__name__} was given position ids that pack several sequences into one row for flash attention, "
            "which cannot be recorded; load the model with attn_implementation='sdpa'"
        )


@cache
def _own_eager(module_type: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The eager attention function that a class of modules hands to the attention interface as its default.

    Raises:
        UnsupportedError: none is found, or its rows depend on each other.
    """
    for one in module_type.__mro__:
        forward: Any = inspect.unwrap(one.__dict__["forward"]) if "forward" in one.__dict__ else None
        code = getattr(forward, "__code__", None)
        names = [name for name in code.co_names if name.endswith("eager_attention_forward")] if code else []
        if len(names) == 1 and names[0] in forward.__globals__:
            function: Callable[..., tuple[Tensor, Tensor]] = inspect.unwrap(forward.__globals__[names[0]])
            parameters = list(inspect.signature(function).parameters.values())[5:]
            odd = {one.name for one in parameters if one.kind is not one.VAR_KEYWORD} - _BY_ROW
            if odd:
                raise UnsupportedError(
                    f"the eager attention of {module_type.__name__} takes {', '.join(sorted(odd))}, which cannot be "
                    "recorded row by row; load the model with attn_implementation='sdpa'"
                )
            return function
    raise UnsupportedError(
        f"{module_type.__name__} does not say which eager attention it uses; load the model with "
        "attn_implementation='sdpa'"
    )


def _in_blocks(attend: Callable[[slice], Tensor], n_queries: int, block: int) -> Tensor:
    """Outputs [row, query, head, d_head] of all query rows, written into one tensor: small tensors kept between the large
    ones of the blocks would keep the memory of those from being used again.
    """
    first = attend(slice(0, block))
    if first.requires_grad:
        return torch.cat([first, *(attend(slice(at, at + block)) for at in range(block, n_queries, block))], dim=1)
    output = first.new_empty(first.shape[0], n_queries, *first.shape[2:])
    output[:, :block] = first
    del first
    for at in range(block, n_queries, block):
        output[:, at : at + block] = attend(slice(at, at + block))
    return output


def _tapped_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Output:
    eager: Callable[..., tuple[Tensor, Tensor]] = _own_eager(cast("Any", type(module)))
    watch = _observers.get(id(module))
    n_queries = query.shape[2]
    if watch is None:
        return eager(module, query, key, value, attention_mask, **options)
    edited = watch.edits(query, key, attention_mask, options)

    def run(rows: QueryRows, value: Tensor) -> tuple[Tensor, Tensor]:
        bias = options.get("position_bias")
        changed = options if bias is None else {**options, "position_bias": take_rows(bias, rows)}
        if edited is not None:
            mask: Tensor | None = edited.of(rows)
        else:
            mask = attention_mask if attention_mask is None else take_rows(attention_mask, rows)
        return eager(module, take_rows(query, rows), key, value, mask, **changed)

    block = block_rows(query.shape[0], query.shape[1], key.shape[2])
    if block >= n_queries and edited is None:
        output, _ = eager(module, query, key, value, attention_mask, **options)
    else:
        output = _in_blocks(lambda rows: run(rows, value)[0], n_queries, block)

    def weights(rows: QueryRows, heads: Sequence[int] | None) -> Tensor:
        taken = run(rows, value[..., :0])[1]
        return taken if heads is None else taken[:, list(heads)]

    changed = watch.edited_weights(query, key.shape[2], weights)
    if changed is not None:
        output = changed.rewrite(output, value)
    watch.see(module, query, key.shape[2], weights if changed is None else changed.of, output, value)
    return output, None


def _tap_of(name: str) -> str:
    """The name of the tap of an attention implementation, registered if it is not yet.

    Raises:
        UnsupportedError: an implementation that cannot be tapped.
    """
    tap = PREFIX + name
    if tap in ALL_ATTENTION_FUNCTIONS:
        return tap
    if name == "sdpa":
        function: Callable[..., Output] = _tapped_sdpa
    elif name == "eager":
        function = _tapped_eager
    elif name in ALL_ATTENTION_FUNCTIONS and ALL_ATTENTION_FUNCTIONS[name] is flash_attention_forward:
        function = partial(_tapped_flash, name)
    else:
        raise UnsupportedError(
            f"this model runs attention by {name}, which cannot be recorded; load it with attn_implementation='sdpa' "
            "(or 'eager', or 'flash_attention_2')"
        )
    AttentionMaskInterface.register(tap, ALL_MASK_ATTENTION_FUNCTIONS[name])
    AttentionInterface.register(tap, function)
    return tap


@dataclass
class _Held:
    """A configuration under one of our names, how often, and the name to give back."""

    config: Any
    name: str
    times: int = 0


_held: dict[int, _Held] = {}
_lock = threading.Lock()


def _hold(config: Any) -> None:
    with _lock:
        held = _held.get(id(config))
        if held is None:
            held = _Held(config, str(config._attn_implementation))
            tap = _tap_of(held.name)
            config._attn_implementation_internal = tap
            _held[id(config)] = held
        held.times += 1


def _let_go(config: Any) -> None:
    with _lock:
        held = _held[id(config)]
        held.times -= 1
        if held.times == 0:
            config._attn_implementation_internal = held.name
            del _held[id(config)]


@contextmanager
def observed(
    observers: Mapping[nn.Module, Sequence[Observer]],
    editors: Mapping[nn.Module, Editor] | None = None,
    pause: Pause | None = None,
) -> Iterator[None]:
    """Let observers see, and editors change, the attention of some modules; on exit the modules and their configurations are
    what they were. While `pause` is on nobody sees or changes anything.

    Raises:
        UnsupportedError: attention that cannot be tapped: an implementation without a tap, or a module that does not take
            its attention from transformers' attention interface (found when it runs).
    """
    held: list[Any] = []
    hooks = []
    editors = editors or {}
    pause = pause or Pause()
    modules = list(dict.fromkeys([*observers, *editors]))

    def over(module: nn.Module, args: Any, output: Any) -> None:
        if pause.on:
            return
        watch = _observers[id(module)]
        if watch.calls == 0:
            raise UnsupportedError(
                f"{type(module).__name__} did not call transformers' attention interface, so its attention cannot be "
                "recorded or edited"
            )
        watch.calls = 0
        for observer in watch.observers:
            observer.end()

    before = {module: _observers.get(id(module)) for module in modules}
    watches: dict[nn.Module, _Watch] = {}

    def turn(off: bool) -> None:
        for module, watch in watches.items():
            earlier = before[module]
            if not off:
                _observers[id(module)] = watch
            elif earlier is None:
                _observers.pop(id(module), None)
            else:
                _observers[id(module)] = earlier

    pause.tell(turn)
    try:
        for module in modules:
            config = getattr(module, "config", None)
            if not hasattr(config, "_attn_implementation"):
                raise UnsupportedError(f"{type(module).__name__} has no configuration that chooses its attention")
            _hold(config)
            held.append(config)
        for module in modules:
            earlier = before[module]
            seeing = [*(earlier.observers if earlier else ()), *observers.get(module, ())]
            editor = editors.get(module) or (earlier.editor if earlier else None)
            watches[module] = _Watch(seeing, editor)
            if earlier is None:  # else the outer one's hook does
                hooks.append(module.register_forward_hook(over))
        turn(off=pause.on)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if not pause.on:
            turn(off=True)
        pause.forget(turn)
        for config in held:
            _let_go(config)
