"""Recording decode steps: what passes the sites is only remembered while the model runs, and recorded for several steps and all
layers at once.

A decode step of a small model takes a millisecond or two, and dozens of small operations of recording would be felt in it. What
is remembered is one position per row, layer and step, and the keys that the model's cache holds anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from slitlamp.errors import UnsupportedError
from slitlamp.tracing.attention_recorder import Chosen, Gathered
from slitlamp.tracing.attention_rows import BLOCK_ELEMENTS, AttentionCall, DecodeCall, decode_rows
from slitlamp.tracing.call import Selection
from slitlamp.tracing.places import View
from slitlamp.tracing.reductions import reduce_axis
from slitlamp.tracing.sites import Site
from slitlamp.tracing.trace import Step

AT_ONCE = 32
"""Steps that are remembered before they are recorded."""


@dataclass(eq=False, slots=True)
class _States:
    """The tensors that passed a site of states in one step, by layer, with their versions when they did."""

    step: Step
    selection: Selection
    raw: dict[int, Tensor] = field(default_factory=dict)
    versions: list[int] = field(default_factory=list)

    def alike(self) -> Hashable:
        """Steps of which this is the same are recorded together."""
        return (id(self.selection), tuple(self.raw))


class LateStates:
    """What passes sites of states during decode steps.

    Args:
        select: the chosen positions of the present step for a site; None where there are none.
        store: takes (step, site, layer, recording, bool [row, position] of what is real).
    """

    def __init__(
        self,
        select: Callable[[Site], Selection | None],
        store: Callable[[Step, Site, int, Tensor, Tensor], None],
    ) -> None:
        self._select = select
        self._store = store
        self._present: dict[str, _States | None] = {}
        self._waiting: dict[str, tuple[Site, View, list[_States]]] = {}

    @staticmethod
    def can_take(view: View) -> bool:
        """Whether values given in this way can wait: those of a whole module, not multiplied by a gate."""
        return view.tiles is None and view.gate is None and view.place.third is None

    def remember(self, step: Step, site: Site, layer: int, view: View, raw: Tensor) -> None:
        """A tensor passes a site."""
        label = site.label
        if label not in self._present:
            selection = self._select(site)
            self._present[label] = None if selection is None else _States(step, selection)
        seen = self._present[label]
        if seen is None:
            return
        if raw.is_inference():  # its changes are not counted
            raw = raw.clone()
            seen.versions.append(-1)
        else:
            seen.versions.append(raw._version)
        if not seen.raw:
            self._waiting.setdefault(label, (site, view, []))[2].append(seen)
        seen.raw[layer] = raw

    def end_step(self) -> None:
        """The step is over."""
        self._present.clear()

    def record(self) -> None:
        """Record all that is remembered."""
        waiting, self._waiting = self._waiting, {}
        for site, view, steps in waiting.values():
            for _, some in groupby(steps, _States.alike):
                self._record(site, view, list(some))

    def _record(self, site: Site, view: View, steps: Sequence[_States]) -> None:
        for seen in steps:
            for (layer, raw), version in zip(seen.raw.items(), seen.versions, strict=True):
                if version >= 0 and raw._version != version:
                    raise UnsupportedError(
                        f"{site.label} of layer {layer}: the model has written over these values since; record them by "
                        "vlm.forward(generation.teacher_forced())"
                    )
        selection = steps[0].selection
        device = next(iter(steps[0].raw.values())).device
        # some modules run over [row x position, width], and those of one model need not agree
        parts = [one.unsqueeze(1) if one.ndim == 2 else one for seen in steps for one in seen.raw.values()]
        taken = torch.stack([one if one.device == device else one.to(device) for one in parts])
        if view.place.heads is not None:
            taken = taken.unflatten(-1, (view.place.heads, -1))
        if site.heads is not None:
            taken = taken[..., list(site.heads), :]
        valid = selection.valid
        if not selection.full:
            dead = ~valid.to(device).view(1, *valid.shape, *[1] * (taken.ndim - 3))
            taken = taken.masked_fill(dead, 0)
        if site.reduce is not None:  # over one position: what is left is the float32 and the NaN of rows without any
            if taken.dtype != torch.float64:
                taken = taken.float()
            taken = taken if selection.full else taken.masked_fill(dead, torch.nan)
            taken = taken.squeeze(2)
        values = iter(taken.unbind(0))
        for seen in steps:
            for layer, raw in seen.raw.items():  # where the layer's prompt was recorded
                self._store(seen.step, site, layer, next(values).to(raw.device), valid)


@dataclass(eq=False, slots=True)
class _Attention:
    """The calls of attention of one step that are computed alike, by layer."""

    step: Step
    chosen: Chosen
    calls: dict[int, DecodeCall]
    grows: bool

    def alike(self) -> Hashable:
        """Steps of which this is the same have the same queries, layers and keys chosen."""
        return (id(self.chosen.queries), id(self.chosen.keys), self.chosen.first, tuple(self.calls))


class LateAttention:
    """What passes sites of attention during decode steps.

    Args:
        choose: the chosen queries and keys of a call.
        store: takes (step, site, layer, recording, bool [row, query] of the real queries, bool [row, key] of the real keys).
    """

    def __init__(
        self,
        choose: Callable[[Site, AttentionCall | DecodeCall], Chosen | None],
        store: Callable[[Step, Site, int, Tensor, Tensor, Tensor], None],
    ) -> None:
        self._choose = choose
        self._store = store
        self._present: dict[str, tuple[Step, Site, dict[int, DecodeCall]]] = {}
        self._waiting: dict[str, tuple[Site, Site, list[list[_Attention]]]] = {}

    def remember(self, step: Step, site: Site, layer: int, call: DecodeCall) -> None:
        """A module calls attention."""
        self._present.setdefault(site.label, (step, site, {}))[2][layer] = call

    def end_step(self, grows: bool) -> None:
        """The step is over.

        Args:
            grows: whether the model's cache keeps the keys of all positions as they are and puts new ones after them.
        """
        present, self._present = self._present, {}
        for label, (step, site, calls) in present.items():
            alike: dict[object, dict[int, DecodeCall]] = {}
            for layer, call in calls.items():
                alike.setdefault(call.kind, {})[layer] = call
            for some in alike.values():
                chosen = self._choose(site, next(iter(some.values())))
                if chosen is not None:
                    if label not in self._waiting:
                        self._waiting[label] = (site, replace(site, reduce_heads=None), [])
                    _join(self._waiting[label][2], _Attention(step, chosen, some, grows))

    def record(self) -> None:
        """Record all that is remembered."""
        waiting, self._waiting = self._waiting, {}
        for site, by_head, runs in waiting.values():
            for steps in runs:
                self._record(site, by_head, steps)

    def _record(self, site: Site, by_head: Site, steps: Sequence[_Attention]) -> None:
        calls = [list(one.calls.values()) for one in steps]
        weights = decode_rows(calls, site.heads)  # [row, step, layer, head, 1, key]
        sizes = weights.shape[1:4]
        start = 0
        for _, alike in groupby(steps, _Attention.alike):
            some = list(alike)
            first, queries = some[0].chosen, some[0].chosen.queries
            n_keys = next(iter(some[-1].calls.values())).n_keys
            gathered = Gathered(by_head, first)
            gathered.add(weights[:, start : start + len(some), ..., :n_keys].flatten(1, 3), slice(None), slice(0, 1))
            start += len(some)
            taken = gathered.result()
            if taken is None:
                continue
            taken = taken.unflatten(1, (len(some), *sizes[1:]))
            if site.reduce_heads is not None:
                taken = reduce_axis(taken, None, 3, site.reduce_heads)
            valid = queries.valid
            if site.reduce_queries is not None:
                valid = valid.any(dim=1, keepdim=True)
            for one, of_step in zip(some, taken.unbind(1), strict=True):
                for values, layer in zip(of_step.unbind(1), one.calls, strict=True):
                    self._store(one.step, site, layer, values, valid, first.keys.valid)


def _join(runs: list[list[_Attention]], one: _Attention) -> None:
    """Put a step to the run that it goes on with, or begin a run.

    In a run, all weights follow from the keys of the last step: those of a cache that grows by one key a step, without masks.
    The keys of the steps before it are let go, so that no more keys are held than the cache holds.
    """
    call = next(iter(one.calls.values()))
    run = next((run for run in reversed(runs) if run[-1].calls.keys() == one.calls.keys()), None)
    if run is not None:
        before = next(iter(run[-1].calls.values()))
        follows = call.mask is None and before.mask is None and call.n_keys == before.n_keys + 1
        weights = (len(run) + 1) * len(one.calls) * call.query.shape[0] * call.query.shape[1] * call.n_keys
        if one.grows and run[-1].grows and follows and weights <= BLOCK_ELEMENTS:
            for earlier in run[-1].calls.values():
                earlier.key = None
            run.append(one)
            return
    runs.append([one])
