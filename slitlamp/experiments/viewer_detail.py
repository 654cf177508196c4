"""How much of an item the viewer keeps: attention in bytes, laid out on grids, in as much detail as fits.

One item is a header (plain values) and arrays; `packed` makes the compressed bytes that a page holds. Attention is kept as
whole 255ths of the largest weight of its map, beside that largest weight.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from slitlamp.models import Patches

Array = NDArray[Any]
Arrays = dict[str, Array]

MAX_BYTES: Final = 7_000_000
"""What all items of a viewer may take in a page: with up to 3 MB of figures, a report stays below 10 MB."""
POOLS: Final = (1, 2, 4, 8)
"""Sides of the squares of patches whose weights are added up, the finest first."""
TOP: Final = 5
"""Tokens of the logit lens per layer."""
SIDES: Final = (672, 448, 336, 224, 160, 112, 64)
"""Longest sides of a picture in pixels, the largest first."""
_BASE64: Final = 4 / 3
_BEST_DEFLATE: Final = 12
"""Maps that would have to shrink more than this are not even tried."""


@dataclass(frozen=True)
class Cells:
    """Where the weights of image tokens are put: the cells of grids, one grid after the other, then what has no place.

    Attributes:
        grids: per grid its image, view, rows and columns.
        index: int64 [token], the cell of every token.
        n_cells: cells in all.
        kind: "grid" where the cells of grids are followed by one in which tokens without a place are added up (end-of-row
            tokens, CLS) if there are any; "tokens" where no token has a place, and each is a cell.
    """

    grids: tuple[dict[str, int], ...]
    index: NDArray[np.int64]
    n_cells: int
    kind: str

    @staticmethod
    def of(patches: Patches) -> Cells:
        """From the places of the image tokens of a prompt."""
        on_image = patches.on_image.cpu().numpy()
        if not patches.grids or not on_image.any():
            return Cells((), np.arange(len(patches)), len(patches), "tokens")
        image, view = patches.image.cpu().numpy(), patches.view.cpu().numpy()
        row, column = patches.row.cpu().numpy(), patches.column.cpu().numpy()
        index, start, grids = np.full(len(patches), -1, dtype=np.int64), 0, []
        for (number, which), (rows, columns) in sorted(patches.grids.items()):
            own = on_image & (image == number) & (view == which)
            index[own] = start + row[own] * columns + column[own]
            grids.append({"image": number, "view": which, "rows": rows, "columns": columns})
            start += rows * columns
        nowhere = index < 0
        index[nowhere] = start
        return Cells(tuple(grids), index, start + bool(nowhere.any()), "grid")

    def lay(self, weights: Array) -> Array:
        """Weights [..., token] as float32 [..., cell]."""
        flat = weights.reshape(-1, weights.shape[-1]).astype(np.float32)
        found = np.zeros((len(flat), self.n_cells), dtype=np.float32)
        placed = np.zeros(self.n_cells, dtype=int)
        np.add.at(placed, self.index, 1)
        single = placed[self.index] == 1
        found[:, self.index[single]] = flat[:, single]
        for cell in np.unique(self.index[~single]):
            found[:, cell] = flat[:, self.index == cell].sum(axis=1)
        return found.reshape(*weights.shape[:-1], self.n_cells)

    def pooled(self, laid: Array, side: int) -> tuple[Cells, Array]:
        """Weights [..., cell] added up over squares of so many patches, with the cells that they are then in."""
        if side == 1 or self.kind == "tokens":
            return self, laid
        parts, grids, start = [], [], 0
        for grid in self.grids:
            rows, columns = grid["rows"], grid["columns"]
            values = laid[..., start : start + rows * columns].reshape(*laid.shape[:-1], rows, columns)
            for axis, length in ((-2, rows), (-1, columns)):
                values = np.add.reduceat(values, np.arange(0, length, side), axis=axis)
            grids.append({**grid, "rows": values.shape[-2], "columns": values.shape[-1]})
            parts.append(values.reshape(*laid.shape[:-1], -1))
            start += rows * columns
        together = np.concatenate([*parts, laid[..., start:]], axis=-1)
        return Cells(tuple(grids), self.index, together.shape[-1], self.kind), together


@dataclass(frozen=True)
class Maps:
    """Attention over the image of one text, before it is cut down.

    Attributes:
        weights: float32 [layer, head, token, cell]; one "head" where only the mean over heads could be held.
        mass: float32 [layer, head, token], the weight on all of the image.
        cells: where the cells are.
        layers: the layers, in order.
        per_head: whether the second axis is heads.
    """

    weights: Array
    mass: Array
    cells: Cells
    layers: tuple[int, ...]
    per_head: bool = True


def quantised(maps: Array) -> tuple[Array, Array]:
    """Maps [..., cell] as uint8 255ths of their largest weight, and these largest weights, float32 [...]."""
    most = maps.max(axis=-1, initial=0.0)
    scaled = maps / np.where(most > 0, most, 1)[..., None]
    return np.rint(255 * scaled).astype(np.uint8), most.astype(np.float32)


def levels(maps: Maps, named: list[int]) -> Iterator[tuple[dict[str, Any], Arrays]]:
    """The same attention in less and less detail, each with the entries of a header that say which it is.

    Every token by head; heads at tokens that name objects alone, other tokens as the mean over heads; the mean alone; the
    mean over ever larger squares of patches.

    Args:
        maps: what there is.
        named: tokens that name objects.
    """
    n_tokens = maps.weights.shape[2]
    mean = maps.weights.mean(axis=1).transpose(1, 0, 2)  # [token, layer, cell]
    by_head = maps.weights.transpose(2, 0, 1, 3)  # [token, layer, head, cell]
    chosen = [("all", list(range(n_tokens))), ("named", named)] if maps.per_head else []
    for level, tokens in [*chosen, ("mean", [])]:
        yield _level(maps, level, tokens, by_head, mean, 1)
    for side in POOLS[1:] if maps.cells.kind == "grid" else ():
        yield _level(maps, "mean", [], by_head, mean, side)


def _level(
    maps: Maps, level: str, tokens: list[int], by_head: Array, mean: Array, side: int
) -> tuple[dict[str, Any], Arrays]:
    cells, pooled = maps.cells.pooled(mean, side)
    head = {
        "detail": level,
        "pooled": side,
        "grids": list(cells.grids),
        "cells": cells.n_cells,
        "kind": cells.kind,
        "attention_layers": list(maps.layers),
        "head_tokens": tokens,
    }
    arrays: Arrays = {}
    arrays["mean"], arrays["mean_max"] = quantised(pooled)
    if tokens:
        arrays["heads"], arrays["heads_max"] = quantised(by_head[tokens])
    # the weight on the whole image lies between 0 and 1, and small ones matter: the root is what is cut into 255 parts
    arrays["mass"] = np.rint(255 * np.sqrt(maps.mass.clip(0, 1))).astype(np.uint8).transpose(2, 0, 1)
    return head, arrays


def fitted(
    header: Mapping[str, Any], arrays: Arrays, maps: Maps | None, named: list[int], most: float
) -> tuple[dict[str, Any], Arrays]:
    """The header and the arrays of an item in as much detail as fits into so many bytes of a page.

    What is left when even the least attention does not fit is one token of the lens per layer in place of five; an item may
    be larger than that only by its texts.
    """
    kept = {**header}, {**arrays}
    for top in (TOP, 1):
        cut = _with_top(arrays, top)
        options = [({}, {})] if maps is None else levels(maps, named)
        for head, own in options:
            kept = {**header, **head}, {**cut, **own}
            if sum(one.nbytes for one in own.values()) / _BEST_DEFLATE > most:
                continue
            if len(packed(*kept)) * _BASE64 <= most:
                return kept
    return kept


def _with_top(arrays: Arrays, top: int) -> Arrays:
    return {name: value[..., :top] if name in ("lens_id", "lens_p") else value for name, value in arrays.items()}


def packed(header: Mapping[str, Any], arrays: Mapping[str, Array]) -> bytes:
    """One item as compressed bytes: the length of the header, the header as JSON, and the arrays, little-endian.

    The header's entry `arrays` says the name, the type, the shape and the start of each, counted from the end of the header.
    """
    entries, parts, start = [], [], 0
    for name, value in arrays.items():
        array = np.ascontiguousarray(value)
        raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
        entries.append({"name": name, "type": array.dtype.name, "shape": list(array.shape), "start": start})
        padding = -len(raw) % 4  # typed arrays of a page start at a multiple of their width
        parts.append(raw + bytes(padding))
        start += len(raw) + padding
    text = json.dumps({**header, "arrays": entries}, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    head = text.encode()
    head += b" " * (-len(head) % 4)
    return zlib.compress(len(head).to_bytes(4, "little") + head + b"".join(parts), 9)


def picture_bytes(image: Image, most: float) -> tuple[bytes, str]:
    """A picture in at most so many bytes of a page: as PNG, or smaller and as JPEG; and which of them."""
    whole = image.convert("RGB")
    for side in SIDES:
        small = whole.copy()
        small.thumbnail((side, side))
        for kind in ("png", "jpeg") if side == SIDES[0] else ("jpeg",):
            stream = io.BytesIO()
            small.save(stream, format=kind, **({"quality": 85} if kind == "jpeg" else {"optimize": True}))
            if len(stream.getvalue()) * _BASE64 <= most or (kind, side) == ("jpeg", SIDES[-1]):
                return stream.getvalue(), kind
    raise AssertionError("the smallest picture is always taken")
