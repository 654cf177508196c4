"""What is drawn in each figure, on what and how often: the captions under the figures of a run."""

from __future__ import annotations

import pandas as pd

from slitlamp.reports import findings, showcase, summaries
from slitlamp.reports.data import RunData
from slitlamp.reports.metrics import split_name
from slitlamp.reports.wording import count, join


def n_text(table: pd.DataFrame | None, **wanted: str) -> str:
    """As in "n = 300 images" (and questions) of the rows with these values; empty where the table does not say."""
    if table is None:
        return ""
    for column, value in wanted.items():
        if column in table.columns:
            table = table[table[column].astype(str) == value]
    parts = []
    for column, noun in (("n_questions", "question"), ("n_images", "image")):
        if column in table.columns and table[column].notna().any():
            low, high = int(table[column].min()), int(table[column].max())
            parts.append(count(high, noun) if low == high else f"{low:,} to {high:,} {noun}s")
    return f"n = {' on '.join(parts)}" if parts else ""


def head_divergence(data: RunData) -> str:
    """Caption of the map of heads."""
    table = data.probe_table("heads", "layer", "head", "vhd")
    n = ""
    if table is not None and "n_items" in table.columns and table["n_items"].notna().any():
        n = f" n = {count(int(table['n_items'].max()), 'caption')}."
    how = "" if table is None or "contrast" not in table.columns else f" (image {table['contrast'].iloc[0]})"
    return (
        f"Mean VHD of every attention head at the first generated word{how}, and the same numbers layer by layer with "
        f"{data.level} intervals by image; dashed: the median of the layer. A ring in the map, and a filled dot, mark "
        "the heads that reinforcement would pick (its outlier rule included) in "
        "at least half of the images." + n
    )


def t_vhd_histogram(data: RunData) -> str:
    """Caption of the histogram of T-VHD."""
    tokens = data.tokens()
    if tokens is None:
        return ""
    column, k = summaries.t_vhd_column(tokens)
    known = tokens[tokens[column].notna()]
    sizes = [
        count(int((known["label"] == kind).sum()), noun)
        for kind, noun in (
            ("object", "true object word"),
            ("hallucinated", "hallucinated object word"),
            ("other", "other word"),
        )
    ]
    items = f" in {count(known['item'].nunique(), 'caption')}" if "item" in known.columns else ""
    return (
        f"T-VHD (sum over the top {k} heads of each layer) by kind of word, each kind as shares of its own words; the "
        f"bars above are means with {data.level} intervals. If T-VHD told nothing, the histograms would coincide. n = "
        f"{join(sizes)}{items}."
    )


def pope(data: RunData) -> str:
    """Caption of the POPE figure."""
    table = data.table("conditions", "dataset", "metric")
    names = findings.pope_datasets(data)
    one_split = [name for name in names if split_name(name) != "all"]
    n = n_text(None if table is None else table[table["dataset"].astype(str).isin(one_split)])
    return (
        f"POPE by split and condition, with {data.level} intervals by image. Dashed: the accuracy of guessing, the F1 "
        f"of always saying yes, the true share of yes.{f' {n} per split.' if n else ''}"
    )


def chair(data: RunData) -> str:
    """Caption of the CHAIR figure."""
    return _of_captions(
        data, f"Captions under every condition, with {data.level} intervals by image. Dashed: the reference condition."
    )


def differences(data: RunData) -> str:
    """Caption of the forest plot."""
    table = data.table("differences", "condition", "dataset", "metric")
    pooled = [name for name in findings.pope_datasets(data) if split_name(name) == "all"]
    names = findings.caption_datasets(data)[:1] + pooled
    sizes = [
        f"{'POPE' if name in pooled else split_name(name).capitalize()}: {n}"
        for name in names
        if (n := n_text(table, dataset=name))
    ]
    n = "; ".join(sizes)
    reference = findings.quoted(str(data.reference))
    return (
        f"Paired differences to {reference} on the same images, with {data.level} intervals; dashed: no difference. "
        "Thick bars exclude zero, thin bars do not; white markers are controls. The intervals are not corrected for "
        "the number of comparisons." + (f" {n}." if n else "")
    )


def recall_curve(data: RunData) -> str:
    """Caption of CHAIR_i against recall."""
    return _of_captions(
        data,
        "CHAIR_i against recall when every caption is cut after its first, second, ... mention; lower right is "
        f"better. Dashed: the recall that all conditions reach; beside or below, CHAIR_i there with {data.level} "
        "intervals (dashed: the reference).",
    )


def mention_index(data: RunData) -> str:
    """Caption of CHAIR_i by order of mention."""
    reference = findings.quoted(str(data.reference))
    text = (
        f"CHAIR_i of the first, second, ... object that a caption names, with {data.level} bands by image (controls "
        f"without); dashed: all mentions of {reference}. n under the axis counts its mentions; orders with fewer than "
        f"{summaries.MIN_MENTIONS} mentions are left out."
    )
    return _of_captions(data, text)


def caption_words(data: RunData) -> str:
    """Caption of the scene."""
    scenes = showcase.read_scenes(data)
    if not scenes:
        return ""
    one = scenes[0]
    text = count(len(scenes), "scene") + (
        f" captioned under {findings.quoted(one.condition)}." if one.condition else "."
    )
    if not one.attention.empty:
        chosen, rest = (_heads(one, kind) for kind in (True, False))
        others = f"; in brackets the same for {rest} of these layers" if rest else ""
        text += (
            f" Spotlights{' on the first scene' if len(scenes) > 1 else ''}: mean attention of {chosen} over the image, "
            "while the word above the map was predicted; the brightest patch has the most. Below: the share of all "
            f"their attention that is on the image{others}. ✗ is a hallucinated object. "
            f"n = {count(len(scenes), 'caption')}: an illustration, no evidence."
        )
    return text


def _heads(one: showcase.Scene, chosen: bool) -> str:
    """How many heads reinforcement picks (or not) in a scene, as text; empty where there are none."""
    n, noun = one.heads(chosen), "head picked by reinforcement" if chosen else "other head"
    if (one.attention["layer"] < 0).any():
        return f"the {noun.replace('head', 'heads')}" if n else ""
    return f"the {count(n, noun, noun.replace('head', 'heads'))}" if n else ""


def _of_captions(data: RunData, text: str) -> str:
    table, names = data.table("conditions", "dataset"), findings.caption_datasets(data)
    n = n_text(table, dataset=names[0]) if names else ""
    return f"{text} {n}." if n else text
