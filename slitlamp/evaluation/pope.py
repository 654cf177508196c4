"""POPE: polling-based object probing.

Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models".

Construction of the three splits, both parsers, and the scores with intervals over images. Files are in `pope_files`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from slitlamp.errors import InputError, unknown
from slitlamp.evaluation.pope_files import (
    Label,
    PopeQuestion,
    read_pope,
    read_pope_answers,
    read_tsv_images,
    write_pope,
)
from slitlamp.evaluation.statistics import (
    INTERACTION,
    FloatArray,
    Interval,
    cluster_bootstrap,
    contrast_bootstrap,
    paired_bootstrap,
    ratio,
)

__all__ = [
    "METRICS",
    "RULES",
    "SPLITS",
    "TEMPLATE",
    "Label",
    "PopeQuestion",
    "Rule",
    "Split",
    "build_pope",
    "indefinite_article",
    "parse_answer",
    "pope_differences",
    "pope_interactions",
    "pope_items",
    "pope_scores",
    "read_pope",
    "read_pope_answers",
    "read_tsv_images",
    "write_pope",
]

Rule = Literal["official", "strict"]
Split = Literal["random", "popular", "adversarial"]

SPLITS: tuple[Split, ...] = ("random", "popular", "adversarial")
RULES: tuple[Rule, ...] = ("official", "strict")
METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio", "unparseable")
TEMPLATE = "Is there {article} {object} in the image?"


def indefinite_article(name: str) -> str:
    """The article of POPE's template: "an" before a vowel letter, else "a"."""
    return "an" if name[:1].lower() in tuple("aeiou") else "a"


def build_pope(
    objects: Mapping[str, Sequence[str]],
    split: Split,
    *,
    seed: int,
    n_images: int | None = 500,
    n_positive: int = 3,
    template: str | Callable[[str], str] = TEMPLATE,
) -> list[PopeQuestion]:
    """Build one split by POPE's construction from the ground-truth objects of each image.

    Images with at least `n_positive` distinct objects qualify; `n_images` of them are drawn (None takes all), the same
    ones for every split of a seed. The first `n_positive` listed objects are the positives; each is followed by one
    negative that is neither in the image nor used for it yet: drawn uniformly ("random"), the most frequent one in the
    drawn images ("popular"), or the one that occurs most often together with that positive ("adversarial", falling
    back to a random one when no object that occurs with it is left). Ties go to the object that was listed first.
    `template` is a format string with {article} and {object}, or a function from an object's name to the question.
    """
    if split not in SPLITS:
        raise unknown("POPE split", split, SPLITS)
    if n_positive < 1:
        raise InputError(f"n_positive must be at least 1: found {n_positive}")
    distinct = {image: list(dict.fromkeys(names)) for image, names in objects.items()}
    qualifying = [image for image, names in distinct.items() if len(names) >= n_positive]
    wanted = len(qualifying) if n_images is None else n_images
    if not 1 <= wanted <= len(qualifying):
        raise InputError(
            f"POPE needs {wanted or 'some'} images with at least {n_positive} objects: found {len(qualifying)} among "
            f"{len(distinct)}; lower n_images or give more images"
        )
    drawn = np.sort(np.random.default_rng([seed, 0]).permutation(len(qualifying))[:wanted])
    images = [qualifying[i] for i in drawn]
    negatives = _Negatives([distinct[image] for image in images], split, np.random.default_rng([seed, 1]))

    questions: list[PopeQuestion] = []
    for image in images:
        used = set(distinct[image])
        for positive in distinct[image][:n_positive]:
            negative = negatives.choose(positive, used, image)
            used.add(negative)
            for name, label in ((positive, "yes"), (negative, "no")):
                text = _question_text(template, name)
                questions.append(PopeQuestion(len(questions) + 1, image, text, label, name))  # type: ignore[arg-type]
    return questions


