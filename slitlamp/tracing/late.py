"""Recording a decode step: what passes the sites is only remembered while the step runs, and taken for all layers at once
when it is over.

A decode step of a small model takes a millisecond or two, and dozens of small operations of recording would be felt in it. What
is remembered is one position per row and layer, and the keys that the model's cache holds anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from slitlamp.errors import UnsupportedError
from slitlamp.tracing.attention_recorder import Chosen, Gathered
from slitlamp.tracing.attention_rows import AttentionCall, decode_rows
from slitlamp.tracing.call import Selection
from slitlamp.tracing.places import View
from slitlamp.tracing.reductions import reduce_axis
from slitlamp.tracing.sites import Site

Store = Callable[[Site, int, Tensor, Tensor], None]


@dataclass
class _States:
    """The tensors that passed a site of states, by layer, with their version when they did."""

    site: Site
    view: View
    selection: Selection
    raw: dict[int, Tensor] = field(default_factory=dict)
    versions: list[int] = field(default_factory=list)


class LateStates:
    """What passes sites of states during one decode step.

    Args:
        select: the chosen positions of the step for a site; None where there are none.
        store: takes (site, layer, recording, bool [row, position] of what is real).
    """

    def __init__(self, select: Callable[[Site], Selection | None], store: Store) -> None:
        self._select = select
        self._store = store
        self._seen: dict[str, _States | None] = {}

    @staticmethod
    def can_take(view: View) -> bool:
        """Whether values given in this way can wait: those of a whole module, not multiplied by a gate."""
        return view.tiles is None and view.gate is None and view.place.third is None

    def remember(self, site: Site, layer: int, view: View, raw: Tensor) -> None:
        """A tensor passes a site."""
        if site.label not in self._seen:
            selection = self._select(site)
            self._seen[site.label] = None if selection is None else _States(site, view, selection)
        seen = self._seen[site.label]
        if seen is None:
            return
        if raw.is_inference():  # its changes are not counted
            raw = raw.clone()
            seen.versions.append(-1)
        else:
            seen.versions.append(raw._version)
        seen.raw[layer] = raw

    def end(self) -> None:
        """The step is over: record."""
        waiting, self._seen = self._seen, {}
        for seen in waiting.values():
            if seen is not None:
                self._record(seen)

    def _record(self, seen: _States) -> None:
        site, view, selection = seen.site, seen.view, seen.selection
        for (layer, raw), version in zip(seen.raw.items(), seen.versions, strict=True):
            if version >= 0 and raw._version != version:
                raise UnsupportedError(
                    f"{site.label} of layer {layer}: the model has written over these values since; record them by "
                    "vlm.forward(generation.teacher_forced())"
                )
        device = next(iter(seen.raw.values())).device
        with torch.no_grad():
            # some modules run over [row x position, width], and those of one model need not agree
            parts = [one.unsqueeze(1) if one.ndim == 2 else one for one in seen.raw.values()]
            taken = torch.stack([one if one.device == device else one.to(device) for one in parts])
            if view.place.heads is not None:
                taken = taken.unflatten(-1, (view.place.heads, -1))
            if site.heads is not None:
                taken = taken[..., list(site.heads), :]
            valid = selection.valid
            if not selection.full:
                dead = ~valid.to(device).view(1, *valid.shape, *[1] * (taken.ndim - 3))
                taken = taken.masked_fill(dead, 0)
            if (
                site.reduce is not None
            ):  # over one position: what is left is the float32 and the NaN of rows without any
                if taken.dtype != torch.float64:
                    taken = taken.float()
                taken = taken if selection.full else taken.masked_fill(dead, torch.nan)
                taken = taken.squeeze(2)
            for values, (layer, raw) in zip(taken.unbind(0), seen.raw.items(), strict=True):
                self._store(site, layer, values.to(raw.device), valid)  # where the layer's other steps are recorded


class LateAttention:
    """What passes sites of attention during one decode step.

    Args:
        choose: the chosen queries and keys of a call.
        store: takes (site, layer, recording, bool [row, query] of the real queries, bool [row, key] of the real keys).
    """

    def __init__(
        self,
        choose: Callable[[Site, AttentionCall], Chosen | None],
        store: Callable[[Site, int, Tensor, Tensor, Tensor], None],
    ) -> None:
        self._choose = choose
        self._store = store
        self._seen: dict[str, tuple[Site, dict[int, AttentionCall]]] = {}
        self._by_head: dict[str, Site] = {}

    def remember(self, site: Site, layer: int, call: AttentionCall) -> None:
        """A module calls attention."""
        self._seen.setdefault(site.label, (site, {}))[1][layer] = call

    def end(self) -> None:
        """The step is over: record."""
        waiting, self._seen = self._seen, {}
        for site, calls in waiting.values():
            alike: dict[object, dict[int, AttentionCall]] = {}
            for layer, call in calls.items():
                alike.setdefault(call.kind, {})[layer] = call
            for some in alike.values():
                self._record(site, some)

    def _record(self, site: Site, calls: dict[int, AttentionCall]) -> None:
        some = list(calls.values())
        chosen = self._choose(site, some[0])
        if chosen is None:
            return
        with torch.no_grad():
            weights = decode_rows(some, site.heads)  # [row, layer, head, query, key]
            n_heads = weights.shape[2]
            if site.label not in self._by_head:
                self._by_head[site.label] = replace(site, reduce_heads=None)
            gathered = Gathered(self._by_head[site.label], chosen)
            gathered.add(weights.flatten(1, 2), slice(None), slice(0, 1))
            taken = gathered.result()
            if taken is None:
                return
            taken = taken.unflatten(1, (len(some), n_heads))
            if site.reduce_heads is not None:
                taken = reduce_axis(taken, None, 2, site.reduce_heads)
            valid = chosen.queries.valid
            if site.reduce_queries is not None:
                valid = valid.any(dim=1, keepdim=True)
            for values, layer in zip(taken.unbind(1), calls, strict=True):
                self._store(site, layer, values, valid, chosen.keys.valid)
