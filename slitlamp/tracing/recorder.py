"""Filling a trace during one run: choosing, reducing and storing what passes each site."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slitlamp.errors import UnsupportedError
from slitlamp.models.anatomy import Anatomy
from slitlamp.tracing.attention_recorder import AttentionRecorder, Chosen
from slitlamp.tracing.attention_rows import AttentionCall, DecodeCall, Observer, slopes
from slitlamp.tracing.call import Calls, Selection, vision_selection
from slitlamp.tracing.gradients import Gradients
from slitlamp.tracing.late import AT_ONCE, LateAttention, LateStates
from slitlamp.tracing.places import Tiles, View
from slitlamp.tracing.reductions import reduce_axis, take
from slitlamp.tracing.sites import Positions, Site
from slitlamp.tracing.trace import Step, Trace


class Recorder:
    """Fills a trace during one run.

    Args:
        trace: to be filled.
        anatomy: of the model.
        calls: the forward calls of the run.
        tiles: for towers that run over all tiles as one sequence, where each tile is in it; given whether after the
            projector.
    """

    def __init__(
        self, trace: Trace, anatomy: Anatomy, calls: Calls, tiles: Callable[[bool], Tiles | None] = lambda merged: None
    ) -> None:
        self.trace = trace
        self.anatomy = anatomy
        self.calls = calls
        self.tiles = tiles
        self.gradients = None if trace.gradient_of is None else Gradients(trace.gradient_of)
        self._of_gradients = None if trace.gradients is None else Recorder(trace.gradients, anatomy, calls, tiles)
        self._late_states = LateStates(lambda site: calls.select(site.positions), self._store_in)
        self._late_attention = LateAttention(self._chosen_attention, self._store_attention_in)

    def begin(self) -> None:
        """A forward call starts. That over the prompt has its step already, for what ran ahead of it (the vision tower)."""
        if not self.trace.steps or self.calls.number > 0:
            self.trace.steps.append(Step())
        if self._of_gradients is not None:
            self._of_gradients.trace.batch = self.calls.batch
            self._of_gradients.begin()

    def end(self, grows: bool) -> None:
        """A forward call of a generation is over.

        Args:
            grows: whether the model's cache keeps the keys of all positions as they are and puts new ones after them.
        """
        self._late_states.end_step()
        self._late_attention.end_step(grows)
        if self.calls.number % AT_ONCE == 0:
            self.finish()

    def finish(self) -> None:
        """Record what is remembered of the steps so far."""
        with torch.no_grad():
            self._late_states.record()
            self._late_attention.record()

    def differentiate(self, output: Any, *, keep_graph: bool) -> None:
        """The model has run: record the gradients with respect to what was recorded."""
        if self.gradients is not None:
            self.gradients.compute(output, keep_graph=keep_graph)

    def _store(self, site: Site, layer: int, values: Tensor, mask: Tensor) -> None:
        self._store_in(self.trace.steps[-1], site, layer, values, mask)

    def _store_in(self, step: Step, site: Site, layer: int, values: Tensor, mask: Tensor) -> None:
        step.values.setdefault(site.label, {})[layer] = values
        step.masks.setdefault(site.label, mask)

    def _chosen(self, site: Site, positions: Positions, values: Tensor, axis: int = 1) -> Selection | None:
        if not site.is_vision:
            return self.calls.select(positions)
        merged = site.name == "projector_out"
        tiles = self.tiles(merged)
        has_cls = self.anatomy.has_cls and not merged
        valid = None if tiles is None else tiles.valid
        return vision_selection(values.shape[0], values.shape[axis], positions, has_cls, values.device, valid)

    # -- states -----------------------------------------------------------------------------------------------------

    def state(self, site: Site, layer: int, view: View) -> Callable[[Tensor, Tensor], None]:
        """A function that records the values [row, position, ...] that pass a site of states, and watches the tensor that
        holds them if gradients are wanted.
        """
        return self._watching(site, layer, self._keeping(site, layer), view)

    def later(self, site: Site, layer: int, view: View) -> Callable[[Tensor], bool] | None:
        """A function that remembers a tensor that passes a site of states in a decode step, and says whether it did; None
        for sites whose values cannot wait.
        """
        if site.is_vision or self.gradients is not None or not LateStates.can_take(view):
            return None
        trace, calls, remember = self.trace, self.calls, self._late_states.remember

        def take(raw: Tensor) -> bool:
            if calls.number < 1:
                return False
            remember(trace.steps[-1], site, layer, view, raw)
            return True

        return take

    def _watching(
        self, site: Site, layer: int, keep: Callable[[Tensor], None], view: View | None
    ) -> Callable[[Tensor, Tensor], None]:
        if self.gradients is None or self._of_gradients is None:
            return lambda values, raw: keep(values)
        if view is not None and view.gate is not None:
            raise UnsupportedError(
                f"{site.label}: gradients with respect to gated outputs are not given; use resid_mid"
            )
        gradients, of = self.gradients, self._of_gradients
        keep_gradient = of._logits(site) if site.name == "logits" else of._keeping(site, layer)

        def record(values: Tensor, raw: Tensor) -> None:
            keep(values)
            gradients.watch(f"{site.label} of layer {layer}", raw, lambda g: keep_gradient(view.of(g) if view else g))

        return record

    def _keeping(self, site: Site, layer: int) -> Callable[[Tensor], None]:
        heads = None if site.heads is None else list(site.heads)

        def record(values: Tensor) -> None:
            selection = self._chosen(site, site.positions, values)
            if selection is None:
                return
            if heads is not None:
                values = values[:, :, heads]
            taken = take(values, selection, axis=1)
            if site.reduce is not None:
                taken = reduce_axis(taken, None if selection.full else selection.valid, 1, site.reduce)
                self._store(site, layer, taken, selection.valid.any(dim=1, keepdim=True))
            else:
                self._store(site, layer, taken, selection.valid)

        return record

    def logits(self, site: Site) -> Callable[[Tensor, Tensor], None]:
        """A function that records the model's logits [row, position, d_vocab], which may be those of the last positions
        alone.

        Raises:
            UnsupportedError: logits of a position for which the model computed none.
        """
        return self._watching(site, 0, self._logits(site), None)

    def _logits(self, site: Site) -> Callable[[Tensor], None]:

        def record(values: Tensor) -> None:
            selection = self.calls.select(site.positions)
            if selection is None:
                return
            length = self.calls.batch.length if self.calls.is_prefill else 1
            missing = length - values.shape[1]
            if missing:
                index = selection.index.to(values.device) - missing
                if bool((index[selection.valid.to(values.device)] < 0).any()):
                    raise UnsupportedError(
                        f"{site.label}: the model computed logits of the last {values.shape[1]} positions alone; in "
                        'generate, record positions="last", and those of other positions by vlm.forward'
                    )
                everything = selection.everything or (selection.full and selection.count == values.shape[1])
                selection = Selection(index.clamp(min=0), selection.valid, selection.full, everything)
            taken = take(values, selection, axis=1)
            if site.reduce is not None:
                taken = reduce_axis(taken, None if selection.full else selection.valid, 1, site.reduce)
                self._store(site, 0, taken, selection.valid.any(dim=1, keepdim=True))
            else:
                self._store(site, 0, taken, selection.valid)

        return record

    # -- attention --------------------------------------------------------------------------------------------------

    def attention(self, site: Site, layer: int) -> Observer:
        """An observer that records attention weights, and watches what they are weights of if gradients are wanted."""
        if self.gradients is None or self._of_gradients is None:
            return self._attention(site, layer)
        where = f"{site.label} of layer {layer}"
        return _Watching(
            where, self._attention(site, layer), self._of_gradients._attention(site, layer), self.gradients
        )

    def _store_attention(self, site: Site, layer: int, values: Tensor, valid: Tensor, key_valid: Tensor) -> None:
        self._store_attention_in(self.trace.steps[-1], site, layer, values, valid, key_valid)

    def _store_attention_in(
        self, step: Step, site: Site, layer: int, values: Tensor, valid: Tensor, key_valid: Tensor
    ) -> None:
        self._store_in(step, site, layer, values, valid)
        step.key_masks.setdefault(site.label, key_valid)

    def _attention(self, site: Site, layer: int) -> AttentionRecorder:
        packed = site.is_vision and self.anatomy.tower.unpack is not None

        def later(call: DecodeCall) -> bool:
            if self.calls.number < 1:
                return False
            self._late_attention.remember(self.trace.steps[-1], site, layer, call)
            return True

        return AttentionRecorder(
            site,
            partial(self._chosen_attention, site),
            partial(self._store_attention, site, layer),
            tiles=partial(self.tiles, False) if packed else None,
            has_cls=self.anatomy.has_cls,
            later=None if site.is_vision or self.gradients is not None else later,
        )

    def _chosen_attention(self, site: Site, call: AttentionCall | DecodeCall) -> Chosen | None:
        queries = self._chosen(site, site.queries, call.query, axis=2)
        first = 0
        if site.is_vision:
            keys = self._chosen(site, site.keys, call.query, axis=2)
        elif site.name == "cross_attention":
            mask = self.calls.batch.cross_mask
            keys = Selection.of(mask) if mask is not None and bool(mask.any()) else None
        else:
            keys = self.calls.select_keys(site.keys)
            # a sliding window's cache holds the last keys alone
            first = max(0, self.calls.batch.length + max(self.calls.number, 0) - call.n_keys)
        return None if queries is None or keys is None else Chosen(queries, keys, first)


class _Watching:
    """Records attention weights, and once the model has been differentiated, the derivatives by them."""

    def __init__(self, where: str, values: Observer, of_gradients: Observer, gradients: Gradients) -> None:
        self.where = where
        self.values = values
        self.of_gradients = of_gradients
        self.gradients = gradients
        self._seen: list[AttentionCall] = []

    def see(self, call: AttentionCall) -> None:
        """One call of the attention function."""
        self.values.see(call)
        self._seen.append(call)

    def end(self) -> None:
        """The module's forward is over."""
        self.values.end()
        seen, self._seen = self._seen, []
        for call in seen:
            if call.output is None:
                raise UnsupportedError(
                    f"{self.where}: no gradients with respect to attention over packed sequences; load the model with "
                    "attn_implementation='sdpa'"
                )
            self.gradients.watch(self.where, call.output, partial(self._take, call, last=call is seen[-1]))

    def _take(self, call: AttentionCall, gradient: Tensor, *, last: bool) -> None:
        self.of_gradients.see(slopes(call, gradient))
        if last:
            self.of_gradients.end()
