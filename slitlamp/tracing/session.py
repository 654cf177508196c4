"""One run of a model with recorders and edits attached: attached when it starts, gone when it ends, however it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import Batch
from slitlamp.tracing.attention_edit import AttentionEdit, Editor, check_attention_edit
from slitlamp.tracing.attention_rows import Observer
from slitlamp.tracing.attention_tap import observed
from slitlamp.tracing.call import Calls
from slitlamp.tracing.gradients import followed_embeddings, followed_inputs
from slitlamp.tracing.model_state import check_model, uncompiled
from slitlamp.tracing.nonfinite import check_finite
from slitlamp.tracing.pause import Pause
from slitlamp.tracing.places import Tiles, View, hook
from slitlamp.tracing.recorder import Recorder
from slitlamp.tracing.site_checks import n_layers_of
from slitlamp.tracing.sites import STATE_SITES
from slitlamp.tracing.trace import Trace
from slitlamp.tracing.weights_edit import WeightsEdit, WeightsEditor, check_weights_edit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Edit:
    """A change of what the model computes at a site.

    Attributes:
        site: any site of states but `logits`; not the queries, keys and values of a fused projection, nor an output that
            the block multiplies by a gate.
        layer: 0-based (0 for `projector_out`).
        function: (values, calls) -> new values of the same shape, as the site gives them: [batch, position, d_model], or
            for `z` [batch, position, head, d_head]. It must not write into `values`.
        prefill_only: whether it acts in the forward call over the prompt alone, and is not called after it.
    """

    site: str
    layer: int
    function: Callable[[Tensor, Calls], Tensor]
    prefill_only: bool = False


AnyEdit = Edit | AttentionEdit | WeightsEdit
"""A change of what the model computes: of the values at a site, or of attention before or after its softmax."""


def only_in_prefill(edit: AnyEdit) -> bool:
    """Whether an edit does nothing in the decode steps of a generation."""
    if isinstance(edit, WeightsEdit) and edit.tower == "vision":
        return True
    if isinstance(edit, AttentionEdit | WeightsEdit):
        return not isinstance(edit.queries, str) or edit.queries == "image"  # no token that is decoded is among these
    return edit.prefill_only or edit.site == "projector_out" or edit.site.startswith("vision_")


class _Run:
    """What the hooks of one run need: the model, its anatomy, the batch."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, batch: Batch) -> None:
        self.model = model
        self.anatomy = anatomy
        self.batch = batch
        self._tiles: dict[bool, Tiles | None] = {}

    def tiles(self, merged: bool) -> Tiles | None:
        """Where each tile is in the sequence of a tower that runs over all of them at once."""
        unpack = self.anatomy.tower.unpack
        if unpack is None or not any(self.batch.images):
            return None
        if merged not in self._tiles:
            found = unpack(self.model.config, self.batch.extra, merged)
            self._tiles[merged] = Tiles.of(found) if found else None
        return self._tiles[merged]

    def view(self, site: str, layer: int) -> View:
        """How the values of a site of states are given."""
        place = self.anatomy.place(site, layer)
        gate = None if place.gate is None else partial(_gate, self.model, place.gate, place.tanh)
        if site == "projector_out" or site.startswith("vision_"):
            return View(place, tiles=self.tiles(site == "projector_out"), gate=gate)
        return View(place, rows=self.batch.size, gate=gate)

    def module(self, site: str, layer: int) -> nn.Module:
        """The module of a site."""
        return self.model.get_submodule(self.anatomy.place(site, layer).path)


def _gate(model: nn.Module, path: str, tanh: bool) -> Tensor:
    value = model.get_parameter(path)
    return value.tanh() if tanh else value


