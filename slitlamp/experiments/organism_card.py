"""The card of the embedded model: what it can do and how it fails, measured on held-out scenes, with intervals.

The scenes are those of `emoji_scenes` (seed 2026), which neither training nor tuning has seen. Intervals are 95 % bootstrap
intervals over scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from slitlamp.evaluation import (
    chair_mentions,
    chair_rows,
    chair_scores,
    cluster_bootstrap,
    pope_items,
    pope_scores,
)
from slitlamp.evaluation.statistics import Interval, ratio
from slitlamp.experiments.datasets import Dataset, Item, load_dataset
from slitlamp.organism.categories import CATEGORY_INDEX, CONTEXTS
from slitlamp.organism.dataset import SEED
from slitlamp.organism.language import position_tokens, to_text, where_question
from slitlamp.organism.scenes import Scene, blank_image, context_weights, make_scene
from slitlamp.progress import progress_bar
from slitlamp.tracing.sites import attention
from slitlamp.vlm import VLM

SPLITS = ("random", "popular", "adversarial")
SIZES = (("small", 6, 8), ("middle", 12, 17), ("large", 18, 27))
PICTURES = ("own image", "blank image", "another scene's image")


@dataclass
class _Card:
    """Collects the rows of the card: what, on what, metric, value, interval, number of scenes."""

    rows: list[tuple[Any, ...]]

    def add(self, what: str, on: str, metric: str, value: float, low: float, high: float, n: int) -> None:
        self.rows.append((what, on, metric, value, low, high, n))

    def add_interval(self, what: str, on: str, metric: str, found: Interval) -> None:
        self.add(what, on, metric, found.value, found.low, found.high, found.n)

    def add_scores(self, what: str, on: str, scores: pd.DataFrame, metrics: Sequence[str]) -> None:
        for row in scores[scores["metric"].isin(metrics)].itertuples():
            self.add(what, on, str(row.metric), float(row.value), float(row.low), float(row.high), int(row.n_images))

    def add_share(self, what: str, on: str, metric: str, hit: Sequence[bool], scene: Sequence[Any]) -> None:
        """A share of items, its interval over scenes."""
        counts = pd.DataFrame({"hit": np.asarray(hit, dtype=float), "scene": list(scene)})
        sums = counts.groupby("scene")["hit"].agg(["sum", "count"]).to_numpy(dtype=float)
        found = cluster_bootstrap(sums, lambda total: ratio(total[..., 0], total[..., 1]))
        self.add_interval(what, on, metric, cast(Interval, found))


def measure_organism(
    vlm: VLM, *, n_images: int | None = None, batch_size: int = 64, progress: bool = True
) -> pd.DataFrame:
    """Measure the embedded model on held-out scenes.

    Args:
        vlm: the embedded model, or a checkpoint of its training.
        n_images: how many scenes; None for all 256.
        batch_size: prompts a batch.
        progress: whether to draw a progress bar.

    Returns:
        One row per number: what, on, metric, value, low, high, n_scenes.
    """
    splits = {split: _first(load_dataset(f"emoji_scenes/pope_{split}"), n_images) for split in SPLITS}
    captions = _first(load_dataset("emoji_scenes/captions"), n_images)
    images = {image for data in (captions, *splits.values()) for image in data.images}
    scenes = {image.name: make_scene(SEED, int(image.stem))[0] for image in sorted(images)}
    where = _where_items(captions, scenes)
    total = len(PICTURES) * sum(len(one) for one in splits.values()) + 2 * len(captions) + len(where)
    card = _Card([])
    with progress_bar(progress) as bar:
        task = bar.add_task(f"measuring {vlm.name}", total=total)
        run = _Runner(vlm, batch_size, lambda n: bar.advance(task, n))
        for split, data in splits.items():
            _pope(card, run, split, data, scenes)
        _captions(card, run, captions, scenes)
        _where(card, run, where)
    columns = ["what", "on", "metric", "value", "low", "high", "n_scenes"]
    return pd.DataFrame(card.rows, columns=columns)


def _first(data: Dataset, n_images: int | None) -> Dataset:
    return data if n_images is None else data.take(n_images)


@dataclass
class _Runner:
    """Greedy answers to items, with a picture chosen for each."""

    vlm: VLM
    batch_size: int
    advance: Callable[[int], None]
    known: dict[tuple[Path | None, str], str] = field(default_factory=dict)

    def answers(self, items: Sequence[Item], *, max_new_tokens: int, picture: str = PICTURES[0]) -> list[str]:
        """The answer to every item; one that was given before to the same picture and prompt is not generated again."""
        files = list(dict.fromkeys(item.image for item in items))
        after = dict(zip(files, [*files[1:], files[0]], strict=True))
        keys = [
            (
                item.image if picture == PICTURES[0] else None if picture == PICTURES[1] else after[item.image],
                item.prompt,
            )
            for item in items
        ]
        wanted = [key for key in dict.fromkeys(keys) if key not in self.known]
        blank = blank_image()
        for start in range(0, len(wanted), self.batch_size):
            chunk = wanted[start : start + self.batch_size]
            images = [blank if file is None else file for file, _ in chunk]
            batch = self.vlm.encode(images=images, prompts=[prompt for _, prompt in chunk])
            texts = self.vlm.generate(batch, max_new_tokens=max_new_tokens).texts
            self.known |= dict(zip(chunk, texts, strict=True))
        self.advance(len(items))
        return [self.known[key] for key in keys]


def _pope(card: _Card, run: _Runner, split: str, data: Dataset, scenes: dict[str, Scene]) -> None:
    for picture in PICTURES:
        texts = run.answers(data.items, max_new_tokens=data.max_new_tokens, picture=picture)
        predictions = pd.DataFrame(
            {
                "image": [str(item.image_id) for item in data.items],
                "question_id": [int(item.id) for item in data.items],
                "label": [item.label for item in data.items],
                "text": texts,
            }
        )
        items = pope_items(predictions)
        metrics = (
            ("accuracy", "f1", "yes_ratio", "unparseable") if picture == PICTURES[0] else ("accuracy", "yes_ratio")
        )
        card.add_scores(f"POPE {split}", picture, pope_scores(items), metrics)
        if picture == PICTURES[0] and split == SPLITS[0]:  # the positives are the same in the three splits
            _recall_by_size(card, data.items, texts, scenes)


def _recall_by_size(card: _Card, items: Sequence[Item], texts: Sequence[str], scenes: dict[str, Scene]) -> None:
    asked = [(item, text) for item, text in zip(items, texts, strict=True) if item.label == "yes"]
    size = {(name, one.category): one.size for name, scene in scenes.items() for one in scene.objects}
    for label, low, high in SIZES:
        chosen = [(i, t) for i, t in asked if low <= size[i.image.name, str(i.object)] <= high]
        if chosen:
            said_yes = [text.lower().startswith("yes") for _, text in chosen]
            on = f"{label} objects ({low}-{high} px)"
            card.add_share("POPE positives", on, "recall", said_yes, [item.image.name for item, _ in chosen])


def _captions(card: _Card, run: _Runner, data: Dataset, scenes: dict[str, Scene]) -> None:
    assert data.truth is not None
    assert data.synonyms is not None
    for picture in PICTURES[:2]:
        texts = run.answers(data.items, max_new_tokens=data.max_new_tokens, picture=picture)
        table = pd.DataFrame({"image_id": [item.image_id for item in data.items], "caption": texts})
        rows = chair_rows(table, data.truth, data.synonyms)
        own = picture == PICTURES[0]
        metrics = (
            ("chair_i", "chair_s", "recall", "mean_words", "mean_mentions") if own else ("chair_i", "mean_mentions")
        )
        card.add_scores("captions", picture, chair_scores(rows), metrics)
        if own:
            mentions = chair_mentions(table, data.truth, data.synonyms)
            for index in range(1, 7):
                at = mentions[mentions["index"] == index]
                if len(at) >= 10:
                    card.add_share("captions", f"mention {index}", "chair_i", at["hallucinated"], at["image_id"])
            _typical(card, mentions, {item.image_id: scenes[item.image.name] for item in data.items})
            _image_attention(card, run.vlm, data, mentions, texts)


def _typical(card: _Card, mentions: pd.DataFrame, scenes: dict[Any, Scene]) -> None:
    """How many of the hallucinated objects are typical of the scene's context, and what chance would give."""
    wrong = mentions[mentions["hallucinated"]]
    if wrong.empty:
        return
    names = [one.name for one in CONTEXTS]
    typical = context_weights() > 0
    context = [names.index(scenes[image].context) for image in wrong["image_id"]]
    hit = [bool(typical[c, CATEGORY_INDEX[str(name)]]) for c, name in zip(context, wrong["category"], strict=True)]
    card.add_share("hallucinated objects", "own image", "typical of the context", hit, wrong["image_id"])
    absent = [typical[c].sum() / typical.shape[1] for c in context]
    card.add("hallucinated objects", "chance", "typical of the context", float(np.mean(absent)), np.nan, np.nan, 0)


