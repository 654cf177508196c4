"""The figures of `TruthfulDirection`."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from slitlamp.reports import truthful_panels as panels
from slitlamp.reports.draw import is_narrow, outer_labels, own_legend, panel_grid
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import ORANGE, PURPLE, new_figure, short_names
from slitlamp.reports.wording import count

PART = ("model", "condition", "dataset")
CHOSEN_COMPONENTS: Final = "d' of subspace alignment: the best of those tried, by these AUROCs"
OWN: Final = "Diagonal: trained on its own labels, at the layer that they chose, so a little too high."


def _first(tables: Tables, name: str) -> pd.DataFrame | None:
    """A table, of the first part of a run where it has several; None where it is absent or holds no number."""
    table = tables.get(name)
    if table is None or table.empty:
        return None
    for column in PART:
        if column in table.columns and column in (tables.get("layers", table)).columns:
            table = table[table[column] == table[column].iloc[0]]
    return table


def _layers(tables: Tables, width: float) -> Figure | None:
    layers, baselines = _first(tables, "layers"), _first(tables, "baselines")
    if layers is None or baselines is None or layers["auroc"].isna().all():
        return None
    methods = list(dict.fromkeys(layers["method"]))
    figure, axes = panel_grid(width, len(methods), 2.5, extra=0.8, sharey=True)
    confidence = baselines[baselines["baseline"] == "-log p"].iloc[0]
    for ax, method in zip(axes, methods, strict=True):
        panels.truth_curve(layers[layers["method"] == method], method, ax, confidence=confidence)
    outer_labels(axes)
    own_legend(figure, axes[:1])
    return figure


def _scores(tables: Tables, width: float) -> Figure | None:
    mentions = _first(tables, "mentions")
    if (
        mentions is None
        or not any(one.startswith("score_") for one in mentions)
        or mentions["hallucinated"].nunique() < 2
    ):
        return None
    method = next(one for one in mentions if one.startswith("score_"))
    shown = [
        (method, f"probe ({panels.METHOD_NAMES[method.removeprefix('score_')]}), log-odds"),
        ("neg_log_p", panels.SCORE_NAMES["neg_log_p"]),
    ]
    figure, axes = panel_grid(width, 2, 2.4, extra=0.7)
    for ax, (column, name) in zip(axes, shown, strict=True):
        panels.score_histogram(mentions, column, ax)
        ax.set_xlabel(name)
    own_legend(figure, axes[:1])
    return figure


def _roc(tables: Tables, width: float) -> Figure | None:
    mentions = _first(tables, "mentions")
    if mentions is None or mentions["hallucinated"].nunique() < 2:
        return None
    curves: list[tuple[str, str, str, Any]] = [
        (f"score_{one}", name, panels.METHOD_COLOURS[one], panels.METHOD_LINES[one])
        for one, name in panels.METHOD_NAMES.items()
        if f"score_{one}" in mentions
    ]
    if not curves:
        return None
    curves += [
        ("neg_log_p", "\N{MINUS SIGN}log p", ORANGE, (0, (7, 2, 1.5, 2))),
        ("mention", "mention index", PURPLE, (0, (2, 1.2))),
    ]
    figure = new_figure(width, 4.2 if is_narrow(width) else 3.8)
    own_legend(figure, [panels.score_roc_panel(mentions, curves, figure.add_subplot())])
    return figure


def _pmc(tables: Tables, width: float) -> Figure | None:
    table, by_length = _first(tables, "pmc"), _first(tables, "pmc_by_length")
    if table is None or by_length is None or table["value"].isna().all():
        return None
    narrow = is_narrow(width)
    figure = new_figure(width, 5.6 if narrow else 3.3)
    if narrow:
        axes = figure.subplots(2, 1, height_ratios=[3, 1.7])
    else:
        axes = figure.subplots(1, 2, width_ratios=[1.5, 1])
    panels.pmc_panel(by_length, axes[0])
    panels.pmc_difference_panel(table, axes[1])
    own_legend(figure, axes[:1])
    return figure


def _layer_matrix(tables: Tables, width: float) -> Figure | None:
    table = _first(tables, "layer_transfer")
    if table is None:
        return None
    names = ["in" if one < 0 else str(one) for one in sorted(table["source_layer"].unique())]
    rename = {layer: "in" if layer < 0 else str(layer) for layer in table["source_layer"].unique()}
    shown = table.assign(source=table["source_layer"].map(rename), target=table["target_layer"].map(rename))
    itself = shown[shown["source_layer"] == shown["target_layer"]]
    kinds = _kinds(shown[shown["source_layer"] != shown["target_layer"]])
    figure, axes = panel_grid(width, len(kinds), 0.3 * len(names) + 1.2, columns=2, extra=0)
    for ax, (kind, rows) in zip(axes, kinds.items(), strict=True):
        panels.matrix_panel(pd.concat([rows, itself]), names, names, ax, bar=False)
        ax.set_title(kind)
        ax.set_xlabel("applied to layer")
        ax.set_ylabel("trained on layer")
    outer_labels(axes)
    return figure


def _kinds(moved: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each alignment by the name it is shown under; of subspace alignment the best number of components."""
    best = moved[moved["alignment"] == "subspace"]
    best = best[best["components"] == _best_components(best)]
    kinds = {panels.alignment_name(name): moved[moved["alignment"] == name] for name in ("none", "standardised")}
    kinds[f"subspace (d' = {int(best['components'].iloc[0])})" if len(best) else "subspace"] = best
    for name in ("coral", *sorted(one for one in moved["alignment"].unique() if one.startswith("procrustes"))):
        kinds[panels.alignment_name(name)] = moved[moved["alignment"] == name]
    return {name: one for name, one in kinds.items() if one["auroc"].notna().any()}


