"""The figures of `RepresentationSimilarity`."""

from __future__ import annotations

from typing import Final

import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slitlamp.reports.draw import is_narrow
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import MAP, new_figure, short_names, styled

NAMES: Final = {
    "cka": "linear CKA", "cka_unbiased": "CKA, unbiased", "svcca": "SVCCA", "procrustes": "Procrustes",
    "mutual_knn": "mutual neighbours",
}  # fmt: skip


@styled
def similarity_map(rows: pd.DataFrame, ax: Axes, *, both: bool) -> Axes:
    """Values of one measure, layer against layer; `both` fills the mirror image of a model with itself."""
    grid = rows.pivot(index="layer_a", columns="layer_b", values="value").astype(float)
    if both:
        grid = grid.combine_first(grid.T).sort_index().sort_index(axis=1)
    seaborn.heatmap(
        grid, ax=ax, cmap=MAP, vmin=min(0.0, float(grid.min().min())), vmax=1, annot=grid.size <= 64, fmt=".2f",
        annot_kws={"fontsize": 6.5}, linewidths=0.5, linecolor="white", cbar=False,
    )  # fmt: skip
    ax.tick_params(length=0)
    ax.set_yticklabels(ax.get_yticklabels(), rotation=0)
    null = round(float(rows["null"].mean()), 2) + 0.0  # no minus before a zero
    ax.set_title(f"{NAMES[str(rows['measure'].iloc[0])]}\nrandom {null:.2f}", fontsize=8.5)
    return ax


def _panels(table: pd.DataFrame, width: float, both: bool, across: str, down: str) -> Figure:
    measures = list(dict.fromkeys(table["measure"]))
    columns = min(len(measures), 2 if is_narrow(width) else 3)
    rows = -(-len(measures) // columns)
    figure = new_figure(width, rows * (2.1 if is_narrow(width) else 2.5) + 0.2)
    for place, measure in enumerate(measures):
        ax = figure.add_subplot(rows, columns, place + 1)
        similarity_map(table[table["measure"] == measure], ax, both=both)
        ax.set_xlabel(across if place + columns >= len(measures) else "")
        ax.set_ylabel(down if place % columns == 0 else "")
    return figure


def _layers(tables: Tables, width: float) -> Figure | None:
    table = tables.get("layers")
    return None if table is None else _panels(table, width, True, "layer", "layer")


def _models(tables: Tables, width: float) -> Figure | None:
    table = tables.get("models")
    if table is None:
        return None
    first = table.iloc[0]
    same = [table[one] == first[one] for one in ("model_a", "model_b", "condition", "dataset")]
    names = short_names([first["model_a"], first["model_b"]], 16)
    return _panels(
        table[same[0] & same[1] & same[2] & same[3]], width, False,
        f"layer of {names[first['model_b']]}", f"layer of {names[first['model_a']]}",
    )  # fmt: skip


def _caption(tables: Tables) -> str:
    table = tables["models"] if "models" in tables else tables["layers"]
    return (
        f"Similarity of the states of {int(table['n_items'].iloc[0])} items, layer against layer; 1 is equal geometry. Above "
        "each map stands what the same measure gives on average for items matched at random, which is its zero."
    )


FIGURES: Final = {
    "layers": Drawing("How alike the layers arrange the items", _caption, _layers),
    "models": Drawing("How alike two models arrange the items", _caption, _models),
}
