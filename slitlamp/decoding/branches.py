"""The branches of a generation: each over a cache of its own, or, once all have run over their prompts, as one batch.

A step of decoding takes about as long as reading the weights does, whatever the number of rows, as long as they are few: one
forward pass over the rows of all branches costs far less than one for each branch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import POSITIONS, Batch
from slitlamp.tracing.pause import Pause

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ROOM = 64
"""Positions for which the keys and values of branches decoded at once have room ahead."""


class Branch:
    """One branch of a generation: what transformers prepared for it, with its own cache and positions.

    The preparation is that of the model's own `generate`, which hands it over through `custom_generate`.

    Args:
        model, anatomy: of the run.
        batch: what the branch runs on.
        pause: of the branch's session, which is paused but for the time in which the branch runs alone.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, batch: Batch, pause: Pause) -> None:
        self.anatomy = anatomy
        self.batch = batch
        self.generator: Any = None
        self.inputs: dict[str, Any] = {}
        self._model = model
        self._pause = pause
        self._ids: Tensor
        paths = [path.rpartition(".")[::2] for path in anatomy.family.kept]
        self._kept = [(model.get_submodule(owner), name) for owner, name in paths]
        self._values = [getattr(owner, name) for owner, name in self._kept]

    @contextmanager
    def _running(self) -> Iterator[None]:
        """This branch alone runs; what the model keeps of a run in itself is that of this branch."""
        theirs = [getattr(owner, name) for owner, name in self._kept]
        with self._pause.set(False):
            try:
                self._put(self._values)
                yield
            finally:
                self._values = [getattr(owner, name) for owner, name in self._kept]
                self._put(theirs)

    def _put(self, values: Sequence[Any]) -> None:
        for (owner, name), value in zip(self._kept, values, strict=True):
            setattr(owner, name, value)

    def take(self, generator: Any, ids: Tensor, inputs: dict[str, Any]) -> None:
        """What `generate` prepared: the module that generates, the ids of the prompts, and its other arguments."""
        self.generator, self._ids, self.inputs = generator, ids, inputs

    def prepare(self, arguments: Mapping[str, Any]) -> None:
        """Let `generate` prepare inputs, cache and positions from its arguments."""

        def take(
            model: Any,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: Any,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> Tensor:
            self.take(model, input_ids, model_kwargs)
            return input_ids

        with self._running():
            self._model.generate(**arguments, custom_generate=take)  # type: ignore[operator]  # as in `VLM.generate`

    def next(self, chosen: Tensor | None) -> Tensor:
        """Raw logits of the next token, float32 [batch, vocab].

        Args:
            chosen: int64 [batch], the tokens that were chosen last; None at the first step, which runs over the prompts.
        """
        if chosen is not None:
            self._ids = torch.cat([self._ids, chosen[:, None].to(self._ids.device)], dim=-1)
        with self._running():
            logits, self.inputs = _step(self.generator, self._ids, self.inputs, is_first=chosen is None)
        return logits

    def reorder(self, order: Tensor) -> None:
        """Let every row go on from another one of the same prompt, int64 [batch]."""
        self._ids = self._ids[order.to(self._ids.device)]
        self.inputs["past_key_values"].reorder_cache(order)


def _step(generator: Any, ids: Tensor, inputs: dict[str, Any], *, is_first: bool) -> tuple[Tensor, dict[str, Any]]:
    """One forward pass: logits of the next token, float32 [row, vocab], and the arguments of the pass that follows."""
    prepared = generator.prepare_inputs_for_generation(
        ids,
        next_sequence_length=None if is_first or not inputs.get("use_cache") else 1,
        is_first_iteration=is_first,
        **inputs,
    )
    output = generator(**prepared, return_dict=True)
    following = generator._update_model_kwargs_for_generation(output, inputs, is_encoder_decoder=False)
    return output.logits[:, -1].to(torch.float32, copy=True), following  # a view would hold the logits of the prompt


class Branches:
    """The branches of one generation, given the same chosen tokens.

    Args:
        branches: with as many rows each.
        together: whether decode steps may run over all of them at once: in none of them is anything recorded or edited then.
            What their caches and inputs do not allow is left alone.
    """

    def __init__(self, branches: Sequence[Branch], *, together: bool) -> None:
        self._branches = list(branches)
        self._together = together
        self._merged: _Merged | None = None

    def next(self, chosen: Tensor | None) -> list[Tensor]:
        """Raw logits of the next token of each branch, float32 [batch, vocab]; see `Branch.next`."""
        if self._together and chosen is not None:
            self._together = False
            inputs = _merge(self._branches)
            if inputs is not None:
                self._merged = _Merged(self._branches[0].generator, len(self._branches), inputs)
        if self._merged is not None and chosen is not None:
            return self._merged.next(chosen)
        return [one.next(chosen) for one in self._branches]

    def reorder(self, order: Tensor) -> None:
        """Let every row go on from another one of the same prompt, int64 [batch], in all branches."""
        if self._merged is not None:
            self._merged.reorder(order)
            return
        for one in self._branches:
            one.reorder(order)


class _Merged:
    """Branches as one batch, whose rows are theirs one after the other, over one cache."""

    def __init__(self, generator: Any, number: int, inputs: dict[str, Any]) -> None:
        self._generator = generator
        self._number = number
        self._inputs = inputs

    def next(self, chosen: Tensor) -> list[Tensor]:
        ids = chosen.repeat(self._number)[:, None]
        logits, self._inputs = _step(self._generator, ids, self._inputs, is_first=False)
        return list(logits.chunk(self._number))

    def reorder(self, order: Tensor) -> None:
        self._inputs["past_key_values"].reorder_cache(
            torch.cat([order + number * len(order) for number in range(self._number)])
        )


def _merge(branches: Sequence[Branch]) -> dict[str, Any] | None:
    """The arguments of decode steps over the rows of all branches; None where they cannot be put together.

    The keys and values of shorter branches get padding on the left, which the attention mask hides. The caches of the branches
    are used up: the first one's becomes the cache of all, the others are emptied.
    """
    caches: list[Any] = [one.inputs.get("past_key_values") for one in branches]
    if branches[0].anatomy.family.cross is not None or not all(_is_plain(cache) for cache in caches):
        return None
    aligned = {POSITIONS, *(name for one in branches for name in one.batch.aligned)}
    images = {name for one in branches for name in one.batch.extra}
    prompts = {"inputs_embeds", "mm_encoder_outputs", *images}  # used up
    known = {"past_key_values", "attention_mask", *prompts}
    along: list[dict[str, Tensor]] = []
    rest: list[dict[str, Any]] = []
    for one in branches:
        found = {name: value for name, value in one.inputs.items() if name not in known}
        along.append({name: value for name, value in found.items() if name in aligned and value is not None})
        rest.append({name: value for name, value in found.items() if name not in along[-1]})
    if POSITIONS not in along[0]:
        return None  # the model counts by itself, and would count the padding, or by what it keeps of one run
    if not all(isinstance(value, bool | int | float | str | None) for values in rest for value in values.values()):
        return None
    if any(one != rest[0] for one in rest) or any(one.keys() != along[0].keys() for one in along):
        return None
    mask = _padding_mask(branches, caches)
    for place, layers in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        caches[0].layers[place] = _Roomy(
            _stacked([one.keys for one in layers]), _stacked([one.values for one in layers])
        )
        for one in layers:
            one.reset()
    last = {name: torch.cat([one[name][..., -1:] for one in along], dim=-2) for name in along[0]}
    return {**rest[0], **last, "past_key_values": caches[0], "attention_mask": mask}


def _is_plain(cache: Any) -> bool:
    """Whether a cache holds the keys and values of all positions, [row, head, position, d_head], in every layer."""
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)
    )


