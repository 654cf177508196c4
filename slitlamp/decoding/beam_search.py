"""Beam search: the likeliest texts found by following several beginnings of each at a time.

The search is that of transformers' `generate(num_beams=...)` without sampling, and gives its texts. Here it runs over rows that
the rest of slitlamp knows: every prompt of the batch is there once for each beam, so that edits act on beams as they do on rows,
and the caches of contrast branches follow the beams as the clean one's does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from slitlamp.errors import InputError

Score = Callable[[Tensor, Tensor | None], Tensor]
"""(texts int64 [row, position], which row of the step before each goes on from int64 [row], or None at the first step) -> log
probabilities of the next token after all processors, float32 [row, vocab].
"""


@dataclass(frozen=True)
class Beams:
    """How to search.

    Attributes:
        number: beams of each prompt, at least 2.
        length_penalty: log p of a text is divided by its number of tokens to this power.
        early_stopping: when a prompt is done that has as many ended texts as beams. True: at once; False: when no beam could beat
            the worst of them if it ended now; "never": at whatever length.
    """

    number: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False


@dataclass
class _Search:
    """The search of one prompt: its ended texts, each with its score, the best first."""

    beams: Beams
    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    is_open: bool = True

    def end(self, log_p: float, tokens: list[int]) -> None:
        """A text has ended."""
        if not self.is_open or log_p == -math.inf:
            return
        self.ended.append((log_p / len(tokens) ** self.beams.length_penalty, tokens))
        self.ended.sort(key=lambda one: -one[0])
        del self.ended[self.beams.number :]

    def close(self, log_p: float, length: int, max_length: int) -> None:
        """Close the search if no text that goes on, the likeliest of log p at this length, can do better than all that ended."""
        if len(self.ended) < self.beams.number:
            return
        if self.beams.early_stopping == "never" and self.beams.length_penalty > 0:
            length = max_length
        hopeless = log_p / length**self.beams.length_penalty <= self.ended[-1][0]
        self.is_open = self.is_open and not (self.beams.early_stopping is True or hopeless)


def search(
    beams: Beams, prompts: Tensor, score: Score, ends: tuple[int, ...], max_new_tokens: int, pad_token_id: int
) -> Tensor:
    """The best text of each prompt, int64 [prompt, position], padded on the right.

    Args:
        beams: how to search.
        prompts: int64 [prompt x beam, position]; those of one prompt follow each other.
        score: what the next token may be.
        ends: tokens that end a text.
        max_new_tokens: limit of new tokens.
        pad_token_id: fills texts up.

    Raises:
        InputError: a prompt after which no text is possible.
    """
    k, n = beams.number, len(prompts) // beams.number
    searches = [_Search(beams) for _ in range(n)]
    totals = torch.full((n, k), -math.inf, device=prompts.device)
    totals[:, 0] = 0  # the beams of a prompt start alike
    texts, order = prompts, None
    for step in itertools.count(1):
        found = score(texts, order)
        vocab = found.shape[-1]
        total = (totals[..., None] + found.view(n, k, vocab)).flatten(1)
        best, index = total.topk(min(max(2, 1 + len(ends)) * k, k * vocab), dim=-1)
        said = texts[:, prompts.shape[1] :].view(n, k, -1).tolist()
        running: list[list[tuple[float, int, int]]] = []
        for number, (one, values, places) in enumerate(zip(searches, best.tolist(), index.tolist(), strict=True)):
            going: list[tuple[float, int, int]] = []
            for rank, (log_p, place) in enumerate(zip(values, places, strict=True)):
                beam, token = divmod(place, vocab)
                if token in ends or step == max_new_tokens:
                    if rank < k:
                        one.end(log_p, [*said[number][beam], token])
                elif len(going) < k:
                    going.append((log_p, beam, token))
            going += [(-math.inf, 0, pad_token_id)] * (k - len(going))
            one.close(going[0][0], step, max_new_tokens)
            running.append(going)
        if step == max_new_tokens or not any(one.is_open for one in searches):
            break
        totals = torch.tensor([[log_p for log_p, _, _ in going] for going in running], device=prompts.device)
        order = torch.tensor(
            [number * k + beam for number, going in enumerate(running) for _, beam, _ in going], device=prompts.device
        )
        chosen = torch.tensor([token for going in running for _, _, token in going], device=prompts.device)
        texts = torch.cat([texts[order], chosen[:, None]], dim=-1)
    if not all(one.ended for one in searches):
        number = next(number for number, one in enumerate(searches) if not one.ended)
        raise InputError(
            f"beam search found no text for prompt {number}: the processors of this generation forbid every token at some step"
        )
    said_best = [one.ended[0][1] for one in searches]
    longest = max(map(len, said_best))
    filled = [[*one, *[pad_token_id] * (longest - len(one))] for one in said_best]
    return torch.cat([prompts[::k], prompts.new_tensor(filled).view(n, longest)], dim=-1)
