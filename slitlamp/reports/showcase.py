"""The scenes that a run keeps to be looked at: image, caption, T-VHD of every word, attention over the image.

In the run folder:

- `tables/showcase_items.parquet`, one row per scene: item, image (path inside the run folder), condition, prompt, caption,
  truth (list of the categories in the image), k (heads per layer that T-VHD sums over);
- `tables/showcase_words.parquet`, one row per word in order: item, index, word, start, end (characters of the caption),
  t_vhd, label ("object", "hallucinated" or "other");
- `tables/showcase_attention.parquet`, one row per word x head x patch: item, index (of the word), layer, head, chosen
  (whether reinforcement picks the head in this scene), row, column, attention (weight of the patch).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from slitlamp.reports.data import RunData

_WORDS = ("item", "index", "word", "t_vhd", "label")
_ATTENTION = ("item", "index", "layer", "head", "chosen", "row", "column", "attention")


@dataclass
class Scene:
    """One scene with what was measured on it."""

    item: str
    image: Image.Image | None
    condition: str
    prompt: str
    caption: str
    truth: list[str]
    k: int | None
    words: pd.DataFrame
    attention: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(_ATTENTION)))

    @property
    def mentions(self) -> pd.DataFrame:
        """The words that name objects and have attention, in order of the caption."""
        with_attention = set(self.attention["index"])
        named = self.words["label"].isin(["object", "hallucinated"]) & self.words["index"].isin(with_attention)
        return self.words[named].sort_values("index")

    def grid(self, index: int, chosen: bool = True) -> NDArray[np.float64] | None:
        """Attention over the patches, mean over the (not) chosen heads, `[row, column]`; None where it was not stored."""
        rows = self.attention[(self.attention["index"] == index) & (self.attention["chosen"].astype(bool) == chosen)]
        if rows.empty:
            return None
        shape = (int(self.attention["row"].max()) + 1, int(self.attention["column"].max()) + 1)
        total = np.zeros(shape)
        np.add.at(
            total,
            (rows["row"].to_numpy(dtype=int), rows["column"].to_numpy(dtype=int)),
            rows["attention"].to_numpy(dtype=float),
        )
        return np.asarray(total / max(len(rows[["layer", "head"]].drop_duplicates()), 1), dtype=np.float64)

    def heads(self, chosen: bool = True) -> int:
        """How many heads were (not) chosen in this scene, as far as their attention was stored."""
        rows = self.attention[self.attention["chosen"].astype(bool) == chosen]
        return len(rows[["layer", "head"]].drop_duplicates())


def read_scenes(data: RunData) -> list[Scene]:
    """The scenes of a run, in order; empty where it has none."""
    items = data.table("showcase_items", "item", "caption")
    words = data.table("showcase_words", *_WORDS)
    attention = data.table("showcase_attention", *_ATTENTION)
    if items is None or words is None:
        return []
    scenes = []
    for row in items.to_dict("records"):
        item = str(row["item"])
        path = data.image(str(row.get("image") or "")) if row.get("image") else None
        own_words = words[words["item"].astype(str) == item].sort_values("index").reset_index(drop=True)
        if own_words.empty:
            continue
        scene = Scene(
            item=item,
            image=None if path is None else Image.open(path).convert("RGB"),
            condition=str(row.get("condition") or ""),
            prompt=str(row.get("prompt") or ""),
            caption=str(row["caption"]),
            truth=_texts(row.get("truth")),
            k=None if pd.isna(row.get("k", np.nan)) else int(row["k"]),
            words=own_words,
        )
        if attention is not None:
            scene.attention = attention[attention["item"].astype(str) == item].reset_index(drop=True)
        scenes.append(scene)
    return scenes


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(one) for one in value] if isinstance(value, Iterable) else []
