"""Image and text tokens as distributions over the vocabulary: the model's own final norm and head at every layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from slitlamp.errors import UnsupportedError
from slitlamp.models import Anatomy
from slitlamp.tracing.probe import Array
from slitlamp.tracing.trace import Source

KL_PAIRS: Final = ("image to text", "image halves", "text halves")
TOP: Final = 5


class Lens:
    """The logit lens (nostalgebraist 2020): what the model would predict from a state of the residual stream.

    The model's own final norm, its own head and, where it has one, its soft cap; the state after the last block is normed
    once, so that its lens is the model's prediction.

    Raises:
        UnsupportedError: weights that are not in memory.
    """

    def __init__(self, source: Source) -> None:
        modules, model = source.anatomy.modules, source.model
        self.norm, self.head = model.get_submodule(modules["final_norm"]), model.get_submodule(modules["head"])
        self.cap = source.anatomy.logit_softcap
        weights = [*self.norm.parameters(), *self.head.parameters()]
        if any(one.is_meta for one in weights):
            raise UnsupportedError(
                "the final norm or the head is not in memory (offloaded, or on the meta device), so there is no logit lens; "
                "measure with vocabulary=False"
            )
        self.device, self.dtype = weights[-1].device, weights[-1].dtype

    @torch.no_grad()
    def log_probabilities(self, states: Tensor) -> Tensor:
        """States [token, d] to float32 [token, vocabulary]."""
        logits = self.head(self.norm(states.to(self.device, self.dtype)[None]))[0].float()
        if self.cap is not None:
            logits = self.cap * torch.tanh(logits / self.cap)
        return logits.log_softmax(dim=-1)


@dataclass(frozen=True)
class Vocabulary:
    """What is kept of one item.

    Attributes:
        kl: float32 [pair, layer], KL divergence in nats between distributions pooled over tokens: of image from text, and as
            controls between two halves (every other token) of the image and of the text. NaN where a half is empty.
        entropy: float32 [2, modality, layer], in nats: mean over tokens, and of the pooled distribution.
        change: float32 [interval, modality, layer], KL of the pooled distribution of a layer from that `interval` layers on.
        top: int32 [modality, slot, layer, 5], the ids of the most probable tokens at chosen tokens; -1 where a slot is empty.
    """

    kl: Array
    entropy: Array
    change: Array
    top: Array


def pooled(log_probabilities: Tensor) -> Tensor:
    """Log of the mean distribution, in float64: [token, vocabulary] to [vocabulary]."""
    return log_probabilities.double().logsumexp(dim=0) - math.log(len(log_probabilities))


def divergence(first: Tensor, second: Tensor) -> float:
    """KL(first || second) in nats of two log distributions [vocabulary]."""
    there = first > -torch.inf
    return max(float((first.exp() * (first - second))[there].sum()), 0.0)


def read_vocabulary(
    lens: Lens, states: Sequence[Tensor], masks: Tensor, row: int, slots: Array, intervals: Sequence[int]
) -> Vocabulary:
    """Read one row of a batch through the lens.

    Args:
        lens: the model's.
        states: per layer [batch, position, d].
        masks: bool [modality, batch, position].
        row: which row.
        slots: [modality, slot], positions of the tokens whose most probable ids are kept; -1 for none.
        intervals: numbers of layers between distributions that are compared.
    """
    n_layers, n_slots = len(states), slots.shape[1]
    kl = np.full((len(KL_PAIRS), n_layers), np.nan, dtype=np.float32)
    entropy = np.zeros((2, 2, n_layers), dtype=np.float32)
    change = np.full((len(intervals), 2, n_layers), np.nan, dtype=np.float32)
    top = np.full((2, n_slots, n_layers, TOP), -1, dtype=np.int32)
    kept: list[list[Tensor]] = [[], []]
    for layer, values in enumerate(states):
        for modality in range(2):
            places = masks[modality, row].nonzero()[:, 0]
            found = lens.log_probabilities(values[row, places.to(values.device)])
            whole = pooled(found)
            kept[modality].append(whole)
            entropy[0, modality, layer] = -(found.exp() * found).nan_to_num(0.0).sum(dim=-1).double().mean().item()
            entropy[1, modality, layer] = -(whole.exp() * whole).nan_to_num(0.0).sum().item()
            if len(found) > 1:
                kl[1 + modality, layer] = divergence(pooled(found[::2]), pooled(found[1::2]))
            chosen = slots[modality][slots[modality] >= 0]
            wanted = np.searchsorted(places.cpu().numpy(), chosen)
            ids = found[torch.from_numpy(wanted).to(found.device)].topk(min(TOP, found.shape[-1]), dim=-1).indices
            top[modality, : len(chosen), layer, : ids.shape[-1]] = ids.cpu().numpy()
        kl[0, layer] = divergence(kept[0][layer], kept[1][layer])
    for place, step in enumerate(intervals):
        for modality in range(2):
            for layer in range(n_layers - step):
                change[place, modality, layer] = divergence(kept[modality][layer], kept[modality][layer + step])
    return Vocabulary(kl, entropy, change, top)


def token_texts(source: Source) -> Array:
    """The tokenizer's text of every id, at most 24 characters: [vocabulary]."""
    anatomy: Anatomy = source.anatomy
    names = source.tokenizer.convert_ids_to_tokens(list(range(min(anatomy.d_vocab, len(source.tokenizer)))))
    texts = ["" if one is None else str(one) for one in names] + [""] * (anatomy.d_vocab - len(names))
    return np.array(texts, dtype="<U24")
