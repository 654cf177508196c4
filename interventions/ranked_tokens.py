"""Image tokens in the order of what the vision tower's patches under them are given: what pruning goes by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from probes.outlier_places import place_tokens
from slitlamp.decoding.intervention import RunContext
from slitlamp.errors import InputError, unknown
from slitlamp.models.patches import BASE_VIEW

SELECTED = {"most": "of most", "least": "of least", "random": "random in place of those of most"}


def of_tokens(run: RunContext, values: Tensor, n_patches: Sequence[int], whose: str) -> list[Tensor]:
    """Values of the tower's patches as values of the whole prompt's image tokens; of several patches under a token, the sum.

    Args:
        run: of the whole batch.
        values: [tile, patch].
        n_patches: per tile, how many patches it has.
        whose: the intervention, for messages.

    Returns:
        Per row, float32 [image token], on the CPU; NaN for a token that stands for no patch (a CLS token, the end of a row).

    Raises:
        InputError: a row with several images, or with high-resolution tiles, or attention that is not finite.
        UnsupportedError: a family whose image tokens have no place on the image.
    """
    batch = run.whole
    found = []
    for row in range(batch.size):
        patches = batch.patches[row]
        if bool((patches.view != BASE_VIEW).any()):
            raise InputError(
                f"{whose}: item {batch.ids[row]!r} is cut into high-resolution tiles, whose patches are not ranked against those "
                "of the whole image; let the processor make one picture of it, or use FastVPruning, which goes by the decoder"
            )
        placed = place_tokens(run.anatomy, batch, row, n_patches)
        own = placed.of_patches(values[placed.tile, : n_patches[placed.tile]], "sum").float().cpu()
        if not bool(own.isfinite().all()):
            raise InputError(
                f"{whose}: the vision tower's attention holds NaN or infinity for item {batch.ids[row]!r}, so that its tokens "
                "have no order; run the model in float32 or bfloat16, or look at its weights"
            )
        full = torch.full((len(patches),), torch.nan)
        full[placed.token] = own
        found.append(full)
    return found


def count_kept(keep: float, n: int) -> int:
    """How many of n tokens a share stands for: rounded down, at least one."""
    return max(1, math.floor(keep * n + 1e-9))


def best(values: Tensor, count: int, select: str, seed: int) -> Tensor:
    """bool [token]: as many tokens with the largest ("most") or smallest ("least") values, or at random.

    Args:
        values: [token]; tokens without a value (NaN) are always among the chosen, and are not counted.
        count: how many.
        select: of `SELECTED`.
        seed: of random tokens; the same are drawn for every row of as many.
    """
    ranked = values.isfinite().nonzero()[:, 0]
    if select == "random":
        order = torch.randperm(len(ranked), generator=torch.Generator().manual_seed(seed))
    else:
        order = values[ranked].argsort(descending=select == "most", stable=True)
    chosen = values.isnan()
    chosen[ranked[order[:count]]] = True
    return chosen


def check_share(name: str, value: float, whose: str) -> None:
    """Refuse a share of tokens that is none.

    Raises:
        InputError: it is not above 0 and at most 1.
    """
    if not 0 < value <= 1:
        raise InputError(f"{whose}: {name} must be above 0 and at most 1, found {value!r}")


def check_select(select: str, whose: str) -> None:
    """Refuse an unknown choice of tokens.

    Raises:
        UnknownNameError: it is not of `SELECTED`.
    """
    if select not in SELECTED:
        raise unknown(f"{whose} select", str(select), SELECTED)
