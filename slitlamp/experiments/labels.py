"""Which generated tokens name an object, and whether that object is in the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from slitlamp.evaluation.chair import GroundTruth, ImageId, Synonyms


def token_labels(
    text: str, spans: Sequence[tuple[int, int]], image_id: ImageId, truth: GroundTruth, synonyms: Synonyms
) -> pd.DataFrame:
    """Label the tokens of one generated caption.

    Args:
        text: the caption.
        spans: per token, its range of characters in `text`; empty for special tokens.
        image_id: the image in `truth`.
        truth: the objects of the images.
        synonyms: the words for them.

    Returns:
        One row per token that stands for characters (an end token has none): token (0-based in the generation), word
        (its characters), label, category (None unless it names an object), start, end. The label is "object" or
        "hallucinated" at the FIRST token of a mention, so that every mention counts once however many tokens it has;
        all other tokens are "other".
    """
    present = truth.objects[truth.resolve(image_id)]
    rows: list[dict[str, Any]] = [
        {"token": i, "word": text[start:end], "label": "other", "category": None, "start": start, "end": end}
        for i, (start, end) in enumerate(spans)
        if end > start
    ]
    for mention in synonyms.mentions(text):
        first = next((row for row in rows if row["start"] < mention.end and row["end"] > mention.start), None)
        if first is not None:
            first["label"] = "object" if mention.category in present else "hallucinated"
            first["category"] = mention.category
    return pd.DataFrame(rows, columns=["token", "word", "label", "category", "start", "end"])
