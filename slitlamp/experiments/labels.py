"""Which generated tokens name an object, whether that object is in the image, and whether an answer is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from slitlamp.evaluation.chair import GroundTruth, ImageId, Synonyms
from slitlamp.evaluation.pope import parse_answer

Spans = Sequence[tuple[int, int]]
COLUMNS = ["token", "word", "label", "category", "frequency", "truth", "boxes", "start", "end"]


def token_labels(text: str, spans: Spans, image_id: ImageId, truth: GroundTruth, synonyms: Synonyms) -> pd.DataFrame:
    """Label the tokens of one generated caption.

    Args:
        text: the caption.
        spans: per token, its range of characters in `text`; empty for special tokens.
        image_id: the image in `truth`.
        truth: the objects of the images.
        synonyms: the words for them.

    Returns:
        One row per token that stands for characters (an end token has none): token (0-based in the generation), word
        (its characters), label, category (None unless it names an object), frequency (the share of the images of `truth`
        with that object), truth (None), boxes (where that object is in the image: tuples of (left, top, right, bottom) in
        shares of the image), start, end. The label is "object" or "hallucinated" at the FIRST token of a mention, so that
        every mention counts once however many tokens it has; all other tokens are "other".
    """
    key = truth.resolve(image_id)
    rows = _rows(text, spans)
    for mention in synonyms.mentions(text):
        first = next((row for row in rows if row["start"] < mention.end and row["end"] > mention.start), None)
        if first is not None:
            present = mention.category in truth.objects[key]
            first |= {"label": "object" if present else "hallucinated", **_object(mention.category, key, truth)}
    return pd.DataFrame(rows, columns=COLUMNS)


def answer_labels(
    text: str,
    spans: Spans,
    answer: str,
    asked: str | None,
    image_id: ImageId,
    truth: GroundTruth | None = None,
    synonyms: Synonyms | None = None,
) -> pd.DataFrame:
    """Label the tokens of the answer to one yes/no question.

    Args:
        text, spans: as in `token_labels`.
        answer: the right answer, "yes" or "no".
        asked: the object that the question is about, where it is known.
        image_id: the image in `truth`.
        truth, synonyms: what is in the images, where that is known.

    Returns:
        The columns of `token_labels`. The first token has the label "correct" or "wrong" (by POPE's official reading of
        the whole answer), the category asked for, its frequency and boxes, and the right answer as `truth`.
    """
    rows = _rows(text, spans)
    if rows:
        rows[0] |= {"label": "correct" if parse_answer(text, "official") == answer else "wrong", "truth": answer}
        if asked is not None:
            category = synonyms.category(asked) if synonyms is not None else asked
            rows[0] |= {"category": category}
            if truth is not None:
                rows[0] |= _object(category, truth.resolve(image_id), truth)
    return pd.DataFrame(rows, columns=COLUMNS)


def _rows(text: str, spans: Spans) -> list[dict[str, Any]]:
    nothing = {"label": "other", "category": None, "frequency": float("nan"), "truth": None, "boxes": ()}
    return [
        {"token": i, "word": text[start:end], **nothing, "start": start, "end": end}
        for i, (start, end) in enumerate(spans)
        if end > start
    ]


def _object(category: str, image: ImageId, truth: GroundTruth) -> dict[str, Any]:
    return {
        "category": category,
        "frequency": truth.frequency(category),
        "boxes": truth.boxes.get(image, {}).get(category, ()),
    }
