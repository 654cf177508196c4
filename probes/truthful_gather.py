"""Which generated tokens are samples of `TruthfulDirection`, and what is kept of them beside their states."""

from __future__ import annotations

import numpy as np
import pandas as pd
from torch import Tensor

from slitlamp.errors import InputError
from slitlamp.tracing.probe import Array

INPUT_LAYER = -1
"""Stands for `resid_pre[0]`, the input of the language model, among the layers."""
ANSWERS = ("yes", "all")
COLUMNS = (
    "item", "group", "token", "word", "hallucinated", "category", "frequency", "mention", "neg_log_p", "confidence", "pmc",
    "n_preceding",
)  # fmt: skip
"""Of a sample: item, image, place of its token in the text, the word, the label, object and how common it is, which mention
of the text it is (from 1), -log p of the token, the largest probability at that step, the smallest of these over the tokens
of the sentence before it (NaN at its first token), and how many these are."""
SENTENCE_ENDS = (".", "!", "?")


def named_tokens(table: pd.DataFrame, n_generated: int, answers: str) -> pd.DataFrame:
    """The samples of one text: token, word, hallucinated, category, frequency, mention (1 for the first).

    Args:
        table: labels of the text's tokens (`slitlamp.tracing.probe.Labels`).
        n_generated: tokens of the text.
        answers: of yes/no questions, "yes" or "all".

    Raises:
        InputError: answers without the truth, when only those of yes are wanted.
    """
    rows = table[table["token"] < n_generated]
    label = rows["label"].to_numpy(dtype=str)
    caption = np.isin(label, ("object", "hallucinated"))
    answer = np.isin(label, ("correct", "wrong"))
    if answer.any() and answers == "yes":
        truth = rows["truth"] if "truth" in rows else pd.Series(None, index=rows.index, dtype=object)
        if truth[answer].isna().any():
            raise InputError("labels of answers lack the truth, so answers of yes are not known: take answers='all'")
        said_yes = (truth.to_numpy() == "yes") == (label == "correct")
        answer &= said_yes
    chosen = caption | answer
    kept = rows[chosen]
    return pd.DataFrame(
        {
            "token": kept["token"].to_numpy(dtype=np.int64),
            "word": kept["word"].to_numpy(dtype=str),
            "hallucinated": np.isin(label[chosen], ("hallucinated", "wrong")),
            "category": _text(kept, "category"),
            "frequency": kept["frequency"].to_numpy(dtype=np.float64)
            if "frequency" in kept
            else np.full(len(kept), np.nan),
            "mention": np.arange(1, len(kept) + 1),
        }
    )


def _text(rows: pd.DataFrame, column: str) -> Array:
    """A column of text, "" where it is missing."""
    if column not in rows:
        return np.full(len(rows), "", dtype="<U1")
    return np.array(["" if pd.isna(one) else str(one) for one in rows[column]], dtype=str)


def mention_rows(named: pd.DataFrame, table: pd.DataFrame, logits: Tensor, tokens: Tensor) -> dict[str, Array]:
    """The columns to keep of one text's samples.

    Args:
        named: of `named_tokens`.
        table: labels of all the text's tokens.
        logits: [position, vocabulary], row t predicts token t of the text.
        tokens: [token], the ids of the text.
    """
    log_p = logits[: len(tokens)].float().log_softmax(dim=-1)
    emitted = log_p.gather(1, tokens.to(log_p.device)[:, None])[:, 0]
    confidence = log_p.amax(dim=-1).exp().cpu().numpy().astype(np.float64)
    place = named["token"].to_numpy(dtype=np.int64)
    start = sentence_starts(table, len(tokens))[place]
    return {
        **{one: named[one].to_numpy() for one in ("token", "hallucinated", "frequency", "mention")},
        **{one: named[one].to_numpy(dtype=str) for one in ("word", "category")},
        "neg_log_p": -emitted[place.tolist()].cpu().numpy().astype(np.float64),
        "confidence": confidence[place],
        "pmc": np.array([confidence[a:b].min() if a < b else np.nan for a, b in zip(start, place, strict=True)], float),
        "n_preceding": place - start,
    }


def sentence_starts(table: pd.DataFrame, n_tokens: int) -> Array:
    """Per token, the first token of its sentence: [token]. A sentence ends with a word that ends in one of `SENTENCE_ENDS`."""
    ends = {
        int(token)
        for token, word in zip(table["token"], table["word"], strict=True)
        if str(word).strip().endswith(SENTENCE_ENDS)
    }
    starts, start = np.zeros(n_tokens, dtype=np.int64), 0
    for token in range(n_tokens):
        starts[token] = start
        if token in ends:
            start = token + 1
    return starts
