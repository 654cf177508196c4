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


def shuffled_directions(states: Tensor, positive: Array, group: Array, seed: int, count: int = N_DRAWS) -> list[Tensor]:
    """Differences of means [d] when the labels of whole groups are dealt out again.

    They say nothing of the label, but lie where states vary, which random directions do not: most of those point into
    dimensions of which a model makes little use, so that nearly any direction found in states does more than they do.

    Args:
        states: [sample, d].
        positive: bool [sample].
        group: [sample], the image.
        seed: of the shuffles.
        count: how many.
    """
    rng = np.random.default_rng([seed, 11])
    drawn = [torch.from_numpy(permuted(positive, group, rng)) for _ in range(count)]
    return [(states[one].mean(dim=0) - states[~one].mean(dim=0)).float() for one in drawn]


def direction_targets(
    name: str,
    direction: Tensor,
    edit: Callable[[Tensor], EditsOf],
    *,
    states: Tensor,
    positive: Array,
    group: Array,
    seed: int,
) -> list[CausalTarget]:
    """What `edit` does with a direction, against random directions and against those of shuffled labels.

    Args:
        name: of what is done.
        direction: [d].
        edit: from a direction to edits; the length of the direction must not matter.
        states, positive, group, seed: as in `shuffled_directions`.
    """
    controls = {
        RANDOM: random_directions(len(direction), seed),
        SHUFFLED: shuffled_directions(states, positive, group, seed),
    }
    return [CausalTarget(name, edit(direction), tuple(map(edit, drawn)), what) for what, drawn in controls.items()]
