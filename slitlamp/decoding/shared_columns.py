"""The part of a cache that decoding has filled, in which some rows have taken tokens back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from slitlamp.decoding.traceback_rules import Row
from slitlamp.errors import UnsupportedError
from slitlamp.models.anatomy import Anatomy
from slitlamp.tracing.call import Calls


class Columns:
    """The columns of the cache after the prompt: one for every forward call, hidden from rows that have taken its token back."""

    def __init__(self, inputs: Mapping[str, Any], anatomy: Anatomy, calls: Calls, whose: str) -> None:
        cache, positions = inputs.get("past_key_values"), inputs.get("position_ids")
        layers = list(getattr(cache, "layers", None) or ())
        odd = sorted({type(one).__name__ for one in layers if type(one) is not DynamicLayer})
        if odd or len(layers) != anatomy.n_layers:
            raise UnsupportedError(
                f"{whose} goes back in the text, for which the cache must keep every position and be cut off behind a token; "
                f"found {', '.join(odd) or type(cache).__name__}: leave out options of the cache, and use a model with full "
                "attention"
            )
        if positions is None:
            raise UnsupportedError(
                f"{whose}: transformers gives the tokens of this {anatomy.family.name} no positions, so that it cannot be said "
                "where a row goes on that has gone back; use a family whose generation takes position_ids"
            )
        self._layers = [
            one for one, kind in zip(layers, anatomy.attention_types, strict=True) if kind != "cross_attention"
        ]
        self._inputs = inputs
        self._first = positions[..., -1:]
        mask: Tensor | None = inputs.get("attention_mask")
        self._prompt = None if mask is None else mask[:, :-1]
        self._calls = calls
        self._visible = torch.zeros(calls.batch.size, 0, dtype=torch.bool, device=calls.batch.device)

    def settle(self, rows: Sequence[Row]) -> None:
        """Hide the tokens that rows have taken back, and cut off the columns that no row needs any more."""
        kept = max((row.columns[-1] + 1 for row in rows if row.columns and not row.ended), default=0)
        for layer in self._layers:
            layer.crop(kept - self._visible.shape[1])
        visible = self._visible[:, :kept].clone()
        for number, row in enumerate(rows):
            if not row.ended:
                visible[number] = False
                visible[number, row.columns] = True
        self._visible = visible
        self._calls.rewind(visible)

    def next(self, model: Any, input_ids: Tensor, rows: Sequence[Row]) -> Any:
        """The model's output for the last token of each row."""
        column = self._visible.shape[1]
        for row in rows:
            if not row.ended:
                row.columns.append(column)
        self._visible = torch.cat([self._visible, self._visible.new_ones(len(rows), 1)], dim=1)
        ids = input_ids.new_full((len(rows), input_ids.shape[1] + column + 1), self._calls.batch.pad_token_id)
        ids[:, -1] = torch.tensor([row.tokens[-1] for row in rows])
        place = torch.tensor([[len(row.tokens) - 1] for row in rows], device=self._first.device)
        inputs = {**self._inputs, "position_ids": self._first + place, "attention_mask": self._mask()}
        return model(**model.prepare_inputs_for_generation(ids, next_sequence_length=1, **inputs), return_dict=True)

    def _mask(self) -> Tensor | None:
        prompt = self._prompt
        if prompt is None:
            if bool(self._visible.all()):
                return None
            batch = self._calls.batch
            prompt = torch.ones_like(batch.input_ids)
        return torch.cat([prompt, self._visible.to(prompt)], dim=1)