def _varying(table: pd.DataFrame, varies: str) -> pd.DataFrame:
    """Rows of transfers in which only `varies` differs, with the transfers of each part onto itself."""
    column = {"model": "model", "dataset": "dataset", "condition": "condition"}[varies]
    moved = table[table["varies"] == varies]
    fixed = [one for one in PART if one != column]
    if moved.empty:
        return moved
    first = tuple(moved[[f"source_{one}" for one in fixed]].iloc[0])
    kept = table[table["varies"].isin([varies, "nothing"])]
    same = kept[[f"source_{one}" for one in fixed]].apply(tuple, axis=1) == first
    kept = kept[same]
    return kept.assign(source=kept[f"source_{column}"].astype(str), target=kept[f"target_{column}"].astype(str))


def _matrices(varies: str) -> Any:
    def draw(tables: Tables, width: float) -> Figure | None:
        table = tables.get("transfer")
        if table is None:
            return None
        rows = _varying(table, varies)
        if rows.empty:
            return None
        itself = rows[rows["varies"] == "nothing"]
        moved = rows[rows["varies"] == varies]
        kinds = _kinds(moved)
        if not kinds:
            return None
        names = list(dict.fromkeys([*rows["source"], *rows["target"]]))
        short = short_names([one.rsplit("/", 1)[-1] for one in names], 16)
        labels = [short[one.rsplit("/", 1)[-1]] for one in names]
        columns = 1 if is_narrow(width) else 3 if len(names) < 3 else 2
        figure, axes = panel_grid(width, len(kinds), 0.42 * len(names) + 0.75, columns=columns, extra=0.8)
        for place, (ax, (name, one)) in enumerate(zip(axes, kinds.items(), strict=True)):
            both = pd.concat([one, itself])
            both = both.assign(
                source=both["source"].map(dict(zip(names, labels, strict=True))),
                target=both["target"].map(dict(zip(names, labels, strict=True))),
            )
            panels.matrix_panel(both, labels, labels, ax, bar=False)
            ax.set_title(name.replace(" (", "\n("))
            ax.tick_params(axis="x", rotation=30)
            if place % columns:  # names stand at the left and below the last panel of a column
                ax.set_yticklabels([])
            if place + columns < len(kinds):
                ax.set_xticklabels([])
        outer_labels(axes)
        return figure

    return draw


def _best_components(rows: pd.DataFrame) -> float:
    """The number of components with the highest mean AUROC over the pairs shown (captions say that it is chosen so)."""
    return float(rows.groupby("components")["auroc"].mean().idxmax()) if len(rows) else float("nan")


