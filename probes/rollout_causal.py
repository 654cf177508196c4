"""The image tokens that rollout leads to as something to intervene on: hidden from all others, against random image tokens."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray

from probes.outlier_definitions import random_tokens
from slitlamp.decoding.edits import knock_out
from slitlamp.errors import InputError
from slitlamp.models import Batch
from slitlamp.tracing import AnyEdit, CausalTarget
from slitlamp.tracing.probe import N_DRAWS, EditsOf

Tokens = dict[str, NDArray[np.int64]]
"""By item, numbers of image tokens of its row."""


def hidden_tokens(chosen: Tokens, n_layers: int) -> EditsOf:
    """Cut the attention of every other position to chosen image tokens, in all layers and heads."""

    def edits(batch: Batch) -> list[AnyEdit]:
        keys = torch.zeros_like(batch.image_mask)
        for row, item in enumerate(batch.ids):
            if item not in chosen:
                raise InputError(f"where rollout leads in item {item!r} is not known: it was not measured")
            keys[row, batch.image_mask[row].nonzero()[:, 0][torch.from_numpy(chosen[item])]] = True
        return list(knock_out(range(n_layers), "all", keys))

    return edits


def rollout_targets(top: Tokens, n_image: dict[str, int], n_layers: int, seed: int) -> list[CausalTarget]:
    """Hide the tokens `top` of each item, against as many random others of its image.

    Args:
        top: which tokens rollout from the last prompt token weighs most.
        n_image: the number of image tokens of each item.
        n_layers: of the model.
        seed: of the random tokens.
    """
    draws: list[Tokens] = [{} for _ in range(N_DRAWS)]
    for item, tokens in top.items():
        avoid = np.isin(np.arange(n_image[item]), tokens)
        for draw, drawn in enumerate(draws):
            rng = np.random.default_rng([seed, draw, zlib.crc32(item.encode())])
            drawn[item] = np.flatnonzero(random_tokens(n_image[item], len(tokens), rng, avoid=avoid))
    count = max(len(one) for one in top.values())
    return [
        CausalTarget(
            f"the {count} image tokens to which rollout leads from the last prompt token hidden from all others",
            hidden_tokens(top, n_layers),
            tuple(hidden_tokens(one, n_layers) for one in draws),
            "as many random image tokens hidden",
        )
    ]
