"""What alignment points at, as edits: image tokens moved onto the text's mean, or not put through the block that aligns them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from probes.alignment_grid import pooled_cosines
from probes.alignment_sample import Sample
from probes.alignment_states import IMAGE, TEXT
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import Calls, CausalTarget, Edit
from slitlamp.tracing.probe import EditsOf


def largest_rise(sample: Sample) -> int | None:
    """The layer l > 0 at which image-text cosine (without massive dimensions) rises most above the layer before.

    The last layer is left out: nothing reads its image tokens. None for a model of one block.
    """
    curve = [
        pooled_cosines(sample.pooled(IMAGE, layer, "removed"), sample.pooled(TEXT, layer, "removed")).mean()
        for layer in range(sample.n_layers() - 1)
    ]
    return None if len(curve) < 2 else int(np.argmax(np.diff(curve))) + 1


def move_image_tokens(block: int, step: Tensor) -> EditsOf:
    """Add a vector [d_model] to the image tokens of the residual stream after a block."""

    def edits(batch: Batch) -> list[Edit]:
        def move(values: Tensor, calls: Calls) -> Tensor:
            if not calls.is_prefill:
                return values
            chosen = batch.image_mask.to(values.device)[..., None]
            return torch.where(chosen, values + step.to(values), values)

        return [Edit("resid_post", block, move)]

    return edits


def skip_for_image_tokens(block: int) -> EditsOf:
    """Let the image tokens pass a block unchanged; all other tokens go through it."""

    def edits(batch: Batch) -> list[Edit]:
        before: list[Tensor] = []

        def keep(values: Tensor, calls: Calls) -> Tensor:
            before[:] = [values]
            return values

        def put_back(values: Tensor, calls: Calls) -> Tensor:
            if not calls.is_prefill:
                return values
            return torch.where(batch.image_mask.to(values.device)[..., None], before.pop().to(values.device), values)

        return [Edit("resid_pre", block, keep), Edit("resid_post", block, put_back)]

    return edits


def causal_targets(sample: Sample, anatomy: Anatomy, n_draws: int, seed: int) -> list[CausalTarget]:
    """See `ImplicitAlignment.causal_targets`."""
    layer = largest_rise(sample)
    if layer is None:
        return []
    block = layer - 1
    step = sample.vectors["stream"][:, TEXT, layer].mean(axis=0) - sample.vectors["stream"][:, IMAGE, layer].mean(
        axis=0
    )
    rng = np.random.default_rng(seed)
    draws = rng.normal(size=(n_draws, len(step)))
    draws *= np.linalg.norm(step) / np.linalg.norm(draws, axis=1, keepdims=True)
    targets = [
        CausalTarget(
            name=f"image tokens after block {block} moved by the difference of means, onto the text",
            target=move_image_tokens(block, torch.from_numpy(step).float()),
            controls=tuple(move_image_tokens(block, torch.from_numpy(one).float()) for one in draws),
            control_name="moved as far in random directions",
        )
    ]
    # the last block's image tokens are read by nothing
    others = rng.permutation([one for one in range(anatomy.n_layers - 1) if one != block])[:n_draws].tolist()
    if not others:
        return targets
    targets.append(
        CausalTarget(
            name=f"image tokens pass block {block}, which raises image-text cosine most, unchanged",
            target=skip_for_image_tokens(block),
            controls=tuple(skip_for_image_tokens(one) for one in others),
            control_name=f"the same at another block ({', '.join(str(one) for one in sorted(others))})",
        )
    )
    return targets