def _image_attention(card: _Card, vlm: VLM, data: Dataset, mentions: pd.DataFrame, texts: Sequence[str]) -> None:
    """Attention on the image, mean over layers and heads, at the states that predict object words."""
    site = attention(queries="before_generated", keys="image", reduce_keys="sum", reduce_heads="mean")
    batch_size, found = 64, []
    for start in range(0, len(data.items), batch_size):
        chunk = data.items[start : start + batch_size]
        batch = vlm.encode(images=[item.image for item in chunk], prompts=[item.prompt for item in chunk])
        with vlm.trace(site) as trace:
            generation = vlm.generate(batch, max_new_tokens=data.max_new_tokens)
        mass = trace["attention"].stack().mean(dim=0)  # [batch, token]
        for row, item in enumerate(chunk):
            assert generation.texts[row] == texts[start + row]
            for one in mentions[mentions["image_id"] == item.image_id].itertuples():
                token = next(t for t, (low, high) in enumerate(generation.spans[row]) if low <= one.start < high)
                found.append((item.image_id, bool(one.hallucinated), int(one.index), float(mass[row, token])))
    table = pd.DataFrame(found, columns=["scene", "hallucinated", "index", "mass"])
    groups = [("true objects", ~table["hallucinated"]), ("hallucinated objects", table["hallucinated"])]
    groups += [(f"mention {index}", table["index"] == index) for index in (1, 5)]
    for label, chosen in groups:
        if chosen.sum() >= 10:
            sums = table[chosen].groupby("scene")["mass"].agg(["sum", "count"]).to_numpy()
            mean = cluster_bootstrap(sums, lambda total: ratio(total[..., 0], total[..., 1]))
            card.add_interval("attention on the image", label, "share", cast(Interval, mean))