class _Negatives:
    """Chooses absent objects; frequencies and co-occurrences come from the drawn images only."""

    def __init__(self, images: list[list[str]], split: Split, rng: np.random.Generator) -> None:
        self.split, self.rng = split, rng
        frequency = Counter(name for names in images for name in names)
        self.vocabulary = list(frequency)
        self.popular = [name for name, _ in frequency.most_common()]
        self.together: dict[str, Counter[str]] = {name: Counter() for name in frequency}
        for names in images:
            for name in names:
                self.together[name].update(other for other in names if other != name)

    def choose(self, positive: str, used: set[str], image: str) -> str:
        """An object outside `used`, which holds the image's own objects and its earlier negatives."""
        if self.split == "popular":
            ranked = self.popular
        else:
            ranked = [name for name, _ in self.together[positive].most_common()] if self.split == "adversarial" else []
        for name in ranked:
            if name not in used:
                return name
        left = [name for name in self.vocabulary if name not in used]
        if not left:
            raise InputError(f"no absent object is left for a negative question about {image!r}: too few object names")
        return left[int(self.rng.integers(len(left)))]


def _question_text(template: str | Callable[[str], str], name: str) -> str:
    if callable(template):
        return template(name)
    try:
        return template.format(article=indefinite_article(name), object=name)
    except (KeyError, IndexError) as error:
        raise InputError(f"POPE template {template!r} may use {{article}} and {{object}} only") from error


def parse_answer(text: str, rule: Rule = "official") -> Label | None:
    """Read an answer as "yes" or "no".

    "official": what the authors' script does: the text before the first full stop, without commas, split at spaces; one
    of the words No, no, not makes it "no", and everything else, also an empty or unrelated answer, "yes".
    "strict": "yes" or "no" as a whole word, in any case, anywhere; both or neither give None (unparseable).
    """
    if not isinstance(text, str):
        raise InputError(f"an answer must be text: found {text!r}")
    if rule == "official":
        words = text.split(".", 1)[0].replace(",", "").split(" ")
        return "no" if {"No", "no", "not"} & set(words) else "yes"
    if rule == "strict":
        found = set(re.findall(r"\b(?:yes|no)\b", text.lower()))
        return None if len(found) != 1 else ("yes" if "yes" in found else "no")
    raise unknown("answer rule", rule, RULES)


def pope_items(predictions: pd.DataFrame) -> pd.DataFrame:
    """One row per question from columns image, question_id, label, text (the model's answer); other columns are kept.

    Adds answer_official, answer_strict ("yes", "no", None) and correct_official, correct_strict; an unparseable answer
    is not correct.
    """
    _require(predictions, ("image", "question_id", "label", "text"), "predictions")
    wrong = predictions.loc[~predictions["label"].isin(["yes", "no"])]
    if len(wrong):
        raise InputError(
            f"POPE labels are 'yes' or 'no': found {wrong['label'].iloc[0]!r} for question "
            f"{wrong['question_id'].iloc[0]}; files without labels cannot be scored"
        )
    items = predictions.reset_index(drop=True).copy()
    for rule in RULES:
        answers = pd.Series([parse_answer(text, rule) for text in items["text"]], index=items.index, dtype=object)
        items[f"answer_{rule}"] = answers
        items[f"correct_{rule}"] = (answers == items["label"]).astype(bool)
    return items


def pope_scores(items: pd.DataFrame, rule: Rule = "official", **bootstrap: Any) -> pd.DataFrame:
    """Scores of `pope_items` with intervals over images: columns metric, value, low, high, n_questions, n_images.

    Positive class "yes". accuracy is over all questions (unparseable is wrong); recall over all questions labelled
    yes; precision over the answers yes; yes_ratio is the share of yes among the answers that are yes or no;
    unparseable is the share of answers that the strict rule cannot read, under either rule. A metric with an empty
    denominator is NaN. `bootstrap` goes to `statistics.cluster_bootstrap`.
    """
    images, counts = _image_counts(items, rule)
    intervals = cluster_bootstrap(counts, _pope_statistic, **bootstrap)
    return _table(intervals, len(items), len(images))


def pope_differences(
    items_a: pd.DataFrame, items_b: pd.DataFrame, rule: Rule = "official", **bootstrap: Any
) -> pd.DataFrame:
    """Scores of b minus those of a on the same questions, resampled by image; columns of `pope_scores` and p.

    Questions are matched by image and question_id, and by split where both have that column; a question that only one
    side has, or has twice, or labels differently, is an error.
    """
    _check_same_questions(items_a, items_b)
    images, counts_a = _image_counts(items_a, rule)
    _, counts_b = _image_counts(items_b, rule)
    table = _table(paired_bootstrap(counts_a, counts_b, _pope_statistic, **bootstrap), len(items_a), len(images))
    return table