def _components(tables: Tables, width: float) -> Figure | None:
    table = tables.get("transfer")
    if table is None:
        return None
    swept = table[(table["alignment"] == "subspace") & (table["varies"] != "nothing")]
    if swept["components"].nunique() < 2:
        return None
    keys = [f"{side}_{one}" for side in ("source", "target") for one in PART]
    pairs = swept[keys].drop_duplicates().head(2)
    figure, axes = panel_grid(width, len(pairs), 2.5, extra=1.2)
    for ax, (_, pair) in zip(axes, pairs.iterrows(), strict=True):
        rows = table[np.logical_and.reduce([table[key] == pair[key] for key in keys])]
        panels.component_panel(rows, ax)
        what = str(rows["varies"].iloc[0])
        ends = short_names([str(pair[f"{side}_{what}"]).rsplit("/", 1)[-1] for side in ("source", "target")], 17)
        ax.set_title(" \N{RIGHTWARDS ARROW} ".join(ends.values()))
    outer_labels(axes)
    own_legend(figure, axes[:1])
    return figure


def _sample(tables: Tables) -> str:
    layers = _first(tables, "layers")
    if layers is None:
        return ""
    row = layers.iloc[0]
    return (
        f"{count(row['n_hallucinated'], 'hallucinated mention')} and {count(row['n_true'], 'true one')} in "
        f"{count(row['n_items'], 'image')}, images kept together in cross-validation and bootstrap."
    )


FIGURES: Final[dict[str, Drawing]] = {
    "layers": Drawing(
        "Where hallucination can be read",
        lambda tables: (
            "AUROC of probes on the states of every layer, with 95 % bands, against control labels (one random label per "
            "object; mean and range of the draws), against -log p of the token, and chance. A probe that learns objects rather "
            f"than truth does as well on control labels. {_sample(tables)}"
        ),
        _layers,
    ),
    "scores": Drawing(
        "Scores of hallucinated and true mentions",
        lambda tables: (
            "Out-of-fold scores of the probe at the layer that other images chose, and -log p of the token. Values outside the "
            f"axis are counted in the last bins. {_sample(tables)}"
        ),
        _scores,
    ),
    "roc": Drawing(
        "Detection at low false positive rates",
        lambda tables: (
            "ROC curves of out-of-fold scores, the false positive rate on a logarithmic axis; vertical lines at 1 and 5 %. "
            f"{_sample(tables)}"
        ),
        _roc,
    ),
    "pmc": Drawing(
        "The least confident step before a mention (PMC)",
        lambda tables: (
            "PMC: mean over mentions of the smallest of the largest probabilities among the preceding tokens of the sentence, by "
            "how many there are (points of at least 5 mentions), and hallucinated minus true ones without and with control of "
            "that number; 95 % intervals over images. Published: .29 hallucinated against .22 true, and .247 against .2975 in a "
            "replication."
        ),
        _pmc,
    ),
    "layer_transfer": Drawing(
        "From layer to layer",
        lambda tables: (
            "AUROC of the logistic probe of one layer applied to the states of another, by alignment on the states of the "
            f"training images ({CHOSEN_COMPONENTS}); diagonal: cross-validated on itself. Chance is .5. {_sample(tables)}"
        ),
        _layer_matrix,
    ),
    "transfer_models": Drawing(
        "From model to model",
        lambda tables: (
            "AUROC with its 95 % interval of probes trained on the row's model and applied to the column's, by alignment "
            f"({CHOSEN_COMPONENTS}); images are held out in both. {OWN} Chance is .5."
        ),
        _matrices("model"),
    ),
    "transfer_datasets": Drawing(
        "From data set to data set",
        lambda tables: (
            "AUROC with its 95 % interval of probes trained on the row's data set and applied to the column's, by alignment "
            f"({CHOSEN_COMPONENTS}); images are held out in both. {OWN} Chance is .5."
        ),
        _matrices("dataset"),
    ),
    "components": Drawing(
        "How many components align",
        lambda tables: (
            "AUROC on the target over the number of components of subspace alignment, with 95 % band, beside the other "
            "alignments, a probe trained on the target's own labels, and chance."
        ),
        _components,
    ),
}
