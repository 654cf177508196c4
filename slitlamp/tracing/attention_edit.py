"""Edits of attention before the softmax: (query, key) pairs that are cut or shown, or a bias that is added to their scores.

An edit acts in the model's own attention function: the rows it asks for are given another mask, all others are left as they
are, bit for bit. What is held at once is the mask of one block of edited rows, [batch, head or 1, block, key] with at most
`BLOCK_ELEMENTS` weights behind it, never that of all rows by all columns; its scores, for edits relative to them; and one copy
of the module's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models.anatomy import Anatomy
from slitlamp.tracing.attention_rows import QueryRows, block_rows, row_index, take_rows
from slitlamp.tracing.call import Calls, Selection
from slitlamp.tracing.site_checks import n_layers_of
from slitlamp.tracing.sites import TEXT_POSITIONS, Positions

if TYPE_CHECKING:
    from slitlamp.tracing.weights_edit import WeightsEditor

Scores = Callable[[QueryRows], Tensor]
"""Query rows -> their scores before any mask, [batch, head, chosen, key]."""


@dataclass(frozen=True, eq=False)
class AttentionEdit:
    """A change of the scores of a layer's self-attention, before the softmax.

    Several edits of one layer add up: their biases are summed, and a pair is cut if one of them cuts it, also one that
    another shows. A recording of `attention` shows the edited weights; those of a pair that is cut are 0.

    Attributes:
        layer: 0-based layer of the language model.
        function: (query positions int64 [batch, query], key positions int64 [key], calls) -> a tensor that broadcasts to
            [batch, head, query, key]: bool, true where a query may not attend to a key; or of floating point, what is added
            to the scores (-inf cuts). Positions are those of the batch, padding included; the token that decode step t runs
            over has position `batch.length + t - 1`. It is called for one block of rows at a time.
        queries: the rows that are edited; those of padding never are.
        relative: whether what `function` gives in floating point, finite, is in units of the absolute score |a| of its pair: a
            becomes a + given * |a|. a is the model's own score, scaled and soft-capped, before any mask or edit.
        shows: whether the pairs, bool, that `function` gives are pairs that may be attended to although the model hides
            them because the key comes after the query. Only keys of the prompt are shown, for a token that is generated does
            not exist yet; never those of padding; and pairs that the model hides for another reason stay hidden.
    """

    layer: int
    function: Callable[[Tensor, Tensor, Calls], Tensor]
    queries: Positions = "all"
    relative: bool = False
    shows: bool = False


def check_attention_edit(edit: AttentionEdit, anatomy: Anatomy, calls: Calls) -> None:
    """Refuse an edit that does not fit the model or the batch.

    Raises:
        InputError: a layer outside the model, or rows that are no name of positions and no mask of the batch's shape.
        UnsupportedError: a layer without self-attention of its own.
    """
    check_place("attention", edit.layer, "the attention", anatomy)
    check_rows(edit.queries, "an attention edit", calls)


def check_place(site: str, layer: int, what: str, anatomy: Anatomy) -> None:
    """Refuse a layer that a model does not have, or that has no attention of this kind."""
    n_layers = n_layers_of(site, anatomy)
    if not 0 <= layer < n_layers:
        raise InputError(f"an edit of {what} of layer {layer}; the model has layers 0 to {n_layers - 1}")
    anatomy.place(site, layer)


def check_rows(queries: Positions, what: str, calls: Calls) -> None:
    """Refuse query rows that are no name of positions and no mask of the batch's shape."""
    shape = [calls.batch.size, calls.batch.length]
    if isinstance(queries, Tensor):
        if list(queries.shape) != shape or queries.dtype != torch.bool:
            raise InputError(f"the rows of {what}: expected bool {shape}, found {queries.dtype} {list(queries.shape)}")
    elif queries not in TEXT_POSITIONS:
        raise InputError(f"the rows of {what}: {queries!r} is not one of {', '.join(TEXT_POSITIONS)}")


