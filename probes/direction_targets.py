"""Directions in the residual stream as something to intervene on, with random and shuffled directions beside them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from probes.linear_fits import permuted
from slitlamp.tracing import CausalTarget
from slitlamp.tracing.probe import N_DRAWS, Array, EditsOf

RANDOM, SHUFFLED = "random directions, equally long", "directions of shuffled labels, equally long"


def random_directions(width: int, seed: int, count: int = N_DRAWS) -> list[Tensor]:
    """Directions [width] drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(width, generator=generator) for _ in range(count)]


def shuffled_directions(
    estimate: Callable[[Array], Tensor], positive: Array, group: Array, seed: int, count: int = N_DRAWS
) -> list[Tensor]:
    """What the same estimate gives when the labels of whole groups are dealt out again.

    These directions say nothing of the label, but lie where states vary, which random directions do not: most of those point
    into dimensions of which a model makes little use, so that nearly any direction found in states does more than they do.

    Args:
        estimate: from labels bool [sample] to a direction [d].
        positive: bool [sample].
        group: [sample], the image.
        seed: of the shuffles.
        count: how many.
    """
    rng = np.random.default_rng([seed, 11])
    return [estimate(permuted(positive, group, rng)).float() for _ in range(count)]


def direction_targets(
    name: str,
    direction: Tensor,
    edit: Callable[[Tensor], EditsOf],
    *,
    estimate: Callable[[Array], Tensor],
    positive: Array,
    group: Array,
    seed: int,
) -> list[CausalTarget]:
    """What `edit` does with a direction, against random directions and against those of shuffled labels.

    Args:
        name: of what is done.
        direction: [d].
        edit: from a direction to edits; the length of the direction must not matter.
        estimate, positive, group, seed: as in `shuffled_directions`; `direction` is the estimate of `positive`.
    """
    controls = {
        RANDOM: random_directions(len(direction), seed),
        SHUFFLED: shuffled_directions(estimate, positive, group, seed),
    }
    return [CausalTarget(name, edit(direction), tuple(map(edit, drawn)), what) for what, drawn in controls.items()]
