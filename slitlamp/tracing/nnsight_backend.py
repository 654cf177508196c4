"""Recording through nnsight instead of hooks: the same sites and the same tensors, here or on a server (NDIF).

What is recorded is chosen and reduced where the model runs (`slitlamp.tracing.model_side`), so that a server sends what was
asked for and no more. nnsight changes the modules of the model that it is given; it is given a copy of the modules that
shares the weights.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import Batch
from slitlamp.models.placement import input_device
from slitlamp.tracing.attention_recorder import Chosen, Gathered
from slitlamp.tracing.call import Calls, Selection
from slitlamp.tracing.model_state import check_model, is_compiled
from slitlamp.tracing.nonfinite import check_finite
from slitlamp.tracing.places import Tiles, View
from slitlamp.tracing.recorder import Recorder
from slitlamp.tracing.reductions import reduce_axis
from slitlamp.tracing.sites import Positions, Site
from slitlamp.tracing.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

TASK = "image-text-to-text"


@dataclass(frozen=True)
class NNsight:
    """How a run goes through nnsight.

    Attributes:
        remote: False to run here; True to run on the server that nnsight is configured for (NDIF), or its URL; "local" to
            do here all that is done for a server but sending: the run is serialised and read back without our modules.
        revision: of the model's repository on the hub, by which a server knows it.
    """

    remote: bool | str = False
    revision: str | None = None

    def run(
        self,
        model: PreTrainedModel,
        processor: Any,
        anatomy: Anatomy,
        batch: Batch,
        traces: Sequence[Trace],
        method: Literal["forward", "generate"],
        arguments: Mapping[str, Any],
        *,
        end_tokens: tuple[int, ...] = (),
    ) -> Any:
        """Run the model and fill traces.

        Args:
            model, processor, anatomy: of the VLM.
            batch: what it runs on.
            traces: to be filled.
            method: of the model.
            arguments: for it.
            end_tokens: ids that end a row.

        Returns:
            What the method returns; of a run on a server, of `forward`, an output that has `logits` alone.

        Raises:
            ImportError: nnsight is not installed.
            InputError: a trace that holds a run already, a model in training mode, a model that a server cannot know.
            UnsupportedError: gradients; compiled modules; attention of a packed vision tower; a model whose attention
                cannot be found.
            NonFiniteError: a trace whose policy is "raise" recorded NaN or infinity.
        """
        try:
            import nnsight
            from nnsight import TransformersModel
        except ImportError as error:
            raise ImportError('backend="nnsight" needs nnsight: pip install nnsight') from error
        decoding = method == "generate"
        _check(model, traces, batch, self.remote)
        calls = Calls(batch, end_tokens)
        for trace in traces:
            for site in trace.sites.values():
                calls.check(site)
        tiles = _TilesOf(model, anatomy, batch)
        recorders = [Recorder(trace, anatomy, calls, tiles) for trace in traces]
        kept = 1 if decoding else int(arguments.get("logits_to_keep", 0)) or batch.length
        wrapped = TransformersModel(
            _shadow(model),
            task=TASK,
            processor=copy.deepcopy(processor),
            revision=self.revision,
            device=model.device,  # or transformers would move the weights to the first GPU
        )
        plan = [
            (recorder, site, layer, wanted)
            for recorder in recorders
            for site in recorder.trace.sites.values()
            for layer in site.layers or ()
            if (wanted := _wanted(site, layer, anatomy, calls, tiles, wrapped, kept, decoding)) is not None
        ]
        log.debug("%d recordings through nnsight, remote=%r", len(plan), self.remote)
        with _by_value(self.remote), torch.no_grad(), warnings.catch_warnings():
            # a loop over the steps of a generation ends when there are no more of them
            warnings.filterwarnings("ignore", message=".*was never reached: the loop asked for a step")
            inputs, rest = _split(arguments, batch)
            found = _interleave(
                nnsight, wrapped, method, inputs, rest, [one for *_, one in plan], {"remote": self.remote}
            )
        output = found["output"]
        sequences = None
        if decoding:
            sequences = output if isinstance(output, Tensor) else output.sequences
        n_calls = 1 if sequences is None else sequences.shape[1] - batch.length
        for recorder in recorders:
            recorder.trace.start(batch, decoding=decoding)
            recorder.begin()
        for number in range(n_calls):
            calls.begin(batch.input_ids if number == 0 else _fed(sequences, batch.length + number - 1, batch))
            for recorder in recorders:
                recorder.begin()
            for place, (recorder, site, layer, wanted) in enumerate(plan):
                if number < len(found[place]):
                    _replay(recorder, site, layer, wanted, number, found[place][number])
        for trace in traces:
            check_finite(trace, trace.nonfinite)
            trace.finish()
        if decoding or self.remote is False:
            return output
        from transformers.modeling_outputs import CausalLMOutput

        return CausalLMOutput(logits=output)


def _interleave(
    nnsight: Any,
    model: Any,
    method: str,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any],
    plan: Sequence[Any],
    where: Mapping[str, Any],
) -> Any:
    """The traced block: it is sent to a server as source, with the names that it uses.

    Every recording has an invoke of its own over the whole batch, so that the order in which the model reaches their places
    does not matter.
    """
    from slitlamp.tracing.model_side import follow

    whole = method == "generate" or where["remote"] is False
    run = model.generate if method == "generate" else model.trace
    with run(**options, **where) as tracer:
        found = nnsight.save({})
        with tracer.invoke(**inputs):
            found["output"] = tracer.result if whole else tracer.result.logits
        for number, wanted in enumerate(plan):
            found[number] = []
            with tracer.invoke():
                follow(tracer, model, wanted, found[number])
    return found


def _check(model: PreTrainedModel, traces: Sequence[Trace], batch: Batch, remote: bool | str) -> None:
    check_model(model)
    if is_compiled(model):
        raise UnsupportedError('nnsight cannot read inside compiled modules: leave out backend="nnsight"')
    for trace in traces:
        trace.admit(batch)
        if trace.gradient_of is not None:
            raise UnsupportedError('gradients are computed with hooks: leave out backend="nnsight"')
    if remote in (False, "local"):
        if input_device(model).type == "meta":
            raise InputError('this model has no weights here; run it with backend="nnsight" and remote=True')
    elif not model.name_or_path:
        raise InputError(
            "a server knows models of the hub by their name, and this one has none; use VLM.remote(name) or "
            "VLM.from_pretrained(name)"
        )


def _shadow(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules that shares parameters and buffers."""
    shared: dict[int, Any] = {id(one): one for one in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _split(arguments: Mapping[str, Any], batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an invoke takes (tensors of the batch), and what the call as a whole takes."""
    inputs = {name: value for name, value in arguments.items() if isinstance(value, Tensor) or name in batch.inputs()}
    return inputs, {name: value for name, value in arguments.items() if name not in inputs}


def _fed(sequences: Tensor | None, column: int, batch: Batch) -> Tensor:
    if sequences is None:
        raise InputError("a forward pass makes one call")
    return sequences[:, column, None].to(batch.device)


@contextmanager
def _by_value(remote: bool | str) -> Iterator[None]:
    """While a run is serialised for a server, our functions go as source: a server has no slitlamp."""
    if remote is False:
        yield
        return
    import cloudpickle  # type: ignore[import-untyped]

    import slitlamp

    before = slitlamp.__name__ in cloudpickle.list_registry_pickle_by_value()
    if not before:
        cloudpickle.register_pickle_by_value(slitlamp)
    try:
        yield
    finally:
        if not before and slitlamp.__name__ in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.unregister_pickle_by_value(slitlamp)


class _TilesOf:
    """Where each tile is in the sequence of a tower that runs over all of them at once."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, batch: Batch) -> None:
        self._unpack = anatomy.tower.unpack if any(batch.images) else None
        self._config, self._inputs = model.config, batch.extra
        self._found: dict[bool, Tiles | None] = {}

    def __call__(self, merged: bool) -> Tiles | None:
        if self._unpack is None:
            return None
        if merged not in self._found:
            tiles = self._unpack(self._config, self._inputs, merged)
            self._found[merged] = Tiles.of(tiles) if tiles else None
        return self._found[merged]


# -- what is wanted of one place, in plain values ---------------------------------------------------------------------


def _wanted(
    site: Site,
    layer: int,
    anatomy: Anatomy,
    calls: Calls,
    tiles: _TilesOf,
    wrapped: Any,
    kept: int,
    decoding: bool,
) -> Any:
    """What is sent to the model for one recording; None where nothing of it can come in this run."""
    batch, place = calls.batch, anatomy.place(site.name, layer)
    cross = site.name == "cross_attention"
    no_image = site.is_vision or cross or anatomy.attention_types[layer] == "cross_attention"
    if no_image and not any(batch.images):
        return None
    wanted = SimpleNamespace(
        kind="attention" if site.is_attention else "logits" if site.name == "logits" else "state",
        path=place.path,
        at_input=place.at_input,
        heads=None if site.heads is None else list(site.heads),
        n_heads=place.heads,
        third=place.third,
        gate=place.gate,
        tanh=place.tanh,
        reduce=site.reduce,
        reduce_queries=site.reduce_queries,
        reduce_keys=site.reduce_keys,
        reduce_heads=site.reduce_heads,
        vision=site.is_vision,
        has_cls=anatomy.has_cls and site.name != "projector_out",
        cross=cross,
        rows=batch.size,
        length=batch.length,
        tiles=None,
        once=True,
    )
    if site.is_vision:
        packed = tiles(site.name == "projector_out")
        wanted.tiles = None if packed is None else (packed.index, packed.valid)
    if site.is_attention:
        return _wanted_attention(wanted, site, anatomy, calls, wrapped, decoding)
    if site.is_vision:
        wanted.positions = site.positions
        return wanted
    in_steps = decoding and _in_steps(site.positions)
    selection = calls.select(site.positions)
    wanted.once = not in_steps
    if selection is None:
        if not in_steps:
            return None
        selection = _nothing(batch)
    if wanted.kind == "logits" and bool((selection.index[selection.valid] < batch.length - kept).any()):
        raise UnsupportedError(
            f"{site.label}: the model computes logits of the last {kept} positions alone; in generate, record "
            'positions="last", and those of other positions by vlm.forward'
        )
    wanted.positions = _plain(selection)
    return wanted


def _wanted_attention(wanted: Any, site: Site, anatomy: Anatomy, calls: Calls, wrapped: Any, decoding: bool) -> Any:
    if site.is_vision and anatomy.tower.unpack is not None:
        raise UnsupportedError(
            f"{site.label}: attention of this {anatomy.family.name}'s vision tower, which runs over all tiles as one sequence, "
            'is not recorded through nnsight; leave out backend="nnsight"'
        )
    wanted.operation = _operation(wrapped, wanted.path)
    if site.is_vision:
        wanted.queries, wanted.keys = site.queries, site.keys
        return wanted
    in_steps = decoding and _in_steps(site.queries)
    wanted.once = not in_steps
    queries = calls.select(site.queries)
    if wanted.cross:
        mask = calls.batch.cross_mask
        keys = Selection.of(mask) if mask is not None and bool(mask.any()) else None
    else:
        keys = calls.select_keys(site.keys)
    wanted.fixed_keys = wanted.cross or not _in_steps(site.keys)
    if (queries is None and not in_steps) or (keys is None and wanted.fixed_keys):
        return None
    wanted.queries = _plain(queries or _nothing(calls.batch))
    wanted.keys = _plain(keys or _nothing(calls.batch))
    return wanted


def _in_steps(positions: Positions) -> bool:
    """Whether tokens that are fed back in a generation are among the positions."""
    return isinstance(positions, str) and positions != "image"


def _nothing(batch: Batch) -> Selection:
    index = torch.zeros(batch.size, 0, dtype=torch.int64, device=batch.device)
    return Selection(index, index.bool(), full=True, everything=False)


def _plain(selection: Selection) -> Any:
    return SimpleNamespace(
        index=selection.index,
        valid=selection.valid,
        full=selection.full,
        everything=selection.everything,
        count=selection.count,
    )


def _operation(wrapped: Any, path: str) -> str:
    """nnsight's name of the call of the attention function in a module's forward."""
    from slitlamp.tracing.model_side import at

    part = at(wrapped, path)
    calls = [name for name in part.source.names if name.startswith("attention_interface_")]
    if not calls:
        raise UnsupportedError(
            f"nnsight finds no call of transformers' attention interface in {type(part._module).__name__}, so its attention "
            'cannot be recorded; leave out backend="nnsight"'
        )
    return max(calls, key=lambda name: int(name.rpartition("_")[2]))


# -- what came back ---------------------------------------------------------------------------------------------------


def _replay(recorder: Recorder, site: Site, layer: int, wanted: Any, number: int, came: Any) -> None:
    """Store what came of one recording in one forward call."""
    if number == 0:
        values, *masks = came
        if values is None or any(mask.shape[1] == 0 for mask in masks):
            return
        reduced = site.reduce_queries if site.is_attention else site.reduce
        valid = masks[0] if reduced is None else masks[0].any(dim=1, keepdim=True)
        recorder._store(site, layer, values, valid)
        if site.is_attention:
            recorder.trace.steps[-1].key_masks.setdefault(site.label, masks[1])
    elif wanted.kind == "state":
        recorder.state(site, layer, View(recorder.anatomy.place(site.name, layer)))(came, came)
    elif wanted.kind == "logits":
        recorder.logits(site)(came, came)
    else:
        _replay_rows(recorder, site, layer, wanted, came)


def _replay_rows(recorder: Recorder, site: Site, layer: int, wanted: Any, rows: Tensor) -> None:
    """Store the weights of one query per row: [row, head, 1, key] over all keys, or over chosen ones (reduced, if so asked)
    where those are the same in every step.
    """
    calls = recorder.calls
    mask = calls.batch.cross_mask
    queries = calls.select(site.queries)
    keys = Selection.of(mask) if wanted.cross and mask is not None else calls.select_keys(site.keys)
    if queries is None or keys is None:
        return
    if wanted.fixed_keys:
        rows = rows * queries.valid.to(rows.device).view(-1, 1, 1, *[1] * (rows.ndim - 3))  # no keys: NaN stays
        if site.reduce_heads is not None:
            rows = reduce_axis(rows, None, 1, site.reduce_heads)
        if site.reduce_queries is not None:
            axis = 2 if site.reduce_heads is None else 1
            rows = reduce_axis(rows, None if queries.full else queries.valid, axis, site.reduce_queries)
        values: Tensor | None = rows
    else:
        gathered = Gathered(site, Chosen(queries, keys))
        gathered.add(rows, slice(None), slice(0, 1))
        values = gathered.result()
    if values is not None:
        recorder._store(site, layer, values, queries.valid)
        recorder.trace.steps[-1].key_masks.setdefault(site.label, keys.valid)
