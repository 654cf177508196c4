"""Figures of what `ImplicitAlignment` compares: data sets, training checkpoints, and alignment against scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pandas as pd
from matplotlib.figure import Figure

from slitlamp.reports import implicit_alignment_panels as panels
from slitlamp.reports.draw import outer_labels, own_legend, panel_grid
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.implicit_alignment_panels import METRICS, PAIRS, VARIANTS
from slitlamp.reports.style import short_names, styled

PERFORMANCE: Final = (("accuracy", "pope"), ("recall", "captions"))
HALLUCINATION: Final = (("chair_i", "captions"), ("chair_s", "captions"))
"""Metrics in the scatters, with the task whose data sets they are shown for."""
SHOWN: Final = ("same_layer", "raw")
"""The score in the scatters: kind and space."""


def _model_names(table: pd.DataFrame) -> dict[str, str]:
    """Short names of the models in their order: the training step where there is one."""
    models = table.sort_values("order").drop_duplicates("model")
    short = short_names([str(one) for one in models["model"]], limit=16)
    return {
        str(row.model): f"step {int(row.step)}" if row.step == row.step else short[str(row.model)]
        for row in models.itertuples()
    }


@styled
def _across(tables: Tables, width: float) -> Figure | None:
    table = tables.get("across")
    if table is None:
        return None
    table = table[table["model"] == table["model"].iloc[-1]]
    figure, axes = panel_grid(width, 3, 2.4, extra=0.6)
    shown = {name: PAIRS[name]._replace(name=name) for name in ("image-image", "text-text", "image-text")}
    for ax, (variant, title) in zip(axes, VARIANTS.items(), strict=True):
        rows = table[table["variant"] == variant]
        for place, (_, pair) in enumerate(rows.groupby(["dataset", "other"], sort=False)):
            looks = shown if place == 0 else {key: look._replace(name="_again") for key, look in shown.items()}
            panels.alignment_curves(pair, "pair", looks, ax, zero=place == 0, spread=place == 0)
        ax.set(ylim=(-1.05, 1.05), ylabel="cosine similarity")
        ax.set_title(title)
    outer_labels(axes)
    own_legend(figure, axes[:1])
    return figure


@styled
def _checkpoints(tables: Tables, width: float) -> Figure | None:
    table = tables.get("model_curves")
    if table is None:
        return None
    table = table[table["dataset"] == table["dataset"].iloc[0]]
    table = table[table["condition"] == table["condition"].iloc[0]]
    names = _model_names(table)
    looks = panels.model_looks(list(names), list(names.values()))
    shown = (
        ("raw", "raw", "value"),
        ("standardised", "standardised", "value"),
        ("removed", "own minus other text", "difference"),
    )
    figure, axes = panel_grid(width, 3, 2.4, extra=0.9)
    for ax, (variant, title, column) in zip(axes, shown, strict=True):
        panels.alignment_curves(table[table["variant"] == variant], "model", looks, ax, zero=True, column=column)
        ax.set_title(title)
        ax.set_ylabel("image-text cosine")
    outer_labels(axes)
    own_legend(figure, axes[:1])
    return figure


@styled
def _scatters(tables: Tables, width: float, metrics: Sequence[tuple[str, str]]) -> Figure | None:
    table = tables.get("score_relation")
    if table is None:
        return None
    kind, variant = SHOWN
    table = table[(table["kind"] == kind) & (table["variant"] == variant)]
    pope = set(table.loc[table["metric"] == "accuracy", "score_dataset"])
    wanted = [
        (table["metric"] == metric) & (table["score_dataset"].isin(pope) == (task == "pope"))
        for metric, task in metrics
    ]
    table = pd.concat([table[one] for one in wanted])
    if table.empty:
        return None
    table = table[table["dataset"] == table["dataset"].iloc[0]]
    correlations = tables["correlations"]
    chosen = list(table.groupby(["metric", "score_dataset"], sort=False))[:6]
    figure, axes = panel_grid(width, len(chosen), 2.5, columns=2, extra=0.2)
    names = _model_names(table)
    for ax, ((metric, dataset), here) in zip(axes, chosen, strict=True):
        panels.score_scatter(here, names, ax)
        found = correlations[
            (correlations["metric"] == metric)
            & (correlations["score_dataset"] == dataset)
            & (correlations["dataset"] == here["dataset"].iloc[0])
            & (correlations["kind"] == kind)
            & (correlations["variant"] == variant)
            & (correlations["method"] == "spearman")
            & (correlations["of"] == "alignment")
        ].iloc[0]
        ax.set_title(f"ρ = {found['r']:.2f} [{found['low']:.2f}, {found['high']:.2f}]", fontsize=8.5)
        ax.set_ylabel(f"{METRICS[str(metric)]}, {str(dataset).rpartition('/')[2]}", fontsize=8)
    own_legend(figure, axes[:1])
    return figure


def _relation_caption(tables: Tables, direction: str) -> str:
    table = tables["score_relation"]
    return (
        f"One point a model ({table['model'].nunique()} of them, light to dark in the order of training): image-text cosine, "
        "raw, mean over layers and pairs, against its score, with 95 % intervals; Spearman's rho above. The paper expects a "
        f"{direction} relation. Checkpoints of one training are not independent, and everything that training changes "
        "correlates with everything else: the table `correlations` has the training step's own correlation beside it."
    )


def _datasets(across: pd.DataFrame) -> str:
    return ", ".join(sorted({*across["dataset"], *across["other"]}))


FIGURES: Final = {
    "across_datasets": Drawing(
        "Image and text tokens across data sets (IMA, figure 2)",
        lambda tables: (
            f"Every example of one data set against every one of another ({_datasets(tables['across'])}): cosine of mean-pooled "
            "tokens with 95 % intervals, images resampled; light bands, one standard deviation of the pairs "
            "of the first two data sets."
        ),
        _across,
    ),
    "checkpoint_curves": Drawing(
        "Alignment over training checkpoints (IMA, figure 7)",
        lambda tables: (
            f"Image-text cosine by layer, of {tables['model_curves']['model'].nunique()} models, light to dark in the order of "
            f"training; {int(tables['model_curves']['n_items'].max())} items, 95 % intervals. Right: matched minus "
            "mismatched pairs."
        ),
        _checkpoints,
    ),
    "alignment_and_performance": Drawing(
        "Alignment and task scores (IMA, figure 9)",
        lambda tables: _relation_caption(tables, "positive"),
        lambda tables, width: _scatters(tables, width, PERFORMANCE),
    ),
    "alignment_and_hallucination": Drawing(
        "Alignment and hallucination (IMA, figure 10)",
        lambda tables: _relation_caption(tables, "negative"),
        lambda tables, width: _scatters(tables, width, HALLUCINATION),
    ),
}
