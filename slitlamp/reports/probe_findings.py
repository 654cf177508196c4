"""What the tables of a head divergence probe and the showcase say, in plain sentences."""

from __future__ import annotations

import numpy as np
import pandas as pd

from slitlamp.reports.data import RunData
from slitlamp.reports.findings import quoted
from slitlamp.reports.showcase import Scene, read_scenes
from slitlamp.reports.summaries import t_vhd_column
from slitlamp.reports.wording import Estimate, against_chance, count, join, number, sentence


def head_findings(heads: pd.DataFrame) -> list[str]:
    """Which head diverges most, and how far it stands out from the median head."""
    rows = heads[np.isfinite(heads["vhd"].to_numpy(dtype=np.float64))]
    if rows.empty:
        return ["No head has a VHD here."]
    top = rows.loc[rows["vhd"].idxmax()].to_dict()
    median = float(rows["vhd"].median())
    value = Estimate.of(top, "vhd")
    where = (
        f"the most divergent of {count(len(rows), 'head')} is head {int(top['head'])} of layer {int(top['layer'])}, "
    )
    where += f"with a VHD of {value.text(2)}"
    if median > 0 and len(rows) > 1:
        where += f", {number(value.value / median, 1)} times that of the median head ({number(median, 2)})"
    if "selected" in rows.columns and np.isfinite(top["selected"]):
        where += (
            f"; reinforcement, with its outlier rule, picks it in {number(float(top['selected']), 2)} of the images"
        )
    sentences = [sentence(where)]
    means = rows.groupby("layer")["vhd"].mean()
    if len(means) > 1:
        sentences.append(
            sentence(
                f"on average VHD is largest in layer {int(means.idxmax())} and smallest in layer {int(means.idxmin())}"
            )
        )
    return sentences


def consistency_findings(table: pd.DataFrame) -> list[str]:
    """How far the ranking of heads depends on where it is measured."""
    parts = [
        f"{row['comparison']}: {number(float(row['spearman']), 2)}"
        for row in table.to_dict("records")
        if np.isfinite(row["spearman"])
    ]
    if not parts:
        return []
    return [f"Rank correlation of the heads' VHD (1: the same heads everywhere, 0: no agreement): {'; '.join(parts)}."]


def t_vhd_findings(
    tokens: pd.DataFrame, means: pd.DataFrame | None, areas: pd.DataFrame | None, k: int | None = None
) -> list[str]:
    """Mean T-VHD of true and hallucinated objects, and how well it separates them.

    Args:
        tokens: columns label, t_vhd_1, ...; one row per word.
        means: columns k, label, mean, low, high.
        areas: columns k, auroc, low, high: above .5 where hallucinated objects have the lower T-VHD.
        k: heads per layer.
    """
    column, k = t_vhd_column(tokens, k)
    sentences: list[str] = []
    own = t_vhd_means(means, k)
    values = {} if own is None else {str(row["label"]): Estimate.of(row, "mean") for row in own.to_dict("records")}
    if "object" in values and "hallucinated" in values:
        true, false = values["object"], values["hallucinated"]
        sentences.append(
            f"Words for objects that are in the image have a mean T-VHD of {true.text(2)}, words for hallucinated "
            f"objects {false.text(2)}."
        )
    if areas is not None and (areas["k"] == k).any():
        area = Estimate.of(areas[areas["k"] == k].iloc[0].to_dict(), "auroc")
        clause = against_chance(
            "the area under the ROC curve (AUROC) for telling hallucinated from true objects by a low T-VHD", area, 0.5
        )
        if area.excludes(0.5):
            clause += f": hallucinated objects tend to have the {'lower' if area.value > 0.5 else 'higher'} T-VHD"
        sentences.append(sentence(clause))
    if not sentences:
        known = set(tokens.loc[np.isfinite(tokens[column].to_numpy(dtype=np.float64)), "label"])
        missing = [name for kind, name in (("object", "true"), ("hallucinated", "hallucinated")) if kind not in known]
        sentences.append(
            f"No {' and no '.join(missing)} objects were named, so nothing is compared here."
            if missing
            else "Nothing was compared here."
        )
    return sentences


def t_vhd_means(means: pd.DataFrame | None, k: int) -> pd.DataFrame | None:
    """Mean T-VHD by kind of word for one k; None where it was not measured."""
    if means is None or not {"k", "label", "mean", "low", "high"} <= set(means.columns):
        return None
    rows = means[(means["k"] == k) & means["label"].isin(["object", "hallucinated", "other"])]
    return None if rows.empty else rows


def head_figure_findings(data: RunData) -> list[str]:
    """`head_findings` and `consistency_findings` of a run."""
    table, consistency = (
        data.probe_table("heads", "layer", "head", "vhd"),
        data.probe_table("consistency", "comparison", "spearman"),
    )
    if table is None:
        return []
    return head_findings(table) + ([] if consistency is None else consistency_findings(consistency))


def t_vhd_figure_findings(data: RunData) -> list[str]:
    """`t_vhd_findings` of a run."""
    tokens = data.tokens()
    if tokens is None:
        return []
    return t_vhd_findings(
        tokens, data.probe_table("t_vhd", "k", "label"), data.probe_table("t_vhd_auroc", "k", "auroc")
    )


def scene_findings(data: RunData) -> list[str]:
    """The words of the scene with the most and the least T-VHD, and what it hallucinates."""
    scenes = read_scenes(data)
    return scene_sentences(scenes[0]) if scenes else []


def scene_sentences(scene: Scene) -> list[str]:
    """What one scene, the first of the showcase, shows."""
    sentences: list[str] = []
    named = scene.words[scene.words["label"].isin(["object", "hallucinated"])]
    wrong = [quoted(str(word)) for word in named.loc[named["label"] == "hallucinated", "word"]]
    if named.empty:
        sentences.append("The first caption names no object.")
    elif wrong:
        sentences.append(
            sentence(
                f"of the {count(len(named), 'object')} named in the first caption, {join(wrong)} "
                f"{'is' if len(wrong) == 1 else 'are'} not "
                "in the image"
            )
        )
    else:
        sentences.append(f"{'Every' if len(named) > 1 else 'The'} object named in the first caption is in the image.")
    known = scene.words[np.isfinite(scene.words["t_vhd"].to_numpy(dtype=np.float64))]
    if len(known) > 1 and known["t_vhd"].max() > known["t_vhd"].min():
        most, least = known.loc[known["t_vhd"].idxmax()], known.loc[known["t_vhd"].idxmin()]
        sentences.append(
            sentence(
                f"its T-VHD is highest at {quoted(str(most['word']))} ({number(float(most['t_vhd']), 1)}) and lowest "
                "at "
                f"{quoted(str(least['word']))} ({number(float(least['t_vhd']), 1)})"
            )
        )
    shares = [(scene.grid(int(index)), scene.grid(int(index), chosen=False)) for index in scene.mentions["index"]]
    pairs = [(float(one.sum()), float(other.sum())) for one, other in shares if one is not None and other is not None]
    if pairs:
        chosen, others = (float(np.mean(side)) for side in zip(*pairs, strict=True))
        gap = round(chosen, 2) - round(others, 2)
        relation = "more than" if gap > 0 else "less than" if gap < 0 else "as much as"
        sentences.append(
            sentence(
                f"while naming objects the heads picked by reinforcement put {number(chosen, 2)} of their attention on "
                f"the image, {relation} the other heads ({number(others, 2)})"
            )
        )
    return sentences