@contextmanager
def session(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batch: Batch,
    *,
    traces: Sequence[Trace] = (),
    edits: Sequence[AnyEdit] = (),
    end_tokens: tuple[int, ...] = (),
    decoding: bool = False,
    pause: Pause | None = None,
) -> Iterator[Calls]:
    """Attach recorders and edits to a model for one run.

    Features that a batch brings for its image tokens are put in before all edits. Edits act in the order given; a recording at
    the site of an edit shows the edited values. Edits of attention before the softmax add up, and act before those after it.

    Args:
        model: the Hugging Face model. On exit, exceptions included, it has the hooks and attention it had before.
        anatomy: its anatomy.
        batch: what it will run on.
        traces: to be filled.
        edits: to be made.
        end_tokens: ids that end a row; what is computed for a row after it has ended is not recorded.
        decoding: whether the run may make more than one forward call.
        pause: by which a run with `decoding` is paused, for the model to run over something else in between.

    Raises:
        InputError: a trace that holds a run already, a mask that does not fit the batch, an edit of a layer outside the
            model or one that changes shape or dtype, or a model of which a part is in training mode.
        UnsupportedError: an edit of a site that cannot be edited, or the wrapper that torch.compile(model) returns.
        NonFiniteError: a trace whose policy is "raise" recorded NaN or infinity.
    """
    check_model(model)
    pause = pause or Pause()
    for trace in traces:
        trace.admit(batch)
        if trace.gradient_of is not None and decoding:
            raise InputError(
                "gradients need one forward pass: vlm.forward(batch) or vlm.forward(generation.teacher_forced())"
            )
    if batch.features is not None:
        edits = [_features_of(batch, batch.features), *edits]
    of_states = [edit for edit in edits if isinstance(edit, Edit)]
    of_attention = [edit for edit in edits if isinstance(edit, AttentionEdit)]
    of_weights = [edit for edit in edits if isinstance(edit, WeightsEdit)]
    for edit in of_states:
        if edit.site not in STATE_SITES or edit.site == "logits":
            editable = ", ".join(name for name in STATE_SITES if name in anatomy.places and name != "logits")
            raise UnsupportedError(f"{edit.site!r} cannot be edited; sites that can: {editable}")
        n_layers = n_layers_of(edit.site, anatomy)
        if not 0 <= edit.layer < n_layers:
            raise InputError(f"an edit of layer {edit.layer} of {edit.site}, which has layers 0 to {n_layers - 1}")
        anatomy.place(edit.site, edit.layer)

    calls = Calls(batch, end_tokens)
    for trace in traces:
        for site in trace.sites.values():
            calls.check(site)
    for one in of_attention:
        check_attention_edit(one, anatomy, calls)
    for each in of_weights:
        check_weights_edit(each, anatomy, calls)
    run = _Run(model, anatomy, batch)
    recorders = [Recorder(trace, anatomy, calls, run.tiles) for trace in traces]
    observers: dict[nn.Module, list[Observer]] = {}
    of_prompt: list[RemovableHandle] = []
    wanted = [recorder for recorder in recorders if recorder.gradients is not None]
    with ExitStack() as stack:
        if traces or edits:
            stack.enter_context(uncompiled(model))

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
            calls.begin(next((one for one in given if one is not None), None))
            for recorder in recorders:
                recorder.begin()

        def follow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, followed_inputs(model, kwargs)

        if wanted:
            stack.enter_context(torch.enable_grad())
            stack.callback(model.register_forward_pre_hook(follow, with_kwargs=True, prepend=True).remove)
            stack.callback(model.get_input_embeddings().register_forward_hook(followed_embeddings).remove)

        generator = model.get_submodule(anatomy.modules["generator"])
        stack.callback(generator.register_forward_pre_hook(pause.over(begin), with_kwargs=True, prepend=True).remove)
        for edit in reversed(of_states):  # each goes before those registered already
            view = run.view(edit.site, edit.layer)
            if not view.can_be_changed:
                raise UnsupportedError(_why_not(edit, view))

            def change(values: Tensor, raw: Tensor, edit: Edit = edit) -> Tensor:
                changed = edit.function(values, calls)
                if changed.shape != values.shape or changed.dtype != values.dtype:
                    raise InputError(
                        f"an edit of {edit.site} must give {values.dtype} {list(values.shape)}; "
                        f"it gave {changed.dtype} {list(changed.shape)}"
                    )
                return changed

            module = run.module(edit.site, edit.layer)
            handle = hook(module, view, change, first=True, idle=pause.idle)
            stack.callback(handle.remove)
            if edit.prefill_only:
                of_prompt.append(handle)
        for recorder in recorders:
            recorder.trace.start(batch, decoding=decoding)
            recorder.begin()
            for site in recorder.trace.sites.values():
                if site.is_vision and not any(batch.images):
                    continue  # some models run their tower for nothing
                for layer in site.layers or ():
                    module = run.module(site.name, layer)
                    if site.is_attention:
                        observers.setdefault(module, []).append(recorder.attention(site, layer))
                    elif site.name == "logits":
                        stack.callback(_hook_logits(module, recorder.logits(site), pause).remove)
                    else:
                        view = run.view(site.name, layer)
                        record, later = recorder.state(site, layer, view), recorder.later(site, layer, view)
                        handle = hook(module, view, record, first=False, later=later, idle=pause.idle)
                        stack.callback(handle.remove)
                        if isinstance(site.positions, Tensor) or site.positions == "image":
                            of_prompt.append(handle)  # no token that is decoded is among these positions
        editors = _editors(run, of_attention, of_weights, calls)
        if observers or editors:
            stack.enter_context(observed(observers, editors, pause))

        def end(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            grows = type(kwargs.get("past_key_values")) is DynamicCache
            while of_prompt:
                of_prompt.pop().remove()
            for recorder in recorders:
                recorder.end(grows)

        if decoding:
            for recorder in recorders:
                stack.callback(recorder.finish)
            stack.callback(generator.register_forward_hook(pause.over(end), with_kwargs=True).remove)
        if wanted:

            def differentiate(module: nn.Module, args: Any, output: Any) -> None:
                for recorder in wanted:
                    recorder.differentiate(output, keep_graph=recorder is not wanted[-1])

            stack.callback(model.register_forward_hook(differentiate).remove)
        yield calls
    for trace in traces:
        check_finite(trace, trace.nonfinite)
        trace.finish()


def _editors(
    run: _Run, before: Sequence[AttentionEdit], after: Sequence[WeightsEdit], calls: Calls
) -> dict[nn.Module, Editor]:
    """By module, the edits of attention before and after the softmax."""
    by_module: dict[nn.Module, tuple[list[AttentionEdit], list[WeightsEdit]]] = {}
    for edit in before:
        by_module.setdefault(run.module("attention", edit.layer), ([], []))[0].append(edit)
    for one in after:
        if one.tower == "language" or any(calls.batch.images):  # some models run their tower for nothing
            by_module.setdefault(run.module(one.site, one.layer), ([], []))[1].append(one)
    return {
        module: Editor(masks, calls, WeightsEditor(weights, calls) if weights else None)
        for module, (masks, weights) in by_module.items()
    }


def _features_of(batch: Batch, features: Tensor) -> Edit:
    """What puts features that a batch brings, [batch, position, d_model], where its image tokens are."""

    def put(values: Tensor, calls: Calls) -> Tensor:
        return torch.where(batch.image_mask.to(values.device)[..., None], features.to(values), values)

    return Edit("resid_pre", 0, put, prefill_only=True)


def _why_not(edit: Edit, view: View) -> str:
    """Why a site that is recorded cannot be edited."""
    if view.place.read_only:
        reason = "the block has taken the residual stream aside before it; edit attn_out or resid_pre"
    elif view.gate is not None:
        reason = "the block multiplies it by a gate; edit z or resid_post"
    else:
        reason = "it is part of a fused projection; edit z"
    return f"{edit.site!r} of layer {edit.layer} cannot be edited: {reason}"


def _hook_logits(model: nn.Module, record: Callable[[Tensor, Tensor], None], pause: Pause) -> Any:
    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record(output.logits, output.logits)

    return model.register_forward_hook(pause.over(after))