def members_of(queries: Positions, calls: Calls, query: Tensor) -> Tensor | None:
    """bool [batch, query], true at the rows of a call of the attention function on queries [batch, head, query, d_head] that are
    among some positions; never at those of padding, nor of an item that has ended. None where there are none.
    """
    selection = calls.select(queries)
    return None if selection is None else selection.mask(query.shape[2], query.device)


@dataclass(frozen=True, eq=False)
class Editor:
    """The edits of one module's attention during one run: those before the softmax, and those after it."""

    edits: Sequence[AttentionEdit]
    calls: Calls
    after: WeightsEditor | None = None

    def of_call(
        self, query: Tensor, n_keys: int, mask: Tensor | None, scores: Scores, *, is_causal: bool
    ) -> EditedMask | None:
        """The edits in one call of the attention function; None where no row of it is edited.

        Args:
            query: [batch, head, query, d_head].
            n_keys: how many keys there are: those of all positions so far, or, behind a sliding window, the last ones.
            mask: what the model gave: None, bool (true: may attend), or additive.
            scores: of some query rows, without the mask.
            is_causal: whether the attention function itself hides later keys.

        Raises:
            UnsupportedError: a call over something else than the positions of the batch.
        """
        if not self.edits:
            return None
        places = self.calls.attention_places(query, n_keys)
        if mask is not None and mask.ndim != 4:
            raise UnsupportedError(f"an attention mask of shape {list(mask.shape)}; expected [batch, head, query, key]")
        found = [(edit, members_of(edit.queries, self.calls, query)) for edit in self.edits]
        chosen = [(edit, members) for edit, members in found if members is not None]
        return EditedMask(chosen, self.calls, query, places, mask, scores, is_causal) if chosen else None


