"""Maps and overlays against stored images: what reading the artists cannot see, such as a map upside down.

The images hold no letters, which differ between machines. To renew one after looking at it:
`Image.fromarray(rendered(name, table)).save(GOLDEN / f"{name}.png")`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from numpy.typing import NDArray
from panel_examples import picture, pixels
from PIL import Image

from slitlamp.reports import panels
from slitlamp.reports.style import new_figure

GOLDEN = Path(__file__).parent / "golden"
SIDE = 4
TOLERANCE = 1.0
"""Mean absolute difference of 0 to 255. Edges of cells and markers may be blended anew by another version of matplotlib: fewer
than 3 % of the pixels, by some tens. One wrong cell of the sixteen is more (see below)."""


def cells() -> pd.DataFrame:
    """Sixteen values that no symmetry of the square leaves alone."""
    row, column = np.divmod(np.arange(SIDE * SIDE), SIDE)
    value = ((7 * row + 3 * column) % 16) / 15
    return pd.DataFrame({"row": row, "column": column, "value": value})


def _draw(name: str, table: pd.DataFrame, ax: Axes) -> None:
    if name == "attention_panel":
        panels.attention_panel(picture(), table["value"].to_numpy().reshape(SIDE, SIDE), ax)
    elif name == "token_map":
        panels.token_map(table, "value", ax)
    elif name == "outlier_picture":
        marks = {
            "first in the encoder's attention": table["value"] > 0.7,
            "norm above mean + sd": table["value"] > 0.85,
        }
        panels.outlier_picture(pixels(), table.assign(**marks), ax)
    elif name == "head_map":
        heads = table.rename(columns={"row": "layer", "column": "head", "value": "vhd"})
        panels.head_map(heads.assign(selected=heads["vhd"] > 0.7), ax)
    else:
        rows = table.rename(columns={"row": "layer_a", "column": "layer_b"}).assign(measure="cka", null=0.1)
        panels.similarity_map(rows, ax)


def rendered(name: str, table: pd.DataFrame) -> NDArray[np.uint8]:
    """[height, width, 3]: the panel alone, filling the image, without letters."""
    figure = new_figure(1.2, 1.2)
    figure.set_layout_engine("none")
    ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    _draw(name, table, ax)
    for other in figure.axes[1:]:
        other.remove()
    ax.set_position((0.0, 0.0, 1.0, 1.0))
    ax.set_title("")
    ax.set_axis_off()
    for text in list(ax.texts):
        text.remove()
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


@pytest.mark.parametrize("name", ["attention_panel", "token_map", "outlier_picture", "head_map", "similarity_map"])
def test_a_map_looks_as_it_did(name: str) -> None:
    stored = np.asarray(Image.open(GOLDEN / f"{name}.png").convert("RGB"))
    drawn = rendered(name, cells())
    assert drawn.shape == stored.shape
    assert difference(drawn, stored) < TOLERANCE
    turned = cells().assign(value=cells()["value"].to_numpy()[::-1])
    assert difference(rendered(name, turned), stored) > TOLERANCE, "a map upside down would be seen"


def test_one_wrong_cell_is_more_than_the_tolerance() -> None:
    wrong = cells()
    wrong.loc[5, "value"] = 1 - wrong.loc[5, "value"]
    for name in ("attention_panel", "token_map", "head_map", "similarity_map"):
        assert difference(rendered(name, wrong), rendered(name, cells())) > TOLERANCE
