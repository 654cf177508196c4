"""What attention knockout cuts and where: the measured token, the positions of a flow, windows of layers, random pairs."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import Batch
from slitlamp.tracing import AttentionEdit, Calls, Site, Trace
from slitlamp.tracing.probe import Labels
from slitlamp.tracing.sites import Positions, attention

Flow = Literal["image_to_question", "image_to_last", "question_to_last", "image_to_generated"]
FLOWS: tuple[str, ...] = get_args(Flow)
PUBLISHED_WINDOW = 9


def measured_tokens(batch: Batch, labels: Labels | None) -> list[int | None]:
    """Per row, which generated token is measured; None for rows that are left out.

    The first token of a correct answer; in a caption, the first token of the first mention of an object that is in the
    image; the first generated token where a row has no labels. Wrong answers are left out (the effect of a knockout on the
    right answer is asked for), and so are captions that name no object of the image.
    """
    found: list[int | None] = []
    for row, count in enumerate(batch.n_generated):
        table = labels[row] if labels else None
        if not count:
            found.append(None)
        elif table is None:
            found.append(0)
        else:
            good = table.loc[table["label"].isin(["correct", "object"]), "token"]
            found.append(int(good.iloc[0]) if len(good) else None)
    return found


def up_to(batch: Batch, tokens: Sequence[int | None]) -> Batch:
    """The batch cut before the measured token of each row, so that the last position predicts it.

    Raises:
        InputError: a row without an image.
        UnsupportedError: a family that reads the image by cross-attention, whose text never attends to image tokens.
    """
    if not batch.has_images:
        rows = [batch.ids[row] for row, some in enumerate(batch.image_mask.any(dim=1).tolist()) if not some]
        raise InputError(
            f"the flow of information from the image cannot be measured without one: {', '.join(rows[:5])}"
        )
    if batch.cross_mask is not None:
        raise UnsupportedError("this family reads the image by cross-attention: there are no image tokens to attend to")
    return batch.with_continuation([given[: token or 0] for given, token in zip(generated(batch), tokens, strict=True)])


def generated(batch: Batch) -> list[list[int]]:
    """Per row, the ids of the continuation."""
    return [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.generated_mask, strict=True)]


def measured_ids(batch: Batch, tokens: Sequence[int | None]) -> Tensor:
    """int64 [batch]: the id of the measured token; 0 for rows that are left out."""
    ids = [0 if token is None else given[token] for given, token in zip(generated(batch), tokens, strict=True)]
    return torch.tensor(ids, device=batch.device)


def places(batch: Batch) -> dict[str, Tensor]:
    """bool [batch, position] of the image's tokens, the question (prompt text after the image, but for the last position),
    the generated tokens before the last position, and the last position, which predicts.
    """
    last = torch.zeros_like(batch.image_mask)
    last[:, -1] = True
    return {
        "image": batch.image_mask,
        "question": batch.text_after_image_mask & ~batch.generated_mask & ~last,
        "generated": batch.generated_mask & ~last,
        "last": last,
    }


def of_flow(batch: Batch, flow: str) -> tuple[Tensor, Tensor]:
    """The positions that read and those that are read, bool [batch, position] each."""
    source, _, target = flow.partition("_to_")
    found = places(batch)
    return found[target], found[source]


_WITHIN: Final[dict[str, Positions]] = {
    "image": "image",
    "question": "text_after_image",
    "generated": "generated",
    "last": "last",
}
"""Named positions of a recording that hold those of each side of a flow."""


def flow_weights(flow: str, layers: Sequence[int]) -> Site:
    """Attention weights, summed over heads, that hold those of a flow: what `check_cut` looks at."""
    source, _, target = flow.partition("_to_")
    return attention(queries=_WITHIN[target], keys=_WITHIN[source], layers=layers, reduce_heads="sum")


def check_cut(trace: Trace, flow: str) -> None:
    """Assert that the weights of a flow, after the softmax, are zero in a run in which it was cut.

    Args:
        trace: of the run, with the recording `flow_weights`.
        flow: which.

    Raises:
        UnsupportedError: a weight that is not zero: this model's attention does not heed the mask it is given.
    """
    batch = trace.batch
    assert batch is not None
    within = {
        "image": batch.image_mask,
        "text_after_image": batch.text_after_image_mask,
        "generated": batch.generated_mask & batch.real_mask,
        "last": places(batch)["last"],
    }
    record = trace["attention"]
    sides = []
    for mask, name, real in zip(
        of_flow(batch, flow), (record.site.queries, record.site.keys), (record.mask, record.key_mask), strict=True
    ):
        inside = torch.zeros_like(real)
        inside[real] = mask[within[str(name)]].to(real.device)
        sides.append(inside)
    pairs = sides[0][:, :, None] & sides[1][:, None, :]
    for layer in record:
        left = record[layer][pairs.to(record[layer].device)]
        if bool((left != 0).any()):
            raise UnsupportedError(
                f"{flow} was cut in layer {layer}, and its attention weights reach {float(left.abs().max()):.2g}: this model's "
                "attention does not heed its mask, so that it cannot be knocked out"
            )


def default_window(n_layers: int) -> int:
    """How many layers are cut together: 9 as published for 32 and 40 layers; in smaller models the largest odd number of at
    most half the layers [?], since a window of nearly all layers says nothing of where.
    """
    half = max(1, n_layers // 2)
    return min(PUBLISHED_WINDOW, half if half % 2 else half - 1)


def window_of(centre: int, width: int, n_layers: int) -> list[int]:
    """The layers of a window, cut off at the ends of the model."""
    return list(range(max(0, centre - width // 2), min(n_layers, centre + width // 2 + 1)))


class Pairs(NamedTuple):
    """Pairs of positions, [batch, pair] each; where `valid` is false there is none."""

    query: Tensor
    key: Tensor
    valid: Tensor


def random_pairs(batch: Batch, queries: Tensor, keys: Tensor, seed: int) -> Pairs:
    """As many random pairs as a flow has, among all others in which a position looks at an earlier one.

    The draw of a row depends on the seed, the item's id and its own positions alone.

    Args:
        queries, keys: bool [batch, position] of the flow.
    """
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    for row, item in enumerate(batch.ids):
        real = batch.real_mask[row].nonzero()[:, 0].cpu().numpy()
        of_query, of_key = (mask[row].cpu().numpy()[real] for mask in (queries, keys))
        query, key = np.tril_indices(len(real), k=-1)
        inside = of_query[query] & of_key[key]
        others = np.flatnonzero(~inside)
        rng = np.random.default_rng([seed, zlib.crc32(item.encode())])
        chosen = rng.choice(others, size=min(int(inside.sum()), len(others)), replace=False)
        drawn.append((real[query[chosen]], real[key[chosen]]))
    width = max(len(one) for one, _ in drawn)
    valid = torch.tensor([[i < len(one) for i in range(width)] for one, _ in drawn], dtype=torch.bool).view(
        len(drawn), width
    )
    sides = [
        torch.from_numpy(np.stack([np.pad(pair[side], (0, width - len(pair[side]))) for pair in drawn]))
        for side in (0, 1)
    ]
    return Pairs(sides[0].to(batch.device), sides[1].to(batch.device), valid.to(batch.device))


def cut_pairs(layers: Sequence[int], pairs: Pairs) -> list[AttentionEdit]:
    """Cut single pairs of positions of the prompt in all heads of some layers."""

    def cut(rows: Tensor, columns: Tensor, calls: Calls) -> Tensor:
        blocked = torch.zeros(len(rows), rows.shape[1], len(columns), dtype=torch.bool, device=rows.device)
        last = max(int(rows.max()), calls.batch.length) + 1
        slot = torch.full((len(rows), last), -1, device=rows.device)
        slot.scatter_(1, rows, torch.arange(rows.shape[1], device=rows.device).expand_as(rows))
        query, key = (one.to(rows.device) for one in (pairs.query, pairs.key))
        here = slot.gather(1, query)
        inside = pairs.valid.to(rows.device) & (here >= 0) & (key >= columns[0])
        row, number = inside.nonzero(as_tuple=True)
        blocked[row, here[row, number], key[row, number] - columns[0]] = True
        return blocked[:, None]

    return [AttentionEdit(layer, cut, "all") for layer in layers]
