"""Edits of attention after the softmax: weights that are put in the place of the model's own.

The rows that an edit asks for are computed anew, in blocks: their weights, the edit's, and the sum of the values by these. All
others are left as they are, bit for bit. What is held at once is the weights of one block, [batch, head, block, key] with at most
`BLOCK_ELEMENTS` of them, those that the edit gives for it, and one copy of the module's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models.anatomy import Anatomy
from slitlamp.tracing.attention_edit import check_place, check_rows, members_of
from slitlamp.tracing.attention_rows import QueryRows, block_rows, row_index
from slitlamp.tracing.call import Calls, Selection
from slitlamp.tracing.sites import Positions

Tower = Literal["language", "vision"]
Weights = Callable[[QueryRows, Sequence[int] | None], Tensor]
"""(query rows, heads or None for all) -> their weights, [batch, head, chosen, key]."""


@dataclass(frozen=True, eq=False)
class WeightsEdit:
    """A change of the attention weights of a layer, after the softmax.

    The output of an edited row is the sum of the values by the new weights, which need not add up to 1: nothing is normalised
    again. Edits before the softmax (`AttentionEdit`) act first; several edits of one layer act in the order given, each on what
    the one before it gave. A recording of `attention` shows the edited weights.

    Attributes:
        layer: 0-based layer of the tower.
        function: (weights [batch, head, query, key], query positions int64 [batch, query], key positions int64 [key], calls)
            -> new weights of the same shape. It must not write into `weights`. Positions are those of the batch, padding
            included; the token that decode step t runs over has position `batch.length + t - 1`. It is called for one block
            of rows at a time, among them some that are not edited, and again for a recording: what it gives for a row must
            follow from the row alone. In the vision tower the batch axis is tiles, `Batch.tiles` of them for each item, and
            positions are those of a tile.
        queries: the rows that are edited; those of padding never are. In the vision tower "all".
        tower: "language", or "vision".
    """

    layer: int
    function: Callable[[Tensor, Tensor, Tensor, Calls], Tensor]
    queries: Positions = "all"
    tower: Tower = "language"

    @property
    def site(self) -> str:
        """The site that records the weights."""
        return "attention" if self.tower == "language" else "vision_attention"


def check_weights_edit(edit: WeightsEdit, anatomy: Anatomy, calls: Calls) -> None:
    """Refuse an edit that does not fit the model or the batch.

    Raises:
        InputError: a layer outside the tower, or rows that are no name of positions and no mask of the batch's shape.
        UnsupportedError: a layer without self-attention of its own, or a vision tower that runs over all tiles at once.
    """
    if edit.tower not in ("language", "vision"):
        raise unknown("tower of an edit of attention weights", str(edit.tower), ("language", "vision"))
    check_place(edit.site, edit.layer, f"the {edit.tower} attention weights", anatomy)
    if edit.tower == "language":
        check_rows(edit.queries, "an edit of attention weights", calls)
        return
    if not isinstance(edit.queries, str) or edit.queries != "all":
        raise InputError(f'the rows of an edit of vision attention weights: expected "all", found {edit.queries!r}')
    if anatomy.tower.unpack is not None:
        raise UnsupportedError(
            f"the vision tower of this {anatomy.family.name} runs over all tiles as one sequence, so that its attention weights "
            "cannot be edited"
        )


@dataclass(frozen=True, eq=False)
class WeightsEditor:
    """The edits after the softmax of one module's attention during one run; all of one tower."""

    edits: Sequence[WeightsEdit]
    calls: Calls

    def of_call(self, query: Tensor, n_keys: int, weights: Weights, number: int) -> EditedWeights | None:
        """The edits in one call of the attention function; None where no row of it is edited.

        Args:
            query: [batch or tile, head, query, d_head].
            n_keys: how many keys there are.
            weights: of some query rows, without these edits.
            number: of the call during this forward of the module, from 0.

        Raises:
            UnsupportedError: a call over something else than the positions of the batch, or not over those of whole tiles.
        """
        if self.edits[0].tower == "language":
            places = self.calls.attention_places(query, n_keys)
            found = [(edit, members_of(edit.queries, self.calls, query)) for edit in self.edits]
        else:
            if number > 0:
                raise UnsupportedError(
                    "a vision tower that calls attention several times per forward: its attention weights cannot be edited"
                )
            places = (torch.arange(query.shape[2], device=query.device), torch.arange(n_keys, device=query.device))
            everywhere = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
            found = [(edit, everywhere) for edit in self.edits]
        chosen = [(edit, members) for edit, members in found if members is not None]
        return EditedWeights(chosen, self.calls, query, places, weights) if chosen else None


class EditedWeights:
    """The weights of one call of the attention function with edits in it, made for the query rows that are asked for."""

    def __init__(
        self,
        edits: Sequence[tuple[WeightsEdit, Tensor]],
        calls: Calls,
        query: Tensor,
        places: tuple[Tensor, Tensor],
        weights: Weights,
    ) -> None:
        self._edits = edits
        self._calls = calls
        self._query = query
        self._queries, self._keys = places
        self._weights = weights

    def of(self, rows: QueryRows, heads: Sequence[int] | None = None) -> Tensor:
        """The weights of some query rows, [batch, chosen head, chosen query, key], in the dtype of the queries.

        Raises:
            InputError: an edit that gives something else than weights of the shape it was given.
        """
        batch, _, n_queries, _ = self._query.shape
        index = row_index(rows, n_queries, self._query.device).to(self._query.device).expand(batch, -1)
        weights = self._weights(rows, None)
        for edit, members in self._edits:
            here = members.gather(1, index)[:, None, :, None]
            found = edit.function(weights, self._queries[index], self._keys, self._calls)
            if found.shape != weights.shape or not found.is_floating_point():
                raise InputError(
                    f"an edit of the {edit.tower} attention weights of layer {edit.layer} must give floating weights "
                    f"{list(weights.shape)}; it gave {found.dtype} {list(found.shape)}"
                )
            weights = torch.where(here, found.to(weights), weights)
        return weights if heads is None else weights[:, list(heads)]

    def rewrite(self, output: Tensor, value: Tensor) -> Tensor:
        """The output [batch, query, head, d_head] of the attention function with the edited rows computed anew.

        Args:
            output: without the edits.
            value: [batch, kv head, key, d_head]; each is shared by head / kv head heads.
        """
        batch, heads, n_queries = self._query.shape[:3]
        groups = heads // value.shape[1]
        members = torch.stack([one for _, one in self._edits]).any(dim=0)

        def mixed_of(index: Tensor) -> Tensor:
            by_group = self.of(index).unflatten(1, (-1, groups)).flatten(2, 3)
            return (by_group @ value).unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2)

        if n_queries == 1:
            mixed = mixed_of(torch.zeros(batch, 1, dtype=torch.int64, device=self._query.device))
            return torch.where(members[..., None, None].to(output.device), mixed, output)
        selection = Selection.of(members)
        changed = output.clone()
        block = block_rows(batch, heads, len(self._keys))
        for start in range(0, selection.count, block):
            index = selection.index[:, start : start + block]
            mixed = mixed_of(index)
            row, slot = selection.valid[:, start : start + block].nonzero(as_tuple=True)
            changed[row.to(output.device), index[row, slot].to(output.device)] = mixed[row, slot]
        return changed
