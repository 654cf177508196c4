"""A few captioned scenes, word by word: T-VHD, and where the reinforced heads look while each object is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from slitlamp.experiments import storage
from slitlamp.experiments.datasets import Dataset, Item
from slitlamp.experiments.folder import SHOWCASE
from slitlamp.experiments.labels import token_labels

if TYPE_CHECKING:
    from slitlamp.experiments.plan import Plan
    from slitlamp.models import Batch
    from slitlamp.vlm import VLM

N_SCENES = 3
MOST_ROWS = 500_000
"""Above this many rows, the attention of a scene is stored as the mean over the chosen and over the other heads."""


def make_showcase(
    plan: Plan,
    vlm: VLM,
    predictions: Mapping[tuple[str, str], pd.DataFrame],
    tables: Mapping[str, pd.DataFrame],
) -> dict[str, pd.DataFrame]:
    """Write the scenes to showcase/ and return the tables showcase_items, showcase_words and showcase_attention.

    The captions are those of the reference condition. The heads are those that the first intervention with an attribute
    `chosen_` (layer -> bool [row, head], as HeadReinforcement has) picks for the scene; without one there is no
    attention.
    """
    data = next(one for one in plan.datasets if one.task == "captions")
    reference = plan.conditions[0].name
    rows = predictions[reference, data.name].set_index("item", drop=False)
    parts: dict[str, list[pd.DataFrame]] = {"showcase_items": [], "showcase_words": [], "showcase_attention": []}
    for item in _choose(plan, data, tables["chair_rows"]):
        row = rows.loc[item.id]
        batch = vlm.encode(images=[item.image], prompts=[item.prompt], ids=[item.id])
        batch = batch.with_continuation([[int(token) for token in row["tokens"]]])
        words = _words(vlm, item, data, [int(token) for token in row["tokens"]])
        t_vhd, k = _t_vhd(plan, tables, item, reference, data.name, vlm.anatomy.n_heads)
        words["t_vhd"] = words["token"].map(t_vhd).astype(float)
        image = f"{SHOWCASE}/{item.id}.png"
        _write_image(plan, batch, image)
        known = data.truth.objects[data.truth.resolve(item.image_id)] if data.truth else frozenset()
        facts = {"item": item.id, "image": image, "condition": reference, "prompt": item.prompt, "caption": row["text"]}
        parts["showcase_items"].append(pd.DataFrame([{**facts, "truth": sorted(known), "k": k}]))
        parts["showcase_words"].append(words.drop(columns="token").assign(item=item.id))
        attention = _attention(plan, vlm, batch, words)
        if attention is not None:
            parts["showcase_attention"].append(attention.assign(item=item.id))
    return {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items() if frames}


def _choose(plan: Plan, data: Dataset, rows: pd.DataFrame) -> list[Item]:
    """The items asked for, or the first whose reference caption names three objects, one of them hallucinated."""
    items = {item.id: item for item in data.items}
    wanted = plan.experiment.showcase
    if not isinstance(wanted, bool):
        return [items[str(one)] for one in wanted if str(one) in items]
    own = rows[(rows["condition"] == plan.conditions[0].name) & (rows["dataset"] == data.name)]
    rank = np.where(own["n_mentions"] >= 3, 0, 1) + np.where(own["n_hallucinated"] >= 1, 0, 2)
    order = np.argsort(rank, kind="stable")[:N_SCENES]
    by_image = {str(item.image_id): item for item in data.items}
    return [by_image[str(image)] for image in own["image_id"].iloc[order]]


def _words(vlm: VLM, item: Item, data: Dataset, tokens: list[int]) -> pd.DataFrame:
    """The words of the caption: tokens, with those that continue a word joined to it. `token` is the word's first."""
    from slitlamp.decoding.generation import token_spans

    text, spans = token_spans(vlm.tokenizer, tokens)
    assert data.truth is not None
    assert data.synonyms is not None
    rows: list[dict[str, Any]] = []
    for one in token_labels(text, spans, item.image_id, data.truth, data.synonyms).to_dict("records"):
        last = rows[-1] if rows else None
        joins = last is not None and one["start"] == last["end"] and text[one["start"] - 1 : one["start"] + 1].isalnum()
        if last is not None and joins:
            last["end"] = one["end"]
            last["word"] = text[last["start"] : last["end"]]
            last["label"] = one["label"] if last["label"] == "other" else last["label"]
        else:
            rows.append({key: one[key] for key in ("token", "word", "label", "start", "end")})
    frame = pd.DataFrame(rows, columns=["token", "word", "label", "start", "end"])
    frame.insert(0, "index", np.arange(len(frame)))
    return frame


