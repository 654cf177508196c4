"""Sets of image tokens by place: those of an object, and a set's shape moved elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from probes.outlier_places import Box, covered, grow
from slitlamp.models.patches import Patches


def object_tokens(patches: Patches, boxes: Sequence[Box], margin: int, min_cover: float) -> Tensor:
    """bool [image token]: the tokens that the boxes cover to at least `min_cover`, or more than any other; in every view of
    the image (the whole and its tiles), with all tokens within `margin` cells of them.

    Without boxes none. Boxes are of the first image of a prompt.
    """
    mask = torch.zeros(len(patches), dtype=torch.bool)
    if not boxes:
        return mask
    for (image, view), grid in patches.grids.items():
        if image:
            continue
        share = covered(boxes, grid)
        cells = (share >= min_cover) | ((share == share.max()) & (share > 0))
        here = _tokens_of(patches, view)
        mask[here] = grow(cells, margin)[patches.row[here], patches.column[here]]
    return mask


def shifted_tokens(patches: Patches, mask: Tensor, rng: np.random.Generator) -> Tensor:
    """The set moved over the grid, round its edges, to where it shares the fewest tokens with itself; one such place at
    random. Every view is moved by the same share of its height and width.
    """
    grids = {view: grid for (image, view), grid in patches.grids.items() if not image}
    views = sorted(grids)
    cells = {view: _cells(patches, mask, view, grids[view]) for view in views}
    base = grids[views[0]]
    steps = [(row, column) for row in range(base[0]) for column in range(base[1])]
    common = np.array([sum(int((cells[v] & _rolled(cells[v], s, base)).sum()) for v in views) for s in steps])
    step = steps[int(rng.choice(np.flatnonzero(common == common.min())))]
    moved = torch.zeros_like(mask)
    for view in views:
        here = _tokens_of(patches, view)
        moved[here] = _rolled(cells[view], step, base)[patches.row[here], patches.column[here]]
    return moved


def _tokens_of(patches: Patches, view: int) -> Tensor:
    """int64: the tokens of the first image's view that stand for pixels."""
    return (patches.on_image & (patches.view == view) & (patches.image == 0)).nonzero()[:, 0]


def _cells(patches: Patches, mask: Tensor, view: int, grid: tuple[int, int]) -> Tensor:
    cells, here = torch.zeros(grid, dtype=torch.bool), _tokens_of(patches, view)
    cells[patches.row[here], patches.column[here]] = mask[here]
    return cells


def _rolled(cells: Tensor, step: tuple[int, int], base: tuple[int, int]) -> Tensor:
    """Cells moved by a step that is counted in cells of the base grid."""
    by = [round(one * size / of) for one, size, of in zip(step, cells.shape, base, strict=True)]
    return cells.roll((by[0], by[1]), dims=(0, 1))
