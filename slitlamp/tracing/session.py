"""One run of a model with recorders and edits attached: attached when it starts, gone when it ends, however it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import Batch
from slitlamp.tracing.attention_tap import Rows, observed, tapped
from slitlamp.tracing.call import Calls, Selection, vision_selection
from slitlamp.tracing.reductions import reduce_axis, take
from slitlamp.tracing.sites import Positions, Site, layers_of
from slitlamp.tracing.trace import Step, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EDITABLE = ("resid_pre", "resid_post", "z", "mlp_out", "projector_out", "vision_resid_post")


@dataclass(frozen=True)
class Edit:
    """A change of what the model computes at a site.

    Attributes:
        site: `resid_pre`, `resid_post`, `z`, `mlp_out`, `projector_out` or `vision_resid_post`.
        layer: 0-based (0 for `projector_out`).
        function: (values, calls) -> new values of the same shape: [batch, position, d_model], or for `z`
            [batch, position, head, d_head]. It must not write into `values`.
    """

    site: str
    layer: int
    function: Callable[[Tensor, Calls], Tensor]


@dataclass(frozen=True)
class _Place:
    """A module and the side of it where a site's values pass."""

    module: nn.Module
    at_input: bool
    n_heads: int | None = None


def _place(model: nn.Module, anatomy: Anatomy, site: str, layer: int) -> _Place:
    if site == "resid_pre":
        return _Place(model.get_submodule(anatomy.blocks[layer]), at_input=True)
    if site == "resid_post":
        return _Place(model.get_submodule(anatomy.blocks[layer]), at_input=False)
    if site == "z":
        return _Place(model.get_submodule(anatomy.out_proj(layer)), at_input=True, n_heads=anatomy.n_heads)
    if site == "mlp_out":
        return _Place(model.get_submodule(anatomy.mlp(layer)), at_input=False)
    if site == "vision_resid_post":
        return _Place(model.get_submodule(anatomy.vision_blocks[layer]), at_input=False)
    if site == "projector_out":
        return _Place(model.get_submodule(anatomy.modules["projector"]), at_input=False)
    raise InputError(f"{site!r} is not a site of states")


def _hook(place: _Place, function: Callable[[Tensor], Tensor | None], *, first: bool) -> RemovableHandle:
    """Call a function on the values that pass a place; what it returns, unless None, takes their place.

    `first` puts it before hooks that are there already: transformers captures `hidden_states`, from which LLaVA takes
    its image features, by hooks of its own, and an edit must come before them.
    """

    def apply(values: Tensor) -> Tensor | None:
        if place.n_heads is None:
            return function(values)
        changed = function(values.unflatten(-1, (place.n_heads, -1)))
        return None if changed is None else changed.flatten(-2)

    if place.at_input:

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            changed = apply(args[0] if args else kwargs["hidden_states"])
            if changed is None:
                return None
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

        return place.module.register_forward_pre_hook(before, with_kwargs=True, prepend=first)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        changed = apply(output[0] if isinstance(output, tuple) else output)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return place.module.register_forward_hook(after, prepend=first)


def _chosen(
    site: Site, positions: Positions, calls: Calls, anatomy: Anatomy, rows: int, length: int, device: Any
) -> Selection | None:
    if site.is_vision:
        return vision_selection(rows, length, positions, anatomy.has_cls and site.name != "projector_out", device)
    return calls.select(positions)