def pope_interactions(
    items: pd.DataFrame,
    items_a: pd.DataFrame,
    items_b: pd.DataFrame,
    items_both: pd.DataFrame,
    rule: Rule = "official",
    **bootstrap: Any,
) -> pd.DataFrame:
    """How far scores of a and b together are from the sum of what each changes alone; columns as in `pope_differences`.

    The scores of `items_both` - `items_a` - `items_b` + `items` (the unmodified model), questions matched as there.
    """
    four = (items, items_a, items_b, items_both)
    for other in four[1:]:
        _check_same_questions(items, other)
    images, _ = _image_counts(items, rule)
    counts = [_image_counts(one, rule)[1] for one in four]
    return _table(contrast_bootstrap(counts, INTERACTION, _pope_statistic, **bootstrap), len(items), len(images))


def _check_same_questions(items_a: pd.DataFrame, items_b: pd.DataFrame) -> None:
    keys = ["image", "question_id"] + ["split"] * ("split" in items_a.columns and "split" in items_b.columns)
    for name, items in (("a", items_a), ("b", items_b)):
        _require(items, (*keys, "label"), f"items {name}")
        if items.duplicated(keys).any():
            raise InputError(f"items {name} hold a question twice: {_first(items[items.duplicated(keys)], keys)}")
    merged = items_a[[*keys, "label"]].merge(
        items_b[[*keys, "label"]], on=keys, how="outer", suffixes=("_a", "_b"), indicator=True
    )
    alone = merged[merged["_merge"] != "both"]
    if len(alone):
        raise InputError(
            f"paired comparison needs the same questions: {len(alone)} on one side only, {_first(alone, keys)}"
        )
    if (merged["label_a"] != merged["label_b"]).any():
        raise InputError(f"labels differ: {_first(merged[merged['label_a'] != merged['label_b']], keys)}")


def _image_counts(items: pd.DataFrame, rule: Rule) -> tuple[list[str], FloatArray]:
    """Names of the images, sorted, and the counts `[image, 7]` that `_pope_statistic` takes apart."""
    if rule not in RULES:
        raise unknown("answer rule", rule, RULES)
    _require(items, ("image", "label", f"answer_{rule}", "answer_strict"), "items (made by pope_items)")
    if not len(items):
        raise InputError("POPE scores need at least one question: found none")
    answer, label = items[f"answer_{rule}"], items["label"]
    columns = pd.DataFrame(
        {
            "questions": 1.0,
            "correct": (answer == label).astype(float),
            "true_yes": ((answer == "yes") & (label == "yes")).astype(float),
            "said_yes": (answer == "yes").astype(float),
            "labelled_yes": (label == "yes").astype(float),
            "answered": answer.isin(["yes", "no"]).astype(float),
            "unparseable": (~items["answer_strict"].isin(["yes", "no"])).astype(float),
        },
        index=items.index,
    )
    summed = columns.groupby(items["image"], sort=True).sum()
    return [str(name) for name in summed.index], summed.to_numpy(np.float64)


def _pope_statistic(sums: FloatArray) -> FloatArray:
    questions, correct, true_yes, said_yes, labelled_yes, answered, unparseable = np.moveaxis(sums, -1, 0)
    return np.stack(
        [
            ratio(correct, questions),
            ratio(true_yes, said_yes),
            ratio(true_yes, labelled_yes),
            ratio(2 * true_yes, said_yes + labelled_yes),
            ratio(said_yes, answered),
            ratio(unparseable, questions),
        ],
        axis=-1,
    )


def _table(intervals: Interval | list[Interval], n_questions: int, n_images: int) -> pd.DataFrame:
    assert isinstance(intervals, list)
    rows = [
        {"metric": metric, "value": item.value, "low": item.low, "high": item.high}
        | {"n_questions": n_questions, "n_images": n_images}
        | ({} if item.p is None else {"p": item.p})
        for metric, item in zip(METRICS, intervals, strict=True)
    ]
    return pd.DataFrame(rows)


def _require(table: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(f"{what} lack the column(s) {', '.join(missing)}: found {', '.join(map(str, table.columns))}")


def _first(table: pd.DataFrame, keys: Sequence[str]) -> str:
    return "for example " + ", ".join(f"{key} {table[key].tolist()[0]!r}" for key in keys)
