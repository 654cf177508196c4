"""The figures of `RepresentationSimilarity`."""

from __future__ import annotations

from typing import Final

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slitlamp.reports.draw import heat_map, is_narrow, need, outer_labels, panel_grid
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import axes_or_new, short_names, styled
from slitlamp.reports.wording import number

MAX_ANNOTATED: Final = 64
"""Largest number of cells whose values are written into the map."""
NAMES: Final = {
    "cka": "linear CKA", "cka_unbiased": "CKA, unbiased", "svcca": "SVCCA", "procrustes": "Procrustes",
    "mutual_knn": "mutual neighbours",
}  # fmt: skip


@styled
def similarity_map(rows: pd.DataFrame, ax: Axes | None = None, *, both: bool = False) -> Axes:
    """Values of one measure, layer against layer.

    Args:
        rows: of one measure: columns measure, layer_a, layer_b, value, null.
        ax: where to draw; a new figure if None.
        both: whether to fill the mirror image, of a model with itself.
    """
    need(rows, "measure", "layer_a", "layer_b", "value", "null")
    ax = axes_or_new(ax, width=3.2, height=3.0)
    grid = rows.pivot(index="layer_a", columns="layer_b", values="value").astype(float)
    if both:
        grid = grid.combine_first(grid.T).sort_index().sort_index(axis=1)
    notes = grid.map(lambda one: number(one, 2)) if grid.size <= MAX_ANNOTATED else None
    heat_map(grid, ax, min(0.0, float(grid.min(axis=None))), 1, notes=notes)
    null = round(float(rows["null"].mean()), 2) + 0.0  # no minus before a zero
    ax.set_title(f"{NAMES[str(rows['measure'].iloc[0])]}\nrandom {null:.2f}", fontsize=8.5)
    ax.set_xlabel("layer")
    ax.set_ylabel("layer")
    return ax


def _panels(table: pd.DataFrame, width: float, both: bool, across: str, down: str) -> Figure:
    measures = list(dict.fromkeys(table["measure"]))
    figure, axes = panel_grid(
        width, len(measures), 2.1 if is_narrow(width) else 2.5, columns=3, narrow_columns=2, extra=0.2
    )
    for ax, measure in zip(axes, measures, strict=True):
        similarity_map(table[table["measure"] == measure], ax, both=both).set(xlabel=across, ylabel=down)
    outer_labels(axes)
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