def _t_vhd(
    plan: Plan, tables: Mapping[str, pd.DataFrame], item: Item, condition: str, dataset: str, n_heads: int
) -> tuple[dict[int, float], int | None]:
    """T-VHD by token, from the first probe that measures it, with k nearest to half the heads; empty if none does."""
    for key in plan.probes:
        frame = tables.get(f"{key}_tokens")
        ks = [] if frame is None else [int(str(c).removeprefix("t_vhd_")) for c in frame if str(c).startswith("t_vhd_")]
        if frame is None or not ks:
            continue
        k = min(ks, key=lambda one: abs(one - n_heads / 2))
        own = frame[(frame["condition"] == condition) & (frame["dataset"] == dataset) & (frame["item"] == item.id)]
        return dict(zip(own["token"].astype(int), own[f"t_vhd_{k}"].astype(float), strict=True)), k
    return {}, None


def _write_image(plan: Plan, batch: Batch, name: str) -> None:
    import io

    stream = io.BytesIO()
    batch.seen(0).save(stream, format="PNG")
    storage.write_bytes(plan.folder.path / name, stream.getvalue())


def _chosen_heads(plan: Plan, vlm: VLM, batch: Batch) -> dict[int, np.ndarray]:
    """Layer -> bool [head]: what the first condition that chooses heads picks for this scene; empty if none does."""
    for condition in plan.conditions:
        choosing = [one for one in condition.interventions if hasattr(one, "chosen_")]
        if choosing:
            with vlm.apply(*condition.interventions):
                vlm.forward(batch.prompt_only(), logits_to_keep=1)
            return {int(layer): mask[0].cpu().numpy() for layer, mask in choosing[0].chosen_.items()}
    return {}


def _attention(plan: Plan, vlm: VLM, batch: Batch, words: pd.DataFrame) -> pd.DataFrame | None:
    """Attention over the patches at the position that predicts each object's word: a row per word, head and patch."""
    from slitlamp.models import BASE_VIEW
    from slitlamp.tracing import sites

    chosen = _chosen_heads(plan, vlm, batch)
    named = words[words["label"] != "other"]
    if not chosen or named.empty:
        return None
    with vlm.trace(sites.attention(queries="before_generated", keys="image", layers=sorted(chosen))) as trace:
        vlm.forward(batch, logits_to_keep=1)
    patches = batch.patches[0]
    kept = (patches.on_image & (patches.image == 0) & (patches.view == BASE_VIEW)).cpu().numpy()
    row, column = patches.row.cpu().numpy()[kept], patches.column.cpu().numpy()[kept]
    maps = {layer: trace["attention"][layer][0].float().cpu().numpy()[:, :, kept] for layer in sorted(chosen)}
    if len(named) * kept.sum() * sum(len(mask) for mask in chosen.values()) > MOST_ROWS:
        return _mean_attention(named, maps, chosen, row, column)
    frames = [
        pd.DataFrame(
            {
                "index": index,
                "layer": layer,
                "head": head,
                "chosen": bool(chosen[layer][head]),
                "row": row,
                "column": column,
                "attention": maps[layer][head, token],
            }
        )
        for index, token in zip(named["index"], named["token"], strict=True)
        for layer in maps
        for head in range(len(chosen[layer]))
    ]
    return pd.concat(frames, ignore_index=True)


def _mean_attention(
    named: pd.DataFrame,
    maps: Mapping[int, np.ndarray],
    chosen: Mapping[int, np.ndarray],
    row: np.ndarray,
    column: np.ndarray,
) -> pd.DataFrame:
    """The same as means over the chosen and over the other heads, with -1 for layer and head."""
    frames = []
    for index, token in zip(named["index"], named["token"], strict=True):
        for wanted in (True, False):
            parts = [maps[layer][chosen[layer] == wanted, token] for layer in maps]
            mean = np.concatenate(parts).mean(axis=0)
            facts = {"index": index, "layer": -1, "head": -1, "chosen": wanted}
            frames.append(pd.DataFrame({**facts, "row": row, "column": column, "attention": mean}))
    return pd.concat(frames, ignore_index=True)