def _where(card: _Card, run: _Runner, items: Sequence[tuple[Item, str]]) -> None:
    """Positions on a 3 x 3 grid; chance is what always giving the most frequent answer would get."""
    texts = run.answers([item for item, _ in items], max_new_tokens=8)
    answers = [answer for _, answer in items]
    scenes = [item.image.name for item, _ in items]
    hit = [text.lower().rstrip(". ") == answer for text, answer in zip(texts, answers, strict=True)]
    card.add_share("where is the ...?", "own image", "accuracy", hit, scenes)
    commonest = max(set(answers), key=answers.count)
    card.add_share("where is the ...?", "chance", "accuracy", [answer == commonest for answer in answers], scenes)


def _where_items(data: Dataset, scenes: dict[str, Scene]) -> list[tuple[Item, str]]:
    """One question for the position of every object, with its answer."""
    found = []
    for item in data.items:
        for one in scenes[item.image.name].objects:
            prompt = to_text(where_question(one.category))
            question = Item(f"{item.id}.{one.category}", item.image, prompt, item.image_id, object=one.category)
            found.append((question, to_text(position_tokens(one)).lower()))
    return found


def card_table(measured: dict[str, pd.DataFrame]) -> str:
    """Measurements of several models as one Markdown table, a column for each.

    Args:
        measured: by the heading of the column, what `measure_organism` gave.
    """
    keys = ["what", "on", "metric"]
    first = next(iter(measured.values()))
    lines = ["| | on | | " + " | ".join(measured) + " |", "|---|---|---|" + "---|" * len(measured)]
    by_model = {name: table.set_index(keys) for name, table in measured.items()}
    for key in first[keys].itertuples(index=False, name=None):
        cells = [_cell(table.loc[key]) if key in table.index else "" for table in by_model.values()]
        lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return "\n".join(lines)


def _cell(row: pd.Series[Any]) -> str:
    value, low, high = (_number(float(row[name])) for name in ("value", "low", "high"))
    return value if np.isnan(float(row["low"])) else f"{value} [{low}, {high}]"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 2 else f"{value:.3f}".replace("0.", ".", 1)


def write_card_tables(folder: Path, measured: dict[str, pd.DataFrame]) -> Path:
    """Write `card.csv` (every number) and `card.md` (the table of the card) into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    joined = pd.concat([table.assign(model=name) for name, table in measured.items()])
    joined.to_csv(folder / "card.csv", index=False, float_format="%.6g")
    path = folder / "card.md"
    path.write_text(card_table(measured) + "\n", encoding="utf-8")
    return path
