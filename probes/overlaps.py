"""How far the subnetworks that sets of tokens activate overlap, matrix by matrix, with every group of items left out in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.wanda import Matrix, iou, keep_masks, wanda_score, weight_of
from slitlamp.tracing.trace import Source

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TokenSet:
    """What Wanda needs to know of some tokens: the sums of squares of what goes into the linear maps.

    Attributes:
        source: the model.
        matrices: its linear maps that are looked at, by key.
        squares: site -> [fold, layer, width], sums over the tokens of a fold of items.
        layers: site -> [layer], which they are.
        items: [fold], the number of items.
    """

    source: Source
    matrices: dict[str, Matrix]
    squares: dict[str, Floats]
    layers: dict[str, NDArray[np.int64]]
    items: NDArray[np.int64]

    def norms(self, matrix: Matrix, without: int | None = None) -> Tensor:
        """||X_j|| over all tokens, or over those of all folds but one: float64 [width]."""
        row = int(np.flatnonzero(self.layers[matrix.site] == matrix.layer)[0])
        squares = self.squares[matrix.site][:, row]
        total = squares.sum(axis=0) if without is None else np.delete(squares, without, axis=0).sum(axis=0)
        return torch.from_numpy(np.sqrt(total))

    def masks(self, key: str, sparsities: Sequence[float], without: int | None = None) -> list[Tensor]:
        """The kept weights of one linear map at each sparsity, bool [output, input]."""
        matrix = self.matrices[key]
        return keep_masks(wanda_score(weight_of(self.source.model, matrix), self.norms(matrix, without)), sparsities)

    def of_folds(self, chosen: Sequence[int]) -> TokenSet:
        """The tokens of some folds."""
        kept = list(chosen)
        return replace(self, squares={site: one[kept] for site, one in self.squares.items()}, items=self.items[kept])

    def shuffled(self, seed: int) -> TokenSet:
        """The same norms dealt out at random to the inputs of each linear map (q, k and v have one input)."""
        generator = np.random.default_rng(seed)
        squares = {}
        for site, one in self.squares.items():
            order = generator.permuted(np.tile(np.arange(one.shape[2]), (one.shape[1], 1)), axis=1)
            squares[site] = np.take_along_axis(one, order[None], axis=2)
        return replace(self, squares=squares)

    def halves(self) -> tuple[TokenSet, TokenSet] | None:
        """The tokens of every other fold that has items, and of the rest; None where there are fewer than two."""
        filled = np.flatnonzero(self.items).tolist()
        return (self.of_folds(filled[::2]), self.of_folds(filled[1::2])) if len(filled) > 1 else None


@dataclass(frozen=True, eq=False)
class Overlaps:
    """IoUs and joint densities, first of all items, then without each fold in turn.

    Attributes:
        keys: the matrices.
        iou: [1 + fold, pair, matrix, sparsity].
        joint: [1 + fold, group, matrix, sparsity], the share of the weights that every set of a group keeps.
    """

    keys: list[str]
    iou: Floats
    joint: Floats


def overlaps(
    sets: Sequence[TokenSet],
    pairs: Sequence[tuple[int, int]],
    sparsities: Sequence[float],
    *,
    groups: Sequence[Sequence[int]] = (),
    folds: Sequence[int] = (),
) -> Overlaps:
    """Compare the subnetworks of pairs of token sets, and join those of groups of them, one matrix at a time.

    Args:
        sets: token sets whose models have the same linear maps.
        pairs: numbers of two sets each.
        sparsities: shares of every row that are dropped.
        groups: numbers of the sets whose masks are joined by AND.
        folds: which to leave out in turn, from all sets at once, so that items that they share leave together.
    """
    keys = list(sets[0].matrices)
    leaves: list[int | None] = [None, *folds]
    shape = (len(leaves), len(keys), len(sparsities))
    found = np.full((shape[0], len(pairs), *shape[1:]), np.nan)
    joint = np.full((shape[0], len(groups), *shape[1:]), np.nan)
    for column, key in enumerate(keys):
        for row, leave in enumerate(leaves):
            masks = [one.masks(key, sparsities, leave) if _has_items(one, leave) else None for one in sets]
            for number, (a, b) in enumerate(pairs):
                one, other = masks[a], masks[b]
                if one is not None and other is not None:
                    found[row, number, column] = [iou(x, y.to(x.device)) for x, y in zip(one, other, strict=True)]
            for number, group in enumerate(groups):
                having = [mask for mask in (masks[i] for i in group) if mask is not None]
                if len(having) == len(group):
                    stacked = zip(*having, strict=True)
                    joint[row, number, column] = [float(_all(several).float().mean()) for several in stacked]
    return Overlaps(keys, found, joint)


def _has_items(one: TokenSet, without: int | None) -> bool:
    return bool(one.items.sum() - (0 if without is None else one.items[without]))


def _all(masks: Sequence[Tensor]) -> Tensor:
    return torch.stack([one.to(masks[0].device) for one in masks]).all(dim=0)