class EditedMask:
    """The mask of one call of the attention function with edits in it, made for the query rows that are asked for."""

    def __init__(
        self,
        edits: Sequence[tuple[AttentionEdit, Tensor]],
        calls: Calls,
        query: Tensor,
        places: tuple[Tensor, Tensor],
        mask: Tensor | None,
        scores: Scores,
        is_causal: bool,
    ) -> None:
        self._edits = sorted(edits, key=lambda one: not one[0].shows)  # what is shown can be cut
        self._calls = calls
        self._query = query
        self._queries, self._keys = places
        self._mask = mask if mask is None else mask[..., : len(self._keys)]
        self._scores = scores
        self._is_causal = is_causal

    @property
    def _is_checked(self) -> bool:
        """Whether what edits give is looked at, for which a GPU must be waited for: over the prompt and in the step after it.
        Later steps have the same edits.
        """
        return self._calls.number <= 1

    def of(self, rows: QueryRows) -> Tensor:
        """The additive mask of some query rows, [batch, head or 1, chosen, key], in the dtype of the queries.

        Raises:
            InputError: an edit that leaves a row nothing to attend to, or that gives something else than a bias or pairs.
        """
        query = self._query
        batch, heads, n_queries = query.shape[:3]
        index = row_index(rows, n_queries, query.device).to(query.device).expand(batch, -1)
        total, hidden = self._given(rows, index)
        sizes: Tensor | None = None
        shape = (batch, heads, index.shape[1], len(self._keys))
        for edit, members in self._edits:
            found = edit.function(self._queries[index], self._keys, self._calls)
            self._check(edit, found, shape)
            here = members.gather(1, index)[:, None, :, None]
            found = found.to(query.device)
            if edit.shows:
                shown = found & here & hidden & self._to_come(index)
                total, hidden = total.masked_fill(shown, 0), hidden & ~shown
                continue
            if found.dtype == torch.bool:
                total = total.masked_fill(found & here, -torch.inf)
            elif edit.relative:
                if not self._calls.is_prefill or bool(here.any()):
                    sizes = self._scores(rows).abs() if sizes is None else sizes
                    total = total + torch.where(here, found * sizes, 0).to(total.dtype)
            else:
                total = total + torch.where(here, found, 0).to(total.dtype)
            if self._is_checked:
                empty = here & (hidden | (total == -torch.inf)).all(dim=-1, keepdim=True)
                if bool(empty.any()):
                    self._refuse_empty(edit, empty, index)
        return total

    def _given(self, rows: QueryRows, index: Tensor) -> tuple[Tensor, Tensor]:
        """What the model itself adds to the scores of some rows, and bool, true where that hides a key.

        A model that hides keys by a value that is only very low is given that value back: rows of padding, all of whose
        keys are hidden, would be NaN with -inf.
        """
        query, shape = self._query, (index.shape[0], 1, index.shape[1], len(self._keys))
        if self._mask is None:
            hidden = torch.zeros(shape, dtype=torch.bool, device=query.device)
            total = hidden.to(query.dtype)
        else:
            given = take_rows(self._mask, rows if isinstance(rows, slice) else index)
            given = given.expand(shape[0], given.shape[1], *shape[2:])
            if given.dtype == torch.bool:
                hidden = ~given
                total = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, -torch.inf)
            else:
                hidden, total = given <= torch.finfo(given.dtype).min / 2, given.to(query.dtype)
        if self._is_causal:
            later = self._keys > self._queries[index][:, None, :, None]
            hidden, total = hidden | later, total.masked_fill(later, -torch.inf)
        return total, hidden

    def _to_come(self, index: Tensor) -> Tensor:
        """bool [batch, 1, chosen, key], true at keys of the prompt, padding left out, that come after the query."""
        batch = self._calls.batch
        of_prompt = (batch.real_mask & ~batch.generated_mask).to(index.device)
        there = of_prompt[:, self._keys.clamp(max=batch.length - 1)] & (self._keys < batch.length)
        return there[:, None, None] & (self._keys > self._queries[index][:, None, :, None])

    def _check(self, edit: AttentionEdit, found: Tensor, shape: tuple[int, ...]) -> None:
        fits = found.ndim == 4 and all(have in (1, want) for have, want in zip(found.shape, shape, strict=True))
        if not fits or not (found.dtype == torch.bool or found.is_floating_point()):
            raise InputError(
                f"an edit of the attention of layer {edit.layer} must give bool pairs or a floating bias that broadcasts to "
                f"{list(shape)}; it gave {found.dtype} {list(found.shape)}"
            )
        if edit.shows and found.dtype != torch.bool:
            raise InputError(
                f"an edit of the attention of layer {edit.layer} that shows pairs must give bool; it gave {found.dtype}"
            )
        if edit.relative and self._is_checked and not bool(found.isfinite().all()):
            raise InputError(
                f"an edit of the attention of layer {edit.layer} relative to its scores must be finite; to cut pairs, give bool"
            )

    def _refuse_empty(self, edit: AttentionEdit, empty: Tensor, index: Tensor) -> None:
        row, _, query, _ = empty.nonzero()[0].tolist()
        raise InputError(
            f"an edit of the attention of layer {edit.layer} leaves position {int(self._queries[index[row, query]])} "
            f"of item {self._calls.batch.ids[row]!r} nothing to attend to; leave every query at least one key, its own"
        )

    def rewrite(self, output: Tensor, attend: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The output [batch, query, head, d_head] of the attention function with the edited rows computed anew.

        Args:
            output: without the edits.
            attend: (query rows int64 [batch, chosen], their mask) -> [batch, chosen, head, d_head].
        """
        batch, heads, n_queries = self._query.shape[:3]
        members = torch.stack([one for _, one in self._edits]).any(dim=0)
        if n_queries == 1:
            index = torch.zeros(batch, 1, dtype=torch.int64, device=self._query.device)
            again = attend(index, self.of(index).masked_fill(~members[:, None, :, None], 0))
            return torch.where(members[..., None, None].to(output.device), again, output)
        selection = Selection.of(members)
        changed = output.clone()
        block = block_rows(batch, heads, len(self._keys))
        for start in range(0, selection.count, block):
            index = selection.index[:, start : start + block]
            valid = selection.valid[:, start : start + block]
            # places that fill a row up must not be hidden altogether: softmax of nothing is NaN, also in gradients
            mask = self.of(index).masked_fill(~valid[:, None, :, None], 0)
            row, slot = valid.nonzero(as_tuple=True)
            changed[row.to(output.device), index[row, slot].to(output.device)] = attend(index, mask)[row, slot]
        return changed
