"""Which heads see: the formulas of vision-aware head divergence (Liu et al., ACL 2025, arXiv 2412.13949)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from slitlamp.errors import unknown

Choice = Literal["divergent", "least", "random", "all"]
CHOICES: tuple[str, ...] = ("divergent", "least", "random", "all")


def head_divergence(z: Tensor, z_image_free: Tensor) -> Tensor:
    """VHD: the distance of a head's output with the image from its output without it (Eq. 3).

    Args:
        z: [..., head, d_head], head outputs before the output projection.
        z_image_free: the same for the run without image.

    Returns:
        [..., head] Euclidean norms (not squared), in float32.
    """
    return torch.linalg.vector_norm(z.float() - z_image_free.float(), dim=-1)


def text_activation(z_image_free: Tensor) -> Tensor:
    """TA: the squared norm of a head's output without the image: [..., head, d_head] to [..., head], in float32."""
    return z_image_free.float().square().sum(dim=-1)


def zero_surging_heads(divergence: Tensor, activation: Tensor, *, ddof: int = 0) -> Tensor:
    """The outlier rule: a head that surges when the image is removed does not count as vision-aware.

    VHD is set to 0 where both VHD and TA exceed mean + standard deviation over the heads of the layer.

    Args:
        divergence: VHD [..., head].
        activation: TA [..., head].
        ddof: 0 for the population standard deviation, 1 for the sample one. The paper does not say [?].

    Returns:
        [..., head].
    """
    return divergence.masked_fill(surging(divergence, ddof=ddof) & surging(activation, ddof=ddof), 0)


def surging(values: Tensor, *, ddof: int = 0) -> Tensor:
    """Which values [..., head] exceed mean + standard deviation over the heads: one side of the outlier rule."""
    return values > values.mean(dim=-1, keepdim=True) + values.std(dim=-1, keepdim=True, correction=ddof)


def choose_heads(divergence: Tensor, choice: Choice, *, seed: int = 0, layer: int = 0) -> Tensor:
    """Which heads of a layer to reinforce.

    Args:
        divergence: VHD [row, head] after the outlier rule.
        choice: "divergent": VHD above the layer's median (the paper's rule: half of the heads); "least": the same number
            with the smallest VHD; "random": the same number drawn at random, the same draw for every row; "all".
        seed, layer: of the random draw.

    Returns:
        bool [row, head].
    """
    if choice not in CHOICES:
        raise unknown("choice of heads", choice, CHOICES)
    n_heads = divergence.shape[-1]
    # torch.median gives the lower of the two middle values; the median of an even number of heads lies between them
    median = divergence.quantile(0.5, dim=-1, keepdim=True)
    divergent = divergence > median
    if choice == "divergent":
        return divergent
    if choice == "all":
        return torch.ones_like(divergent)
    count = divergent.sum(dim=-1, keepdim=True)
    if choice == "least":
        rank = divergence.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    else:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
        rank = torch.randperm(n_heads, generator=generator).to(divergence.device).expand_as(divergence)
    return rank < count


_LLAVA_LAYERS = (1, *range(18, 32))
_PUBLISHED = {"llava": _LLAVA_LAYERS, "llava_next": _LLAVA_LAYERS, "instructblip": tuple(range(14, 32))}


def default_layers(n_layers: int, model_type: str = "") -> tuple[int, ...]:
    """The layers that VHR reinforces by default.

    As published for models of 32 layers: the second and the last 14 of LLaVA-1.5 and LLaVA-NeXT, the last 18 of InstructBLIP.
    Other depths and families have no published default: the last 44 % (14 / 32), rounded, at least one [?].

    Args:
        n_layers: of the language model.
        model_type: of the family (`anatomy.family.model_type`).
    """
    if n_layers == 32 and model_type in _PUBLISHED:
        return _PUBLISHED[model_type]
    last = max(1, round(n_layers * 14 / 32))
    return tuple(range(n_layers - last, n_layers))
