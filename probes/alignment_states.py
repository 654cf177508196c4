"""From the recordings of a batch to what `ImplicitAlignment` keeps of every item: pooled states, norms, changes, some tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from probes.alignment_space import masked_mean, massive
from slitlamp.models import Batch
from slitlamp.tracing.call import Selection
from slitlamp.tracing.probe import Array

MODALITIES: Final = ("image", "text")
IMAGE, TEXT = 0, 1

TextTokens = Literal["after_image", "all"]
GeneratedTokens = Literal["with", "without", "only"]


def item_hash(*names: object) -> int:
    """A number in 0 .. 2^62 that depends on the names alone: which items are kept does not depend on their order."""
    digest = hashlib.blake2b("\0".join(str(one) for one in names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def token_masks(batch: Batch, text: TextTokens, generated: GeneratedTokens, first_token: bool) -> Tensor:
    """Which recorded positions are image tokens and which are the text to compare them with.

    Args:
        batch: what was run.
        text: text after the row's last image, or all text.
        generated: whether text holds the continuation, or is it alone.
        first_token: whether text holds the row's first token (often an attention sink).

    Returns:
        bool [modality, batch, position], over the real positions of each row, packed to the left as a recording of all
        positions is.
    """
    chosen = batch.text_after_image_mask if text == "after_image" else batch.text_mask
    if generated != "with":
        chosen = chosen & (batch.generated_mask if generated == "only" else ~batch.generated_mask)
    if not first_token:
        place = torch.arange(batch.length, device=batch.device)
        chosen = chosen & (place[None, :] != batch.real_mask.int().argmax(dim=1, keepdim=True))
    packed = Selection.of(batch.real_mask)
    both = torch.stack([batch.image_mask, chosen])
    return both.gather(2, packed.index.expand(2, -1, -1)) & packed.valid


@dataclass(frozen=True)
class Measured:
    """What one place (the residual stream, or a tap) gives of a batch, for both modalities.

    Attributes:
        pooled: float32 [batch, modality, layer, d], mean over tokens.
        norm: float32 [batch, modality, layer], median over tokens of the L2 norm.
        change: float32 [batch, interval, modality, layer], mean over tokens of cos(state of the layer, state of the same
            token `interval` layers on); NaN where there is no such layer.
        moments: float64 [2, modality, layer, d], sums over the batch of the tokens' means and mean squares.
        massive: float64 [layer, d], the number of tokens with a massive activation there.
        units: float32 [batch, modality, layer, d], mean over tokens of the states at length 1.
    """

    pooled: Array
    norm: Array
    change: Array
    moments: Array
    massive: Array
    units: Array


def measure(states: Sequence[Tensor], masks: Tensor, intervals: Sequence[int]) -> Measured:
    """Take the states of one place in all its layers, each [batch, position, d], to what is kept of them.

    Args:
        states: per layer; any dtype, any device. One layer at a time is made float32.
        masks: bool [modality, batch, position], at least one token per row and modality.
        intervals: numbers of layers between states that are compared.
    """
    n_batch, n_layers, width = len(states[0]), len(states), states[0].shape[-1]
    pooled = np.zeros((n_batch, 2, n_layers, width), dtype=np.float32)
    units = np.zeros_like(pooled)
    norm = np.zeros((n_batch, 2, n_layers), dtype=np.float32)
    change = np.full((n_batch, len(intervals), 2, n_layers), np.nan, dtype=np.float32)
    moments = np.zeros((2, 2, n_layers, width))
    counts = np.zeros((n_layers, width))
    for layer, recorded in enumerate(states):
        values = recorded.float()
        here = masks.to(values.device)
        counts[layer] = (massive(values) & here.any(dim=0)[..., None]).sum(dim=(0, 1)).cpu().numpy()
        norms, squares = values.norm(dim=-1), values.square()
        at_length_1 = values / torch.where(norms == 0, 1.0, norms)[..., None]
        later = {
            place: cosine_similarity(values, states[layer + step].to(values.device).float(), dim=-1)
            for place, step in enumerate(intervals)
            if layer + step < n_layers
        }
        for modality, mask in enumerate(here):
            mean = masked_mean(values, mask)
            pooled[:, modality, layer] = mean.cpu().numpy()
            units[:, modality, layer] = masked_mean(at_length_1, mask).cpu().numpy()
            median = torch.where(mask, norms, torch.nan).nanquantile(0.5, dim=1)
            norm[:, modality, layer] = median.cpu().numpy()
            moments[0, modality, layer] = mean.double().sum(dim=0).cpu().numpy()
            moments[1, modality, layer] = masked_mean(squares, mask).double().sum(dim=0).cpu().numpy()
            for place, cosines in later.items():
                change[:, place, modality, layer] = masked_mean(cosines, mask).cpu().numpy()
    return Measured(pooled, norm, change, moments, counts, units)


def token_slots(masks: Tensor, items: Sequence[str], limit: int, seed: int) -> Array:
    """Positions of at most `limit` tokens of each item and modality: int64 [batch, modality, limit], -1 where there is none.

    Where an item has more, they are drawn by its name, so that a batch of another size keeps the same ones.
    """
    slots = np.full((len(items), 2, limit), -1, dtype=np.int64)
    for modality, mask in enumerate(masks.cpu().numpy()):
        for row, item in enumerate(items):
            places = np.flatnonzero(mask[row])
            if len(places) > limit:
                rng = np.random.default_rng(item_hash(seed, item, MODALITIES[modality]))
                places = np.sort(rng.choice(places, limit, replace=False))
            slots[row, modality, : len(places)] = places
    return slots


def take_tokens(states: Sequence[Tensor], rows: Array, slots: Array) -> Array:
    """The states of chosen tokens in every layer: float32 [row, modality, slot, layer, d], 0 where a slot is empty."""
    index = torch.from_numpy(slots.clip(min=0))
    empty = slots < 0
    taken = []
    for values in states:
        here = torch.from_numpy(rows).to(values.device)
        found = values[here[:, None, None], index.to(values.device)].float().cpu().numpy()
        taken.append(np.where(empty[..., None], 0, found).astype(np.float32))
    return np.stack(taken, axis=3)
