"""The tables of attention rollout: shares of the image and of boxes, with intervals over images and their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probes.image_means import Images

Array = NDArray[Any]
METHODS = ("rollout", "attention", "last layer", "uniform causal", "flow")
"""Rollout; raw attention, mean over layers, and of the last layer; the rollout of uniform causal attention; flow."""


@dataclass(frozen=True)
class Places:
    """What was found from every place that attention was followed from.

    Attributes:
        images: which places share an image.
        kind: [place], what kind of place it is.
        image: [place, method], the weight on image tokens (not a share of 1 for flow).
        inside: [place, method], the share of that weight inside of the boxes; NaN without boxes.
        opposite: the same for the boxes turned by 180 degrees.
        area: [place], the share of the patches that the boxes cover.
        agreement: [place], rank correlation over image tokens of rollout and raw attention.
    """

    images: Images
    kind: Array
    image: Array
    inside: Array
    opposite: Array
    area: Array
    agreement: Array


def share_table(places: Places, methods: Sequence[str]) -> pd.DataFrame:
    """One row per kind of place and method.

    Columns: place, method; image, the weight on image tokens; inside, the share of it inside of the boxes; area, the boxes'
    share of the image, which is chance; opposite, the share inside of the turned boxes; gain = inside - opposite; advantage =
    inside - inside of raw attention; correlation with raw attention (rollout only); each with low and high, n_places (and
    n_boxes of them with boxes) and n_images.
    """
    rows = []
    raw = list(methods).index("attention")
    for kind in dict.fromkeys(places.kind.tolist()):
        own = places.kind == kind
        for place, method in enumerate(methods):
            of = {
                "image": places.image[:, place],
                "inside": places.inside[:, place],
                "area": places.area,
                "opposite": places.opposite[:, place],
                "gain": places.inside[:, place] - places.opposite[:, place],
                "advantage": places.inside[:, place] - places.inside[:, raw],
                "correlation": places.agreement if place == 0 else np.full(len(places.area), np.nan),
            }
            measured = own & np.isfinite(of["image"])
            if not measured.any():
                continue
            row: dict[str, Any] = {"place": kind, "method": method}
            for name, values in of.items():
                # the same places behind every number: chance is that of the boxes that were measured
                kept = (
                    measured
                    & np.isfinite(values)
                    & (np.isfinite(of["inside"]) | np.isin(name, ("image", "correlation")))
                )
                (one,) = places.images.only(kept).means(values[kept, None])
                row |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
            row["n_places"] = int(measured.sum())
            row["n_boxes"] = int((measured & np.isfinite(of["inside"])).sum())
            row["n_images"] = len(np.unique(places.images.group[measured]))
            rows.append(row)
    return pd.DataFrame(rows)


def depth_table(places: Places, found: Mapping[str, tuple[Array, Array]], layers: Array) -> pd.DataFrame:
    """Weight on the image and inside of the boxes by layer.

    Args:
        places: the kinds, images and areas.
        found: method -> ([place, layer] weight on image tokens, [place, layer] share of it inside).
        layers: [layer], their numbers.

    Returns:
        place, method, layer, image, inside, area with low and high; for rollout, of the layers up to this one.
    """
    rows = []
    for kind in dict.fromkeys(places.kind.tolist()):
        own = places.kind == kind
        for method, (image, inside) in found.items():
            for number, layer in enumerate(layers):
                row: dict[str, Any] = {"place": kind, "method": method, "layer": int(layer)}
                with_boxes = own & np.isfinite(inside[:, number])
                for name, values, kept in (
                    ("image", image[:, number], own),
                    ("inside", inside[:, number], with_boxes),
                    ("area", places.area, with_boxes),
                ):
                    (one,) = places.images.only(kept).means(values[kept, None])
                    row |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
                rows.append({**row, "n_places": int(own.sum()), "n_images": len(np.unique(places.images.group[own]))})
    return pd.DataFrame(rows)


def rollout_summary(tables: Mapping[str, pd.DataFrame]) -> str:
    """What rollout says of the image and of boxes, beside its controls."""
    shares = tables["shares"]
    boxed = shares[(shares["n_boxes"] > 0)]
    kinds = [kind for kind in ("object", *shares["place"].unique()) if (boxed["place"] == kind).any()]
    if not kinds:
        row = shares.iloc[0]
        return (
            f"Rollout from the {row['place']} leaves {_text(row, 'image')} on image tokens (n = {int(row['n_images'])} images); "
            "no boxes were given."
        )
    rows = shares[shares["place"] == kinds[0]].set_index("method")
    own, raw = rows.loc["rollout"], rows.loc["attention"]
    text = (
        f"Of the rollout's weight on the image, followed from {kinds[0]!r} tokens, {_text(own, 'inside')} falls into the box of "
        f"the object, which covers {own['area']:.2f} of the image ({own['opposite']:.2f} into the turned box); of raw attention "
        f"{_text(raw, 'inside')}. Rollout less raw attention: {_text(own, 'advantage')} (n = {int(own['n_boxes'])} boxes)."
    )
    tower = tables.get("vision")
    if tower is not None and tower["n_boxes"].max() > 0:
        first = tower.iloc[0]
        text += (
            f" In the vision tower, from {first['place']}, {_text(first, 'inside')} falls on the named objects, which cover "
            f"{first['area']:.2f}."
        )
    return text


def _text(row: pd.Series[Any], name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
