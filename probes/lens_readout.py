"""What the logit lens says of the tokens of one item: of its text, and of the image at and beside an object."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from probes.token_sets import object_tokens, shifted_tokens
from slitlamp.models.patches import Patches
from slitlamp.tracing.lens import lens_logits
from slitlamp.tracing.probe import Array
from slitlamp.tracing.trace import Source

TEXT_METRICS: Final = ("probability", "rank", "top1", "entropy", "kl")
"""Of the token that is emitted in the end: its probability, its rank from 1, whether that is 1; entropy of the lens; and
KL(final layer || lens), both in nats."""
IMAGE_METRICS: Final = ("probability", "rank", "auroc")
"""Of the object's token at image tokens: its probability, its rank from 1, and the share of pairs (token of a place, token
beside it) in which the first finds it likelier (0.5 by chance)."""
PLACES: Final = ("inside", "outside", "shifted")
"""Image tokens of the object's boxes, all others, and the same shape moved elsewhere, the control."""


def read_text(source: Source, states: Sequence[Tensor], emitted: Tensor) -> Array:
    """The lens at positions that predict, float64 [layer, token, metric].

    Args:
        source: the model.
        states: per layer [token, d_model], after the block; the last is that after the last block.
        emitted: int64 [token], the token that followed.
    """
    final = torch.cat([part.double().log_softmax(dim=-1) for part in lens_logits(source, states[-1])])
    found = np.zeros((len(states), len(emitted), len(TEXT_METRICS)))
    for layer, state in enumerate(states):
        start = 0
        for part in lens_logits(source, state):
            here = slice(start, start + len(part))
            found[layer, here] = _of_text(part.double(), emitted[here], final[here])
            start += len(part)
    return found


def _of_text(logits: Tensor, emitted: Tensor, final: Tensor) -> Array:
    log_p = logits.log_softmax(dim=-1)
    last = final.to(log_p.device)
    own = log_p.gather(1, emitted.to(log_p.device)[:, None])
    rank = (log_p > own).sum(dim=1) + 1
    entropy = torch.special.entr(log_p.exp()).sum(dim=1)
    share = last.exp()
    kl = torch.where(share > 0, share * (last - log_p), 0.0).sum(dim=1).clamp(min=0)
    return np.asarray(torch.stack([own[:, 0].exp(), rank.double(), (rank == 1).double(), entropy, kl], dim=1).cpu())


def name_tokens(category: str, tokenizer: Any) -> list[int]:
    """The first tokens of a category's name, with and without a capital or a space before it; empty where it has none."""
    found: dict[int, None] = {}
    for word in (category, category.capitalize()):
        for form in (f" {word}", word):
            ids = tokenizer(form, add_special_tokens=False)["input_ids"]
            if ids and ids[0] != tokenizer.unk_token_id and tokenizer.decode([ids[0]]).strip():
                found[int(ids[0])] = None
    return list(found)


def read_image(source: Source, states: Sequence[Tensor], names: Sequence[Sequence[int]]) -> Array:
    """The lens at image tokens, float64 [object, layer, token, (probability, rank)].

    Args:
        source: the model.
        states: per layer [token, d_model].
        names: per object, the ids that begin its name; their probabilities are summed, the best rank counts.
    """
    found = np.zeros((len(names), len(states), len(states[0]), 2))
    for layer, state in enumerate(states):
        start = 0
        for part in lens_logits(source, state):
            log_p = part.double().log_softmax(dim=-1)
            for number, ids in enumerate(names):
                own = log_p[:, list(ids)]
                rank = (log_p > own.max(dim=1, keepdim=True).values).sum(dim=1) + 1
                both = torch.stack([own.exp().sum(dim=1), rank.double()], dim=1)
                found[number, layer, start : start + len(part)] = both.cpu().numpy()
            start += len(part)
    return found


def at_object(
    values: Array, patches: Patches, boxes: Sequence[Any], item: str, category: str, *, n_shifted: int, seed: int
) -> Array | None:
    """What the lens says in an object's boxes, beside them, and at the same shape elsewhere: float64 [layer, place, metric].

    None where the boxes cover no token, or every one.

    Args:
        values: [layer, token, (probability, rank)], of `read_image`.
        patches: where the tokens are.
        boxes: of the object, in shares of the image.
        item, category, seed: what the draws of the control depend on, and nothing else.
        n_shifted: how many shifted places are averaged.
    """
    on_image = patches.on_image & (patches.image == 0)
    inside = object_tokens(patches, boxes, 0, 0.25) & on_image
    if not bool(inside.any()) or bool((inside == on_image).all()):
        return None
    rng = np.random.default_rng([seed, zlib.crc32(f"{item} {category}".encode())])
    shifted = [shifted_tokens(patches, inside, rng) & on_image for _ in range(n_shifted)]
    whole = on_image.numpy()
    found = np.zeros((len(values), len(PLACES), len(IMAGE_METRICS)))
    found[:, 0] = _of_place(values, inside.numpy(), whole)
    found[:, 1] = _of_place(values, whole & ~inside.numpy(), whole)
    found[:, 2] = np.mean([_of_place(values, one.numpy(), whole) for one in shifted], axis=0)
    return found


def _of_place(values: Array, chosen: Array, whole: Array) -> Array:
    """Mean probability and rank of chosen tokens, and the share of pairs with the others that they win: [layer, metric]."""
    means = values[:, chosen].mean(axis=1)
    ranks = rankdata(values[:, whole, 0], axis=1)
    inside = chosen[whole]
    n_in, n_out = int(inside.sum()), int((~inside).sum())
    wins = (ranks[:, inside].sum(axis=1) - n_in * (n_in + 1) / 2) / max(n_in * n_out, 1)
    return np.concatenate([means, wins[:, None]], axis=1)
