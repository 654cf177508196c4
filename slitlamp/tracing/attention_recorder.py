"""Recording attention: chosen query rows in blocks, chosen key columns, reduced as they come, so that no more is held than
one block and what is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slitlamp.errors import UnsupportedError
from slitlamp.tracing.attention_rows import AttentionCall, DecodeCall, take_keys
from slitlamp.tracing.call import Selection, vision_selection
from slitlamp.tracing.places import Tiles
from slitlamp.tracing.reductions import reduce_axis
from slitlamp.tracing.sites import Site


@dataclass(frozen=True, eq=False)
class Chosen:
    """The query rows and key columns of one call that are recorded.

    Attributes:
        queries, keys: their positions.
        first: the position of the first key that the call was given; those before it, which a sliding window has left
            behind, have weight 0.
    """

    queries: Selection
    keys: Selection
    first: int = 0


class Gathered:
    """Weights [row, head, query, key] of the chosen positions, put together block by block and reduced on the way."""

    def __init__(self, site: Site, chosen: Chosen) -> None:
        self.site = site
        self.queries, self.keys = chosen.queries, chosen.keys
        self.present = self.keys.valid
        self.index = self.keys.index
        self.all_keys = self.keys.everything
        self.full_keys = self.keys.full
        if chosen.first:
            self.present = self.present & (self.index >= chosen.first)
            self.index = torch.where(self.present, self.index - chosen.first, 0)
            self.all_keys = self.full_keys = False
        self.values: Tensor | None = None

    def add(self, weights: Tensor, rows: slice, slots: slice | Tensor) -> None:
        """Take in the weights [row, head, query, key] of some rows and of some places among their chosen queries."""
        site = self.site
        taken = weights
        if not self.all_keys:
            taken = take_keys(weights, self.index[rows].to(weights.device))
            if not self.full_keys:
                taken.masked_fill_(~self.present[rows].to(weights.device)[:, None, None, :], 0)
        if not self.queries.full:
            valid = self.queries.valid[rows][:, slots].to(weights.device)
            taken = taken.masked_fill(~valid[:, None, :, None], 0)
        if site.reduce_keys is not None:
            taken = reduce_axis(taken, None if self.keys.full else self.keys.valid[rows], 3, site.reduce_keys)
        if site.reduce_heads is not None:
            taken = reduce_axis(taken, None, 1, site.reduce_heads)
        axis = 1 if site.reduce_heads is not None else 2
        if site.reduce_queries is not None:
            total = taken.sum(dim=axis, dtype=taken.dtype if taken.dtype == torch.float64 else torch.float32)
            if self.values is None:
                self.values = total.new_zeros(self.queries.index.shape[0], *total.shape[1:])
            self.values[rows] += total
            return
        n_rows, count = self.queries.index.shape
        if self.values is None and taken.shape[0] == n_rows and taken.shape[axis] == count:
            self.values = taken
            return
        if self.values is None:
            self.values = taken.new_zeros(n_rows, *taken.shape[1:axis], count, *taken.shape[axis + 1 :])
        self.values[rows].movedim(axis, 1)[:, slots] = taken.movedim(axis, 1)

    def result(self) -> Tensor | None:
        """What is recorded; None if no block came."""
        if self.values is None or self.site.reduce_queries is None:
            return self.values
        counts = self.queries.valid.sum(dim=1).to(device=self.values.device, dtype=self.values.dtype)
        counts = counts.view(-1, *[1] * (self.values.ndim - 1))
        if self.site.reduce_queries == "mean":
            return self.values / counts  # 0 / 0 is NaN: nothing was there to be averaged
        return self.values if self.queries.full else torch.where(counts > 0, self.values, torch.nan)


class AttentionRecorder:
    """Records the attention of one module.

    Args:
        site: what to record.
        choose: the chosen positions of a call; None where it has none.
        store: takes the recording, bool [row, query] of the real queries, and bool [row, key] of the real keys.
        tiles: for a tower that runs over all tiles as one sequence, where each tile is in it.
        has_cls: whether the first position of a tile is a CLS token (with `tiles`).
        later: takes what is kept of a decode step's call, if it can be recorded later, and says whether it did.
    """

    def __init__(
        self,
        site: Site,
        choose: Callable[[AttentionCall], Chosen | None],
        store: Callable[[Tensor, Tensor, Tensor], None],
        tiles: Callable[[], Tiles | None] | None = None,
        has_cls: bool = False,
        later: Callable[[DecodeCall], bool] | None = None,
    ) -> None:
        self.site = site
        self.choose = choose
        self.store = store
        self.tiles = tiles
        self.has_cls = has_cls
        self.later = later
        self._gathered: Gathered | None = None
        self._done = 0

    def see(self, call: AttentionCall) -> None:
        """Take the weights of one call of the attention function."""
        if self.tiles is not None:
            self._see_tiles(call, self.tiles())
            return
        if call.number > 0:
            raise UnsupportedError(
                f"{self.site.label}: {type(call.module).__name__} calls attention several times per forward, and the "
                "model's entry does not say which positions each call is over (VisionTower.unpack)"
            )
        chosen = self.choose(call)
        if chosen is None:
            return
        queries, heads = chosen.queries, self.site.heads
        gathered = self._gathered = Gathered(self.site, chosen)
        block = call.block_rows(heads)
        index = None if queries.everything else queries.index.to(call.query.device)
        for start in range(0, queries.count, block):
            slots = slice(start, min(start + block, queries.count))
            gathered.add(call.weights(slots if index is None else index[:, slots], heads), slice(None), slots)

    def _see_tiles(self, call: AttentionCall, tiles: Tiles | None) -> None:
        """One call over a part of the sequence of all tiles (one image, one window): weights between positions that no
        call puts together are 0.
        """
        if tiles is None:
            return
        n_tiles, width = tiles.index.shape
        device = call.query.device
        if self._gathered is None:
            queries, keys = (
                vision_selection(n_tiles, width, positions, self.has_cls, device, tiles.valid)
                for positions in (self.site.queries, self.site.keys)
            )
            self._gathered = Gathered(self.site, Chosen(queries, keys))
        gathered, queries = self._gathered, self._gathered.queries
        n_rows, length = call.query.shape[0], call.query.shape[2]
        index = tiles.index.to(device) - self._done
        inside = tiles.valid.to(device) & (index >= 0) & (index < n_rows * length)
        self._done += n_rows * length
        block = call.block_rows(self.site.heads)
        for tile in inside.any(dim=1).nonzero()[:, 0].tolist():
            columns = inside[tile].nonzero()[:, 0]
            row = int(index[tile, columns[0]]) // length
            of_columns = index[tile, columns] % length
            slots = (queries.valid[tile].to(device) & inside[tile, queries.index[tile].to(device)]).nonzero()[:, 0]
            for part in slots.split(block):
                places = index[tile, queries.index[tile, part.to(queries.index.device)].to(device)] % length
                weights = call.weights(places[None, :].expand(n_rows, -1), self.site.heads)[row]
                wide = weights.new_zeros(1, weights.shape[0], len(part), width)
                wide[0, :, :, columns] = weights[:, :, of_columns]
                gathered.add(wide, slice(tile, tile + 1), part)

    def end(self) -> None:
        """The module's forward is over: store what came."""
        gathered, self._gathered, self._done = self._gathered, None, 0
        values = None if gathered is None else gathered.result()
        if gathered is None or values is None:
            return
        valid = gathered.queries.valid
        if self.site.reduce_queries is not None:
            valid = valid.any(dim=1, keepdim=True)
        self.store(values, valid, gathered.keys.valid)
