"""The most vision-aware heads as something to intervene on, with random heads of the same layers beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from probes.head_agreement import top_heads
from slitlamp.decoding.edits import scale_heads, set_heads
from slitlamp.errors import InputError
from slitlamp.models import Batch
from slitlamp.tracing import Edit
from slitlamp.tracing.probe import N_DRAWS, CausalTarget, EditsOf

Pairs = list[tuple[int, int]]


def head_targets(
    vhd: NDArray[np.float64],
    layers: NDArray[Any],
    means: NDArray[np.float64],
    *,
    k: int,
    n_layers: int,
    seed: int,
    where: str,
) -> list[CausalTarget]:
    """The k heads with the largest VHD set to zero, and set to their mean, against random heads of the same layers.

    Args:
        vhd: [layer, head], mean VHD.
        layers: [layer], their numbers.
        means: [layer, head, d_head], mean outputs with the image, for mean ablation.
        k: number of heads.
        n_layers: of the model.
        seed: of the random heads.
        where: at which tokens VHD was measured, for the name.

    Raises:
        InputError: the chosen heads are all the heads of their layers, so that there is nothing to compare with.
    """
    chosen = top_heads(vhd.reshape(1, -1), k).reshape(vhd.shape)
    n_heads = vhd.shape[-1]
    of_layer = chosen.sum(axis=1)
    if np.isin(of_layer, (0, n_heads)).all():
        raise InputError(
            f"the {k} heads with the largest VHD are all the heads of their layers; choose fewer with top_heads"
        )
    rng = np.random.default_rng(seed)
    controls = [_random(chosen, rng) for _ in range(N_DRAWS)]
    whole = torch.zeros(n_layers, *means.shape[1:], dtype=torch.float32)
    whole[torch.as_tensor(np.asarray(layers, dtype=np.int64))] = torch.as_tensor(means, dtype=torch.float32)

    def pairs(mask: NDArray[np.bool_]) -> Pairs:
        return [(int(layers[row]), int(head)) for row, head in np.argwhere(mask)]

    def zeroed(mask: NDArray[np.bool_]) -> EditsOf:
        heads = pairs(mask)

        def edits(batch: Batch) -> list[Edit]:
            return scale_heads(heads, 0.0)

        return edits

    def averaged(mask: NDArray[np.bool_]) -> EditsOf:
        heads = pairs(mask)

        def edits(batch: Batch) -> list[Edit]:
            return set_heads(heads, whole)

        return edits

    other = "other heads" if (2 * of_layer <= n_heads).all() else "heads, others as far as there are,"
    name, control = f"the {k} heads with the largest VHD at {where}", f"{k} random {other} of the same layers"
    return [
        CausalTarget(f"{name} {what}", make(chosen), tuple(make(one) for one in controls), control)
        for what, make in (("set to zero", zeroed), ("set to their mean", averaged))
    ]


def _random(chosen: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
    """As many heads of each layer at random, others than the chosen ones as far as the layer has them.

    Where more than half of a layer is chosen, all others are taken and the rest drawn among the chosen: no draw can differ more.
    """
    drawn = np.zeros_like(chosen)
    for row, picked in enumerate(chosen):
        order = rng.permutation(len(picked))
        drawn[row, np.concatenate([order[~picked[order]], order[picked[order]]])[: int(picked.sum())]] = True
    return drawn
