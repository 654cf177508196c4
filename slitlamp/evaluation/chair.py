"""CHAIR: caption hallucination (Rohrbach et al. 2018, "Object Hallucination in Image Captioning").

A mention is hallucinated if its category is not in the image. CHAIR_i is the share of hallucinated mentions, CHAIR_s
the share of captions with at least one. Both fall when captions get shorter or name less: read them with mean_words
and recall, or compare conditions at matched recall (`matched_recall`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from slitlamp.errors import InputError
from slitlamp.evaluation.ground_truth import GroundTruth, ImageId, read_captions
from slitlamp.evaluation.matched_recall import matched_recall, recall_curve
from slitlamp.evaluation.statistics import (
    INTERACTION,
    FloatArray,
    Interval,
    cluster_bootstrap,
    contrast_bootstrap,
    paired_bootstrap,
    ratio,
)
from slitlamp.evaluation.synonyms import Mention, Synonyms, n_words

__all__ = [
    "METRICS",
    "GroundTruth",
    "ImageId",
    "Mention",
    "Synonyms",
    "chair_differences",
    "chair_interactions",
    "chair_mentions",
    "chair_rows",
    "chair_scores",
    "matched_recall",
    "n_words",
    "read_captions",
    "recall_curve",
]

METRICS = ("chair_i", "chair_s", "recall", "precision", "f1", "mean_words", "mean_mentions")
_COUNTS = (
    "n_mentions",
    "n_hallucinated",
    "any_hallucinated",
    "n_true_objects",
    "n_true_mentioned",
    "n_categories",
    "n_words",
)
_MENTION_TYPES = {
    "index": np.int64,
    "category": object,
    "text": object,
    "hallucinated": bool,
    "start": np.int64,
    "end": np.int64,
    "word": np.int64,
    "first": bool,
}


def chair_mentions(captions: pd.DataFrame, truth: GroundTruth, synonyms: Synonyms) -> pd.DataFrame:
    """One row per mention in captions with columns image_id, caption.

    Columns image_id, index (1, 2, ... in the caption), category, text, hallucinated, start, end (characters), word
    (from 0), first (the caption's first mention of that category). A caption without a mention has no row.
    """
    images: list[ImageId] = []
    rows: list[dict[str, Any]] = []
    for image, caption in _captions(captions):
        present = truth.objects[truth.resolve(image)]
        seen: set[str] = set()
        for index, mention in enumerate(synonyms.mentions(caption), start=1):
            images.append(image)
            rows.append(
                {
                    "index": index,
                    "category": mention.category,
                    "text": mention.text,
                    "hallucinated": mention.category not in present,
                    "start": mention.start,
                    "end": mention.end,
                    "word": mention.word,
                    "first": mention.category not in seen,
                }
            )
            seen.add(mention.category)
    table = pd.DataFrame(rows, columns=list(_MENTION_TYPES)).astype(_MENTION_TYPES)
    table.insert(0, "image_id", pd.Series(images, dtype=captions["image_id"].dtype))
    return table


def chair_rows(captions: pd.DataFrame, truth: GroundTruth, synonyms: Synonyms) -> pd.DataFrame:
    """One row per caption, from columns image_id, caption: what it mentions and what of that is in the image.

    Columns image_id, n_words, n_mentions, n_hallucinated, hallucinated_mentions (list of categories, repeats kept),
    n_categories (distinct ones mentioned), n_true_objects (in the image), n_true_mentioned (of these) and
    any_hallucinated.
    """
    rows = []
    for image, caption in _captions(captions):
        present = truth.objects[truth.resolve(image)]
        mentioned = [mention.category for mention in synonyms.mentions(caption)]
        hallucinated = [category for category in mentioned if category not in present]
        rows.append(
            {
                "image_id": image,
                "n_words": n_words(caption),
                "n_mentions": len(mentioned),
                "n_hallucinated": len(hallucinated),
                "hallucinated_mentions": hallucinated,
                "n_categories": len(set(mentioned)),
                "n_true_objects": len(present),
                "n_true_mentioned": len(present & set(mentioned)),
                "any_hallucinated": bool(hallucinated),
            }
        )
    return pd.DataFrame(rows)


def chair_scores(rows: pd.DataFrame, **bootstrap: Any) -> pd.DataFrame:
    """Scores of `chair_rows` with intervals over images: columns metric, value, low, high, n_images.

    chair_i = hallucinated mentions / mentions; chair_s = captions with one / captions; recall = distinct true objects
    mentioned / true objects; precision = distinct true objects mentioned / distinct objects mentioned; f1 their
    harmonic mean; all over the corpus (micro). An empty denominator gives NaN. `bootstrap` goes to `cluster_bootstrap`.
    """
    return _table(cluster_bootstrap(_image_counts(rows), _chair_statistic, **bootstrap), len(rows))


def chair_differences(rows_a: pd.DataFrame, rows_b: pd.DataFrame, **bootstrap: Any) -> pd.DataFrame:
    """Scores of b minus those of a on the same images, resampled together: columns of `chair_scores` and p."""
    counts_a, counts_b = _same_images(rows_a, rows_b)
    return _table(paired_bootstrap(counts_a, counts_b, _chair_statistic, **bootstrap), len(rows_a))


def chair_interactions(
    rows: pd.DataFrame, rows_a: pd.DataFrame, rows_b: pd.DataFrame, rows_both: pd.DataFrame, **bootstrap: Any
) -> pd.DataFrame:
    """How far scores of a and b together are from the sum of what each changes alone; columns as in `chair_differences`.

    The scores of `rows_both` - `rows_a` - `rows_b` + `rows` (the unmodified model), on the same images, resampled together.
    """
    counts = _same_images(rows, rows_a, rows_b, rows_both)
    return _table(contrast_bootstrap(counts, INTERACTION, _chair_statistic, **bootstrap), len(rows))


def _same_images(*rows: pd.DataFrame) -> list[pd.DataFrame]:
    """The counts of each, images in the order of the first."""
    first, *others = (_image_counts(one) for one in rows)
    for one in others:
        if alone := set(first.index) ^ set(one.index):
            raise InputError(
                f"paired comparison needs the same images: {len(alone)} on one side only, for example {next(iter(alone))!r}"
            )
    return [first, *(one.loc[first.index] for one in others)]


def _captions(captions: pd.DataFrame) -> Sequence[tuple[ImageId, str]]:
    if not {"image_id", "caption"} <= set(captions.columns):
        raise InputError(f"captions need the columns image_id, caption: found {', '.join(map(str, captions.columns))}")
    if not len(captions):
        raise InputError("CHAIR needs at least one caption: found none")
    repeated = captions["image_id"][captions["image_id"].duplicated()]
    if len(repeated):
        raise InputError(f"CHAIR takes one caption per image: image {repeated.tolist()[0]!r} has several")
    bad = captions.loc[[not isinstance(text, str) for text in captions["caption"]], "image_id"]
    if len(bad):
        raise InputError(f"the caption of image {bad.tolist()[0]!r} is not text")
    return list(zip(captions["image_id"].tolist(), captions["caption"].tolist(), strict=True))


def _image_counts(rows: pd.DataFrame) -> pd.DataFrame:
    missing = [name for name in ("image_id", *_COUNTS) if name not in rows.columns]
    if missing or not len(rows):
        raise InputError(f"need rows made by chair_rows: {'lacks ' + ', '.join(missing) if missing else 'found none'}")
    if rows["image_id"].duplicated().any():
        raise InputError(f"image {rows['image_id'][rows['image_id'].duplicated()].tolist()[0]!r} has several rows")
    return rows.set_index("image_id")[list(_COUNTS)].astype(np.float64).assign(captions=1.0)


def _chair_statistic(sums: FloatArray) -> FloatArray:
    mentions, hallucinated, affected, objects, mentioned, categories, words, captions = np.moveaxis(sums, -1, 0)
    return np.stack(
        [
            ratio(hallucinated, mentions),
            ratio(affected, captions),
            ratio(mentioned, objects),
            ratio(mentioned, categories),
            ratio(2 * mentioned, categories + objects),
            ratio(words, captions),
            ratio(mentions, captions),
        ],
        axis=-1,
    )


def _table(intervals: Interval | list[Interval], n_images: int) -> pd.DataFrame:
    assert isinstance(intervals, list)
    rows = [
        {"metric": metric, "value": item.value, "low": item.low, "high": item.high, "n_images": n_images}
        | ({} if item.p is None else {"p": item.p})
        for metric, item in zip(METRICS, intervals, strict=True)
    ]
    return pd.DataFrame(rows)
