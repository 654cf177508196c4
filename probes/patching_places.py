"""Where activations are patched: the positions of each role in a prompt, and the tokens whose logits are compared."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.knockout_flows import measured_ids, places
from probes.token_sets import object_tokens
from slitlamp.models import Batch
from slitlamp.tracing.probe import Labels

ROLES: Final = ("object", "other_image", "question_object", "other_text", "last")
"""Image tokens of the object's boxes, all other image tokens, the words of the prompt that name the object, the rest of the
text, and the last position, which predicts."""


def measured_row(labels: Labels | None, row: int, token: int | None) -> pd.Series | None:
    """The row of the labels about the measured token; None where there is none."""
    table = labels[row] if labels else None
    if table is None or token is None:
        return None
    found = table[table["token"] == token]
    return found.iloc[0] if len(found) else None


def category_of(about: pd.Series | None) -> str | None:
    """The object that is asked for or named."""
    found = None if about is None else about.get("category")
    return found if isinstance(found, str) else None


def boxes_of(about: pd.Series | None) -> list[Any]:
    """Where that object is."""
    found = None if about is None else about.get("boxes")
    return list(found) if isinstance(found, list | tuple | np.ndarray) else []


def roles(short: Batch, labels: Labels | None, tokens: Sequence[int | None], tokenizer: Any) -> dict[str, Tensor]:
    """bool [batch, position] of every role of `ROLES`; false everywhere in rows that lack it.

    Args:
        short: the batch cut before the measured token (`knockout_flows.up_to`).
        labels: of the batch.
        tokens: per row, the measured token.
        tokenizer: of the model.
    """
    known = places(short)
    on_object, named = torch.zeros_like(short.image_mask), torch.zeros_like(short.image_mask)
    for row, token in enumerate(tokens):
        about = measured_row(labels, row, token)
        boxes, category = boxes_of(about), category_of(about)
        if boxes:
            chosen = object_tokens(short.patches[row], boxes, 0, 0.25).to(short.device)
            on_object[row, short.image_mask[row].nonzero()[:, 0][chosen]] = True
        if category is not None:
            prompt = (short.text_mask & ~short.generated_mask)[row].nonzero()[:, 0]
            named[row, _named(short.input_ids[row], prompt, category, tokenizer)] = True
    named &= ~known["last"]
    return {
        "object": on_object,
        "other_image": short.image_mask & ~on_object,
        "question_object": named,
        "other_text": short.text_mask & ~named & ~known["last"],
        "last": known["last"],
    }


def _named(ids: Tensor, prompt: Tensor, category: str, tokenizer: Any) -> Tensor:
    """The positions at which the prompt names a category for the last time, [position]; none where it does not."""
    text = ids[prompt].tolist()
    for word in (category, category.capitalize()):
        for form in (f" {word}", word):
            sought = tokenizer(form, add_special_tokens=False)["input_ids"]
            if not sought or tokenizer.unk_token_id in sought:
                continue
            for start in range(len(text) - len(sought), -1, -1):
                if text[start : start + len(sought)] == sought:
                    return prompt[start : start + len(sought)]
    return prompt[:0]


def random_places(short: Batch, mask: Tensor, role: str, seed: int) -> Tensor:
    """As many random real positions as a role has, of those it does not have: bool [batch, position].

    The draw of a row depends on the seed, the role, the item's id and its own positions alone.
    """
    drawn = torch.zeros_like(mask)
    for row, item in enumerate(short.ids):
        others = (short.real_mask & ~mask)[row].nonzero()[:, 0].cpu().numpy()
        rng = np.random.default_rng([seed, zlib.crc32(f"{item} {role}".encode())])
        chosen = rng.choice(others, size=min(int(mask[row].sum()), len(others)), replace=False)
        drawn[row, torch.from_numpy(chosen).to(drawn.device)] = True
    return drawn


def contrast(
    batch: Batch, labels: Labels | None, tokens: Sequence[int | None], logits: Tensor, tokenizer: Any
) -> tuple[Tensor, Tensor]:
    """The ids whose logits are compared, int64 [batch] each: the correct token and its foil.

    For yes/no questions the first tokens of the right and the wrong answer, written as the model writes them: as the answer
    that it gave, or in the way that it finds likeliest. Otherwise the measured token and its likeliest rival.

    Args:
        batch: with its continuation.
        labels, tokens: of the batch; per row, the measured token.
        logits: [batch, d_vocab] of the clean run, where the measured token is predicted.
        tokenizer: of the model.
    """
    logits = logits.detach()
    correct = measured_ids(batch, tokens).to(logits.device)
    rival = logits.clone().scatter_(1, correct[:, None], -torch.inf).argmax(dim=1)
    styles = _answers(tokenizer)
    for row, token in enumerate(tokens):
        about = measured_row(labels, row, token)
        truth = None if about is None else about.get("truth")
        if truth not in ("yes", "no") or not styles:
            continue
        emitted = int(correct[row])
        spoken = [style for style in styles if emitted in style]
        yes, no = max(spoken or styles, key=lambda style: float(logits[row, list(style)].float().logsumexp(dim=0)))
        correct[row], rival[row] = (yes, no) if truth == "yes" else (no, yes)
    return correct, rival


def _answers(tokenizer: Any) -> list[tuple[int, int]]:
    """The first tokens of "yes" and "no" in every way of writing them that the tokenizer tells apart."""
    found: dict[tuple[int, int], None] = {}
    for write in (str, str.capitalize, str.upper):
        for space in ("", " "):
            texts = [space + write(word) for word in ("yes", "no")]
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            if not all(one and one[0] != tokenizer.unk_token_id for one in ids):
                continue
            yes, no = ids[0][0], ids[1][0]
            if yes != no:
                found[yes, no] = None
    return list(found)