class Recorder:
    """Fills a trace during one run."""

    def __init__(self, trace: Trace, anatomy: Anatomy, calls: Calls) -> None:
        self.trace = trace
        self.anatomy = anatomy
        self.calls = calls

    def begin(self) -> None:
        """A forward call starts. That over the prompt has its step already, for what ran ahead of it (the vision tower)."""
        if not self.trace.steps or self.calls.number > 0:
            self.trace.steps.append(Step())

    def _store(self, site: Site, layer: int, values: Tensor, mask: Tensor) -> None:
        step = self.trace.steps[-1]
        step.values.setdefault(site.label, {})[layer] = values
        step.masks.setdefault(site.label, mask)

    def state(self, site: Site, layer: int) -> Callable[[Tensor], None]:
        """A function that records the values passing a site of states."""

        def record(values: Tensor) -> None:
            selection = _chosen(
                site, site.positions, self.calls, self.anatomy, values.shape[0], values.shape[1], values.device
            )
            if selection is None:
                return
            if site.heads is not None:
                values = values[:, :, list(site.heads)]
            taken = take(values, selection, axis=1)
            if site.reduce is not None:
                taken = reduce_axis(taken, None if selection.full else selection.valid, 1, site.reduce)
                self._store(site, layer, taken, selection.valid.any(dim=1, keepdim=True))
            else:
                self._store(site, layer, taken, selection.valid)

        return record

    def rows(self, site: Site, layer: int) -> Rows:
        """A function that records attention weights."""

        def record(weights: Callable[[Tensor | None], Tensor], query: Tensor) -> None:
            rows, length, device = query.shape[0], query.shape[2], query.device
            queries = _chosen(site, site.queries, self.calls, self.anatomy, rows, length, device)
            if queries is None:
                return
            if site.is_vision:
                keys: Selection | None = vision_selection(rows, length, site.keys, self.anatomy.has_cls, device)
            else:
                keys = self.calls.select_keys(site.keys)
            if keys is None:
                return
            taken = weights(None if queries.everything else queries.index.to(device))
            if site.heads is not None:
                taken = taken[:, list(site.heads)]
            taken = take(taken, keys, axis=3)
            if not queries.full:
                taken = taken.masked_fill(~queries.valid.to(device)[:, None, :, None], 0)
            if site.reduce_keys is not None:
                taken = reduce_axis(taken, None if keys.full else keys.valid, 3, site.reduce_keys)
            if site.reduce_queries is not None:
                taken = reduce_axis(taken, None if queries.full else queries.valid, 2, site.reduce_queries)
            if site.reduce_heads is not None:
                taken = reduce_axis(taken, None, 1, site.reduce_heads)
            valid = queries.valid if site.reduce_queries is None else queries.valid.any(dim=1, keepdim=True)
            self._store(site, layer, taken, valid)
            self.trace.steps[-1].key_masks.setdefault(site.label, keys.valid)

        return record


@contextmanager
def session(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batch: Batch,
    *,
    traces: Sequence[Trace] = (),
    edits: Sequence[Edit] = (),
    end_tokens: tuple[int, ...] = (),
    decoding: bool = False,
) -> Iterator[Calls]:
    """Attach recorders and edits to a model for one run.

    Edits act in the order given; a recording at the site of an edit shows the edited values.

    Args:
        model: the Hugging Face model. On exit, exceptions included, it has the hooks and attention it had before.
        anatomy: its anatomy.
        batch: what it will run on.
        traces: to be filled.
        edits: to be made.
        end_tokens: ids that end a row; what is computed for a row after it has ended is not recorded.
        decoding: whether the run may make more than one forward call.

    Raises:
        InputError: a trace that holds a run already, a mask that does not fit the batch, an edit of a layer outside the
            model or one that changes shape or dtype, or a model in training mode.
        UnsupportedError: an edit of a site that cannot be edited.
    """
    if model.training:
        raise InputError("the model is in training mode (dropout would change every answer); call model.eval() first")
    for trace in traces:
        if trace.batch is not None:
            raise InputError("a trace holds one run; open a new one for the next")
    for edit in edits:
        if edit.site not in EDITABLE:
            raise UnsupportedError(f"{edit.site!r} cannot be edited; sites that can: {', '.join(EDITABLE)}")
        n_layers = layers_of(edit.site, anatomy)
        if not 0 <= edit.layer < n_layers:
            raise InputError(f"an edit of layer {edit.layer} of {edit.site}, which has layers 0 to {n_layers - 1}")

    calls = Calls(batch, end_tokens)
    for trace in traces:
        for site in trace.sites.values():
            calls.check(site)
    recorders = [Recorder(trace, anatomy, calls) for trace in traces]
    observers: dict[nn.Module, list[Rows]] = {}
    with ExitStack() as stack:

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.begin(args[0] if args else kwargs.get("input_ids"))
            for recorder in recorders:
                recorder.begin()

        stack.callback(model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True).remove)
        for edit in reversed(edits):  # each goes before those registered already

            def change(values: Tensor, edit: Edit = edit) -> Tensor:
                changed = edit.function(values, calls)
                if changed.shape != values.shape or changed.dtype != values.dtype:
                    raise InputError(
                        f"an edit of {edit.site} must give {values.dtype} {list(values.shape)}; "
                        f"it gave {changed.dtype} {list(changed.shape)}"
                    )
                return changed

            stack.callback(_hook(_place(model, anatomy, edit.site, edit.layer), change, first=True).remove)
        for recorder in recorders:
            recorder.trace.batch = batch
            recorder.trace.decoding = decoding
            recorder.begin()
            for site in recorder.trace.sites.values():
                for layer in site.layers or ():
                    if site.is_attention:
                        path = anatomy.vision_attention_of(layer) if site.is_vision else anatomy.attention(layer)
                        observers.setdefault(model.get_submodule(path), []).append(recorder.rows(site, layer))
                    else:
                        place = _place(model, anatomy, site.name, layer)
                        stack.callback(_hook(place, recorder.state(site, layer), first=False).remove)
        if observers:
            stack.enter_context(tapped(model))
            stack.enter_context(observed(observers))
        yield calls
