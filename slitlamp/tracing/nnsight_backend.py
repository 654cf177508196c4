"""Recording through nnsight instead of hooks: the same sites and the same tensors, here or on a server (NDIF).

What is recorded is chosen and reduced where the model runs (`slitlamp.tracing.model_side`), so that a server sends what was
asked for and no more. nnsight changes the modules of the model that it is given; it is given a copy of the modules that
shares the weights.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from slitlamp.tracing.places import View
from slitlamp.tracing.recorder import Recorder
from slitlamp.tracing.reductions import reduce_axis
from slitlamp.tracing.sites import Site
from slitlamp.tracing.trace import Trace
from slitlamp.tracing.wanted import TilesOf, wanted_of

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
        tiles = TilesOf(model, anatomy, batch)
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
            if (wanted := wanted_of(site, layer, anatomy, calls, tiles, wrapped, kept, decoding)) is not None
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

    path = list(sys.path)  # a rehearsal takes folders out and puts them back at the end
    before = slitlamp.__name__ in cloudpickle.list_registry_pickle_by_value()
    if not before:
        cloudpickle.register_pickle_by_value(slitlamp)
    try:
        yield
    finally:
        sys.path[:] = path
        if not before and slitlamp.__name__ in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.unregister_pickle_by_value(slitlamp)


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
