"""From the predictions of a run to its tables: scores with intervals, paired differences, and rows per item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from slitlamp.errors import InputError
from slitlamp.evaluation.chair import (
    chair_differences,
    chair_interactions,
    chair_mentions,
    chair_rows,
    chair_scores,
    matched_recall,
    recall_curve,
)
from slitlamp.evaluation.pope import pope_differences, pope_interactions, pope_items, pope_scores
from slitlamp.experiments.datasets import Dataset
from slitlamp.experiments.pairs import METRICS, interaction_table
from slitlamp.experiments.perplexity import perplexity_differences, perplexity_scores

Tables = dict[str, pd.DataFrame]
Predictions = Mapping[tuple[str, str], pd.DataFrame]


def score(
    datasets: Sequence[Dataset],
    conditions: Sequence[str],
    comparisons: Sequence[tuple[str, str]],
    predictions: Predictions,
    pairs: Mapping[str, tuple[str, str]] | None = None,
    **bootstrap: Any,
) -> Tables:
    """All tables that follow from predictions.

    Args:
        datasets: the data sets, in order.
        conditions: names, the reference first.
        comparisons: pairs (condition, reference).
        predictions: by (condition, data set): a row per item, in the order of the items, with columns item and text, and, where
            captions are to have a perplexity, nll and n_tokens.
        pairs: the two conditions that each of some conditions puts together.
        bootstrap: `n_resamples`, `level` and `seed` of the intervals.

    Returns:
        conditions and differences (a row per condition, data set and metric), pope_strict (POPE by the strict parser),
        pope_items, chair_rows, chair_mentions, recall_curve, matched_recall (all conditions but `pairs` at one recall),
        matched_differences (every pair of `comparisons` at the highest recall that both reach), interactions (of `pairs`, see
        `slitlamp.experiments.pairs`); a table that no data set asks for is absent.
    """
    pairs = pairs or {}
    parts: dict[str, list[pd.DataFrame]] = {}

    def add(name: str, frame: pd.DataFrame, **first: Any) -> None:
        frame = frame.drop(columns=[key for key in first if key in frame.columns])
        for position, (key, value) in enumerate(first.items()):
            frame.insert(position, key, value)
        parts.setdefault(name, []).append(frame)

    pope = {one.name: _pope_items(one, conditions, predictions) for one in datasets if one.task == "pope"}
    for name, items in pope.items():
        for condition in conditions:
            add("pope_items", items[condition], condition=condition, dataset=name)
    for name, items in {**pope, **_pooled(pope, conditions)}.items():
        for condition in conditions:
            here = {"condition": condition, "dataset": name, "task": "pope"}
            add("conditions", pope_scores(items[condition], "official", **bootstrap), **here)
            add("pope_strict", pope_scores(items[condition], "strict", **bootstrap), **here)
        for condition, reference in comparisons:
            frame = pope_differences(items[reference], items[condition], "official", **bootstrap)
            add("differences", frame, condition=condition, reference=reference, dataset=name, task="pope")
        for both, (first, second) in pairs.items():
            frame = pope_interactions(items[conditions[0]], items[first], items[second], items[both], **bootstrap)
            add("interactions", frame, **_pair(pairs, both), dataset=name, task="pope")

    for one in datasets:
        if one.task == "captions":
            _captions(one, conditions, comparisons, pairs, predictions, bootstrap, add)
    tables = {name: _join(frames) for name, frames in parts.items()}
    if pairs:
        kept = tables["interactions"]
        kept = kept[[metric in METRICS[task] for metric, task in zip(kept["metric"], kept["task"], strict=True)]]
        tables["interactions"] = interaction_table(kept.reset_index(drop=True), tables["differences"], conditions[0])
    return tables


def _pair(pairs: Mapping[str, tuple[str, str]], name: str) -> dict[str, str]:
    first, second = pairs[name]
    return {"condition": name, "first": first, "second": second}


def _pope_items(dataset: Dataset, conditions: Sequence[str], predictions: Predictions) -> dict[str, pd.DataFrame]:
    known = pd.DataFrame(
        {
            "question_id": [item.id for item in dataset.items],
            "image": [str(item.image_id) for item in dataset.items],
            "object": [item.object for item in dataset.items],
            "label": [item.label for item in dataset.items],
        }
    )
    return {name: pope_items(known.assign(text=_texts(dataset, name, predictions))) for name in conditions}


def _texts(dataset: Dataset, condition: str, predictions: Predictions) -> list[str]:
    found = predictions[condition, dataset.name]
    if found["item"].tolist() != [item.id for item in dataset.items]:
        raise InputError(f"the predictions of {condition!r} on {dataset.name!r} are not those of its items")
    return [str(text) for text in found["text"]]


def _pooled(
    pope: Mapping[str, Mapping[str, pd.DataFrame]], conditions: Sequence[str]
) -> dict[str, dict[str, pd.DataFrame]]:
    """The splits of one POPE set together, as `<set>/pope_all`; resampled by image, since they share images."""
    groups: dict[str, list[str]] = {}
    for name in pope:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    pooled = {}
    for folder, names in groups.items():
        if len(names) > 1:
            full = f"{folder}/pope_all".lstrip("/")
            pooled[full] = {
                condition: pd.concat([pope[name][condition].assign(split=name) for name in names], ignore_index=True)
                for condition in conditions
            }
    return pooled


def _captions(
    dataset: Dataset,
    conditions: Sequence[str],
    comparisons: Sequence[tuple[str, str]],
    pairs: Mapping[str, tuple[str, str]],
    predictions: Predictions,
    bootstrap: Mapping[str, Any],
    add: Any,
) -> None:
    if dataset.truth is None or dataset.synonyms is None:
        raise InputError(f"the captions of {dataset.name!r} cannot be scored without ground truth and synonyms")
    images = [item.image_id for item in dataset.items]
    truth = dataset.truth.subset(images)
    rows: dict[str, pd.DataFrame] = {}
    mentions: dict[str, pd.DataFrame] = {}
    for condition in conditions:
        captions = pd.DataFrame({"image_id": images, "caption": _texts(dataset, condition, predictions)})
        rows[condition] = chair_rows(captions, truth, dataset.synonyms)
        mentions[condition] = chair_mentions(captions, truth, dataset.synonyms)
        here = {"condition": condition, "dataset": dataset.name}
        add("chair_rows", rows[condition], **here)
        add("chair_mentions", mentions[condition], **here)
        add("conditions", chair_scores(rows[condition], **bootstrap), **here, task="captions")
        if _has_perplexity(predictions[condition, dataset.name]):
            found = perplexity_scores(predictions[condition, dataset.name], **bootstrap)
            add("conditions", found, **here, task="captions")
        add("recall_curve", recall_curve(mentions[condition], truth), **here)
    for condition, reference in comparisons:
        frame = chair_differences(rows[reference], rows[condition], **bootstrap)
        here = {"condition": condition, "reference": reference, "dataset": dataset.name, "task": "captions"}
        add("differences", frame, **here)
        texts = [predictions[name, dataset.name] for name in (reference, condition)]
        if all(map(_has_perplexity, texts)):
            add("differences", perplexity_differences(*texts, **bootstrap), **here)
        pair = {reference: mentions[reference], condition: mentions[condition]}
        add(
            "matched_differences",
            _difference(matched_recall(pair, truth, **bootstrap)),
            reference=reference,
            dataset=dataset.name,
        )
    for both, (first, second) in pairs.items():
        frame = chair_interactions(rows[conditions[0]], rows[first], rows[second], rows[both], **bootstrap)
        add("interactions", frame, **_pair(pairs, both), dataset=dataset.name, task="captions")
    alone = {name: found for name, found in mentions.items() if name not in pairs}
    add("matched_recall", matched_recall(alone, truth, **bootstrap), dataset=dataset.name)


def _has_perplexity(texts: pd.DataFrame) -> bool:
    return "nll" in texts and bool(texts["nll"].notna().all())


def _difference(matched: pd.DataFrame) -> pd.DataFrame:
    """The second row of a matched-recall table of two conditions, as a difference to the first."""
    names = {"difference": "value", "difference_low": "low", "difference_high": "high"}
    kept = matched.iloc[1:].drop(columns=["value", "low", "high"]).rename(columns=names)
    return kept[["condition", "recall", "value", "low", "high", "p", "n_images"]]


def _join(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    joined = pd.concat(frames, ignore_index=True)
    for name in ("n_questions",):
        if name in joined:
            joined[name] = joined[name].astype("Int64")
    if "image_id" in joined and joined["image_id"].map(type).nunique() > 1:
        joined["image_id"] = joined["image_id"].astype(str)
    return joined
