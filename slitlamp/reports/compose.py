"""The figures of a run, put together from its tables: each gives None where the run has no data for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slitlamp.reports import captions, conditions, findings, heads, probe_findings, scene, showcase, summaries
from slitlamp.reports.data import MANY, RunData
from slitlamp.reports.draw import condition_handles, is_narrow, legend_below, panel_grid
from slitlamp.reports.metrics import metric, split_name
from slitlamp.reports.style import new_figure, styled
from slitlamp.reports.wording import number

CHAIR_METRICS = ("chair_i", "chair_s", "recall", "mean_words")
POPE_METRICS = ("accuracy", "f1", "yes_ratio")


@styled
def head_divergence(data: RunData, width: float) -> Figure | None:
    """Map of VHD over layers and heads, beside it every head with its interval."""
    table = data.probe_table("heads", "layer", "head", "vhd")
    if table is None:
        return None
    n_layers = table["layer"].nunique()
    height = min(1.1 + 0.3 * n_layers, 6.5)
    with_intervals = {"low", "high"} <= set(table.columns) and n_layers <= 16
    if is_narrow(width) or not with_intervals:
        figure = new_figure(width, height + (2.8 if with_intervals else 0))
        axes = figure.subplots(1 + with_intervals, 1, squeeze=False, height_ratios=[height, 2.8][: 1 + with_intervals])[
            :, 0
        ]
    else:
        figure = new_figure(width, max(height, 3.0))
        axes = figure.subplots(1, 2, width_ratios=[1.15, 1])
    heads.head_map(table, axes[0])
    if with_intervals:
        heads.head_intervals(table, axes[1])
    return figure


@styled
def t_vhd_histogram(data: RunData, width: float) -> Figure | None:
    """T-VHD of true objects, hallucinated objects and other words."""
    tokens = data.tokens()
    if tokens is None:
        return None
    column, k = summaries.t_vhd_column(tokens)
    figure = new_figure(width, 4.0 if is_narrow(width) else 3.6)
    means = probe_findings.t_vhd_means(data.probe_table("t_vhd", "k", "label"), k)
    ax = heads.t_vhd_histogram(tokens, column, means, figure.add_subplot())
    legend_below(figure, ax.get_legend_handles_labels()[0])
    return figure


@styled
def pope(data: RunData, width: float) -> Figure | None:
    """POPE by split and condition: accuracy, F1 and yes ratio."""
    table = data.drawn_table("conditions", "dataset", "metric", "value", "low", "high")
    datasets = findings.pope_datasets(data)
    if table is None or not datasets:
        return None
    rows = table[table["dataset"].astype(str).isin(datasets)]
    shown = [name for name in POPE_METRICS if (rows["metric"] == name).any()]
    row = 0.1 if is_narrow(width) else 0.12
    tall = 0.85 + len(datasets) * (0.2 + row * len(data.drawn))
    figure, axes = panel_grid(width, len(shown), tall)
    for ax, name in zip(axes, shown, strict=True):
        conditions.pope_panel(rows, metric(name, "pope"), ax, styles=data.styles, names=data.short)
    _names_at_the_left(axes)
    legend_below(figure, condition_handles(data.drawn, data.styles, data.short))
    return figure


@styled
def chair(data: RunData, width: float) -> Figure | None:
    """CHAIR_i, CHAIR_s, recall and length of every condition."""
    table = data.drawn_table("conditions", "dataset", "metric", "value", "low", "high")
    datasets = findings.caption_datasets(data)
    if table is None or not datasets:
        return None
    rows = table[table["dataset"].astype(str) == datasets[0]]
    shown = [name for name in CHAIR_METRICS if (rows["metric"] == name).any()]
    tall = 0.75 + 0.26 * len(data.drawn)
    figure, axes = panel_grid(width, len(shown), tall, columns=2, extra=0)
    for ax, name in zip(axes, shown, strict=True):
        conditions.conditions_panel(rows, name, ax, styles=data.styles, names=data.short, reference=data.reference)
    _names_at_the_left(axes)
    return figure


@styled
def differences(data: RunData, width: float) -> Figure | None:
    """Paired differences to the reference for captions and for every POPE split."""
    table = data.drawn_table("differences", "dataset", "metric", "value", "low", "high")
    if table is None:
        return None
    if "reference" in table.columns:
        table = table[table["reference"].astype(str) == str(data.reference)]
    panels: list[tuple[str, pd.DataFrame, str]] = []
    for dataset in findings.caption_datasets(data)[:1]:
        rows = table[table["dataset"].astype(str) == dataset]
        panels += [(name, rows, metric(name).label) for name in ("chair_i", "chair_s", "recall")]
    splits = findings.pope_datasets(data)
    for dataset in [name for name in splits if split_name(name) == "all"] or splits:
        rows = table[table["dataset"].astype(str) == dataset]
        gap = "\n" if is_narrow(width) else " "
        panels.append(("accuracy", rows, f"POPE accuracy,{gap}{split_name(dataset)}"))
    panels = [(name, rows, title) for name, rows, title in panels if (rows["metric"] == name).any()]
    if not panels:
        return None
    tall = 0.75 + 0.26 * max(len(data.drawn) - 1, 1)
    figure, axes = panel_grid(width, len(panels), tall, columns=2, extra=0)
    for ax, (name, rows, title) in zip(axes, panels, strict=True):
        conditions.differences_panel(rows, name, ax, styles=data.styles, names=data.short, title=title)
    _names_at_the_left(axes)
    return figure


@styled
def recall_curve(data: RunData, width: float) -> Figure | None:
    """CHAIR_i against recall, with the comparison at equal recall; None of more than `MANY` conditions."""
    table = data.drawn_table("recall_curve", "cut", "recall", "chair_i")
    if table is None or len(data.drawn) > MANY:
        return None
    table = table[table["chair_i"].notna() & table["recall"].notna()]
    if table.empty:
        return None
    matched = data.drawn_table("matched_recall", "recall", "value", "low", "high")
    narrow, tall = is_narrow(width), 0.7 + 0.26 * len(data.drawn)
    if matched is None:
        figure = new_figure(width, 3.6)
        axes = [figure.add_subplot()]
    elif narrow:
        figure = new_figure(width, 3.9 + tall + 0.19 * max(len(data.drawn) - 6, 0))
        axes = list(figure.subplots(2, 1, height_ratios=[3.4, tall]))
    else:
        figure = new_figure(width, max(3.4, tall + 0.8))
        axes = list(figure.subplots(1, 2, width_ratios=[1.5, 1]))
    recall = float("nan") if matched is None else float(matched["recall"].iloc[0])
    captions.recall_curve(table, axes[0], matched=recall, styles=data.styles, names=data.short)
    if matched is not None:
        conditions.conditions_panel(
            matched, metric("chair_i"), axes[1], styles=data.styles, names=data.short, reference=data.reference,
            title=f"CHAIR_i at recall {number(recall)}",
        )  # fmt: skip
    legend_below(figure, condition_handles(data.drawn, data.styles, data.short, lines=True))
    return figure


@styled
def mention_index(data: RunData, width: float) -> Figure | None:
    """CHAIR_i by the order of mention; None of more than `MANY` conditions."""
    table = data.drawn_table("chair_mentions", "image_id", "index", "hallucinated")
    shares = None if table is None or len(data.drawn) > MANY else summaries.mention_index_shares(table)
    if shares is None or shares.empty:
        return None
    drawn = [name for name in data.drawn if name in set(shares["condition"])]
    legend = max(len(drawn) - 6, 0) * (0.19 if is_narrow(width) else 0.07)
    figure = new_figure(width, (3.8 if is_narrow(width) else 3.6) + legend)
    datasets = findings.caption_datasets(data)
    scores = data.table("conditions", "condition", "dataset", "metric", "value")
    overall = (
        findings.estimate(scores, condition=str(data.reference), dataset=datasets[0], metric="chair_i")
        if datasets
        else None
    )
    banded = tuple(one.name for one in data.conditions if one.role != "control")
    captions.mention_index(
        shares,
        figure.add_subplot(),
        overall=overall.value if overall else math.nan,
        bands=banded,
        styles=data.styles,
        names=data.short,
    )
    legend_below(figure, condition_handles(drawn, data.styles, data.short, lines=True))
    return figure


def caption_words(data: RunData, width: float) -> Figure | None:
    """The first scene of the showcase: image, words by T-VHD, attention."""
    scenes = showcase.read_scenes(data)
    return scene.caption_words(scenes[0], width) if scenes else None


def attention_maps(data: RunData, width: float) -> Figure | None:
    """The attention maps of the first scene alone."""
    scenes = showcase.read_scenes(data)
    usable = scenes and scenes[0].image is not None and not scenes[0].mentions.empty
    return scene.caption_words(scenes[0], width, with_words=False) if usable else None


def _names_at_the_left(axes: Sequence[Axes]) -> None:
    """Keep the names of rows, which all panels share, at the left edge only; numbers below differ and stay."""
    for ax in axes:
        place = ax.get_subplotspec()
        if place is not None and place.colspan.start:
            ax.set_yticklabels([])
