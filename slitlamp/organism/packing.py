"""Packed sequences: one image prefix and many exchanges about it as branches of a single row.

Each branch sees the prefix and itself. Its position ids continue from the prefix, so that its logits are those of
the branch run alone after its own prefix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from slitlamp.organism.language import Exchange
from slitlamp.organism.tokenizer import ASSISTANT, BOS, EOS, IMAGE, PAD, TOKEN_ID, USER

IGNORE: Final = -100
"""Target of positions without supervision."""
TASK_WEIGHTS: Final = {"caption": 1.0, "brief": 1.0, "yes_no": 2.0, "where": 2.0}
REFINE_WEIGHTS: Final = TASK_WEIGHTS | {"yes_no": 5.0}
"""Weights of the last stage: one seed in two still answered yes/no questions at chance when its captions and positions
were good, because the six answers are a small part of a row's tokens."""
TASKS: Final = tuple(TASK_WEIGHTS)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows of packed branches; every tensor is `[row, position]`.

    `branch` is 0 in the prefix, 1.. in the branches, -1 where nothing is to be seen (padding, and the image slots of
    rows without an image). `targets` is the next token or -100, `weights` the loss weight of a target, `tasks` the
    position of its task in `TASKS`.
    """

    input_ids: Tensor
    branch: Tensor
    position_ids: Tensor
    targets: Tensor
    weights: Tensor
    tasks: Tensor

    def attention(self) -> Tensor:
        """Which key each query may see, bool `[row, 1, query, key]`; padding sees itself only."""
        length = self.branch.shape[1]
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        seen = ((key == query) | (key == 0)) & (key >= 0) & (query >= 0) & causal
        return (seen | torch.eye(length, dtype=torch.bool))[:, None]


def pack(
    rows: Sequence[Sequence[Exchange]],
    with_image: Sequence[bool],
    image_slots: int,
    task_weights: Mapping[str, float] = TASK_WEIGHTS,
    multiple: int = 8,
) -> PackedBatch:
    """Pack each row's exchanges after a prefix `<s> USER: <image>...` of `2 + image_slots` positions.

    Rows with `with_image` False keep the image slots, invisible and without a position of their own.
    """
    prefix = [TOKEN_ID[BOS], TOKEN_ID[USER]] + [TOKEN_ID[IMAGE]] * image_slots
    encoded = [[_encode(exchange) for exchange in row] for row in rows]
    longest = len(prefix) + max(sum(len(ids) for ids, _, _ in row) for row in encoded)
    length = -(-longest // multiple) * multiple
    shape = (len(rows), length)
    ids = np.full(shape, TOKEN_ID[PAD], dtype=np.int64)
    branch = np.full(shape, -1, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, IGNORE, dtype=np.int64)
    weights = np.zeros(shape, dtype=np.float32)
    tasks = np.zeros(shape, dtype=np.int64)
    ids[:, : len(prefix)] = prefix
    positions[:, : len(prefix)] = np.arange(len(prefix))
    for r, (row, image) in enumerate(zip(encoded, with_image, strict=True)):
        branch[r, : len(prefix) if image else 2] = 0
        start = len(prefix)
        offset = len(prefix) if image else 2
        for number, (tokens, answer_start, task) in enumerate(row, start=1):
            stop = start + len(tokens)
            ids[r, start:stop] = tokens
            branch[r, start:stop] = number
            positions[r, start:stop] = offset + np.arange(len(tokens))
            targets[r, start + answer_start - 1 : stop] = [*tokens[answer_start:], TOKEN_ID[EOS]]
            weights[r, start + answer_start - 1 : stop] = task_weights[task]
            tasks[r, start:stop] = TASKS.index(task)
            start = stop
    return PackedBatch(*(torch.from_numpy(array) for array in (ids, branch, positions, targets, weights, tasks)))


def _encode(exchange: Exchange) -> tuple[list[int], int, str]:
    """Token ids of prompt, `ASSISTANT:` and answer; where the answer starts; the task."""
    prompt = [TOKEN_ID[token] for token in exchange.prompt] + [TOKEN_ID[ASSISTANT]]
    return prompt + [TOKEN_ID[token] for token in exchange.answer], len(prompt), exchange.task
