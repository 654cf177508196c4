"""Which patches of the vision tower each image token stands for, by their place on the image, and which lie on objects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import Anatomy, Batch
from slitlamp.models.patches import BASE_VIEW, Patches

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in shares of the image."""

SAMPLES = 8
"""Points along each side of a token at which boxes are looked up."""


@dataclass(frozen=True, eq=False)
class Placed:
    """The image tokens of the whole-image view of one prompt's image, and the patches of the tower that each stands for.

    Attributes:
        tile: which tile of the batch holds the view.
        token: int64 [token], the place of each among the row's image tokens, in raster order of the view.
        row, column: int64 [token], on the grid of the view.
        grid: rows and columns of that grid.
        patch: int64 [token, patch], the tower's patches under each token, numbered from 0 without CLS.
    """

    tile: int
    token: Tensor
    row: Tensor
    column: Tensor
    grid: tuple[int, int]
    patch: Tensor

    def __len__(self) -> int:
        return int(self.token.numel())

    def of_patches(self, values: Tensor, reduce: str) -> Tensor:
        """Values of the tower's patches [..., patch] as values of image tokens [..., token]: the "sum" or the "mean" of the
        patches that a token stands for.
        """
        taken = values[..., self.patch.to(values.device)]
        return taken.sum(dim=-1) if reduce == "sum" else taken.mean(dim=-1)


def check_places(anatomy: Anatomy) -> None:
    """Refuse families whose image tokens have no place among the tokens of the prompt.

    Raises:
        UnsupportedError: cross-attention (Mllama) or a Q-Former (BLIP-2, InstructBLIP).
    """
    if anatomy.family.cross is not None:
        raise UnsupportedError(
            f"{anatomy.family.name} reads the image by cross-attention: its prompt holds no image tokens to compare with the "
            "tower's patches"
        )
    if anatomy.family.model_type in ("blip-2", "instructblip"):
        raise UnsupportedError(
            f"the image tokens of {anatomy.family.name} are queries of a Q-Former, which have no place on the image: no patch "
            "of the tower can be put beside them"
        )


def place_tokens(anatomy: Anatomy, batch: Batch, row: int, n_patches: Sequence[int]) -> Placed:
    """Lay the tower's patches beside the image tokens of one row.

    The view of the whole image is measured; tokens of high-resolution tiles, end-of-row tokens and a CLS token that the
    model keeps are left out. Where a token stands for a square of patches (Qwen-VL, InternVL, Gemma 3, ...), it gets all of
    them.

    Args:
        anatomy: of the model.
        batch: with the row.
        row: which.
        n_patches: per tile of the batch, how many patches the tower made of it (without CLS).

    Raises:
        InputError: no image, or several.
        UnsupportedError: a family without places (`check_places`), or patches that do not fit the grid of the tokens.
    """
    check_places(anatomy)
    patches = batch.patches[row]
    if not len(patches):
        raise InputError(f"item {batch.ids[row]!r} has no image to look for outliers in")
    if len(batch.images[row]) != 1:
        raise InputError(f"item {batch.ids[row]!r} has {len(batch.images[row])} images; outliers are measured on one")
    if len(n_patches) != sum(batch.tiles):
        raise UnsupportedError(
            f"{anatomy.family.name}: {len(n_patches)} tiles in the tower, {sum(batch.tiles)} in the batch"
        )
    chosen = (patches.on_image & (patches.view == BASE_VIEW)).nonzero()[:, 0]
    rows, columns = patches.grids[0, BASE_VIEW]
    order = (patches.row[chosen] * columns + patches.column[chosen]).argsort()
    token = chosen[order]
    tile = sum(batch.tiles[:row]) + (0 if _comes_first(patches) else batch.tiles[row] - 1)
    side = round((n_patches[tile] / (rows * columns)) ** 0.5)
    if rows * columns * side**2 != n_patches[tile] or len(token) != rows * columns:
        raise UnsupportedError(
            f"{anatomy.family.name}: {n_patches[tile]} patches of the tower do not make squares under {len(token)} tokens in "
            f"{rows} rows and {columns} columns"
        )
    inside = torch.arange(side)
    of_rows = patches.row[token][:, None, None] * side + inside[None, :, None]
    of_columns = patches.column[token][:, None, None] * side + inside[None, None, :]
    patch = (of_rows * (columns * side) + of_columns).flatten(1)
    return Placed(tile, token, patches.row[token], patches.column[token], (rows, columns), patch)


def _comes_first(patches: Patches) -> bool:
    """Whether the whole image is the first of the picture's tiles (LLaVA-NeXT) rather than the last (InternVL, Idefics3)."""
    on_image = patches.view[patches.on_image]
    return bool(on_image[0] == BASE_VIEW)


def covered(boxes: Iterable[Box], grid: tuple[int, int]) -> Tensor:
    """The share of every cell of a grid that lies in one of the boxes: float32 [row, column], in steps of 1 / `SAMPLES`^2.

    Boxes are in shares of what the grid covers, as `VLM.measure` gives them.
    """
    rows, columns = grid
    y = (torch.arange(rows * SAMPLES) + 0.5) / (rows * SAMPLES)
    x = (torch.arange(columns * SAMPLES) + 0.5) / (columns * SAMPLES)
    inside = torch.zeros(rows * SAMPLES, columns * SAMPLES, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        inside |= ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None, :]
    return inside.view(rows, SAMPLES, columns, SAMPLES).float().mean(dim=(1, 3))


def boxes_of(table: pd.DataFrame | None) -> list[Box]:
    """All boxes in a table of labels, each once."""
    if table is None or "boxes" not in table:
        return []
    found = [tuple(float(side) for side in box) for boxes in table["boxes"] if _some(boxes) for box in boxes]
    return list(dict.fromkeys(found))  # type: ignore[arg-type]  # of four numbers each


def _some(boxes: object) -> bool:
    """Whether a cell of the column `boxes` holds any; missing ones may be None or NaN."""
    return isinstance(boxes, Sequence) and len(boxes) > 0


def grow(cells: Tensor, by: int) -> Tensor:
    """A mask of cells [row, column] with all cells within `by` rows and columns of it."""
    if by == 0:
        return cells
    spread = torch.nn.functional.max_pool2d(cells.float()[None, None], 2 * by + 1, stride=1, padding=by)
    return spread[0, 0] > 0