def _padding_mask(branches: Sequence[Branch], caches: Sequence[DynamicCache]) -> Tensor | None:
    """int64 [row, position], 0 at padding, with the position of the next token; None where there is no padding."""
    masks = []
    for one, cache in zip(branches, caches, strict=True):
        mask = one.inputs.get("attention_mask")
        if mask is None:  # transformers leaves it out where all is 1
            device = one.batch.device
            mask = torch.ones(one.batch.size, cache.get_seq_length() + 1, dtype=torch.int64, device=device)
        masks.append(mask)
    longest = max(mask.shape[1] for mask in masks)
    together = torch.cat([pad(mask, (longest - mask.shape[1], 0)) for mask in masks])
    return None if bool(together.all()) else together


class _Roomy(DynamicLayer):
    """A layer of a cache that is written into with room ahead, where `DynamicLayer` copies all that it holds in every step.

    Args:
        keys, values: [row, head, position, d_head], with `ROOM` positions beyond those that are held.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self._keys, self._values = keys, values
        self._show(keys.shape[-2] - ROOM)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        """What is held of so many positions."""
        keys, values = self._keys[..., :length, :], self._values[..., :length, :]
        self._length, self.keys, self.values = length, keys, values
        return keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put new keys and values behind those held, and give all."""
        start = self._length
        end = start + key_states.shape[-2]
        if end > self._keys.shape[-2]:
            self._keys, self._values = (pad(one, (0, 0, 0, ROOM)) for one in (self._keys, self._values))
        self._keys[..., start:end, :] = key_states
        self._values[..., start:end, :] = value_states
        return self._show(end)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put other rows in the place of the rows."""
        index = beam_idx.to(self._keys.device)
        self._keys, self._values = self._keys[index], self._values[index]
        self._show(self._length)


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """Tensors [row, head, position, d_head] one after the other, with 0 before the positions of shorter ones, and room."""
    longest = max(one.shape[-2] for one in values)
    return torch.cat([pad(one, (0, 0, longest - one.shape[-2], ROOM)) for one in values])
