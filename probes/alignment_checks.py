"""The parameters of `ImplicitAlignment`, checked against a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probes.alignment_grid import REDUCTIONS
from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models import Anatomy

if TYPE_CHECKING:
    from probes.implicit_alignment import ImplicitAlignment


def check_parameters(probe: ImplicitAlignment, anatomy: Anatomy) -> None:
    """Refuse what cannot be measured, before anything runs.

    Raises:
        UnknownNameError: a choice that is none.
        InputError: a number that does not fit this model, or any.
        UnsupportedError: a model without image tokens in its residual stream.
    """
    for what, value, known in (
        ("text", probe.text, ("after_image", "all")),
        ("generated", probe.generated, ("with", "without", "only")),
        ("standardise", probe.standardise, ("joint", "scale", "modality")),
        ("embedding", probe.embedding, ("tsne", "pca", "none")),
        *(("reduction", one, REDUCTIONS) for one in probe.reductions),
    ):
        if value not in known:
            raise unknown(what, value, known)
    numbers = {
        "max_items": probe.max_items,
        "n_buckets": probe.n_buckets,
        "token_items": probe.token_items,
        "max_tokens": probe.max_tokens,
        "n_ids": probe.n_ids,
        "embedding_tokens": probe.embedding_tokens,
        "n_draws": probe.n_draws,
        "massive_k": probe.massive_k,
    }
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise InputError(f"{name} must be at least 1, found {number}")
    if not probe.reductions:
        raise InputError("reductions is empty; name at least one")
    if probe.massive_k is not None and probe.massive_k >= anatomy.d_model:
        raise InputError(f"massive_k {probe.massive_k} would remove all {anatomy.d_model} dimensions")
    if min(probe.intervals, default=0) < 1:
        raise InputError(f"intervals must hold numbers of layers from 1, found {list(probe.intervals)}")
    if min(probe.intervals) >= max(anatomy.n_layers, 2):
        raise InputError(f"no interval of {list(probe.intervals)} is below the number of layers, {anatomy.n_layers}")
    outside = [one for one in probe.embedding_layers or () if not 0 <= one <= anatomy.n_layers]
    if outside:
        raise InputError(f"embedding_layers {outside} are not among 0 (the input) to {anatomy.n_layers}")
    if anatomy.layers("cross_attention"):
        raise UnsupportedError(
            f"{anatomy.family.name} reads the image by cross-attention: there are no image tokens in the residual stream"
        )
