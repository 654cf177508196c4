"""Tables of outliers by layer: norms and their histograms, massive activations, attention sinks, concentration."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from scipy.stats import norm

from probes.image_means import Images
from probes.outlier_definitions import bin_edges, norm_valley
from slitlamp.tracing.probe import Array

Get = Callable[[str], Array]
STREAMS = ("tower", "decoder")


def norms_table(get: Get, images: Images, n_sd: float) -> pd.DataFrame:
    """Per layer of tower and decoder: median norm of the image tokens, largest over median (mean over items with its interval,
    and the largest of all), the share above mean + sd (beside that of a normal distribution), and the valley of the histogram
    (NaN: there is none).
    """
    tables = []
    for stream in STREAMS:
        ratios = get(f"{stream}_norm_ratio").astype(np.float64)
        above = images.table(get(f"{stream}_norm_above"), "above")
        histogram = get(f"{stream}_histogram")
        valleys = np.array([norm_valley(one) for one in histogram])
        upper = [
            one[bin_edges()[:-1] >= valley].sum() / one.sum() if np.isfinite(valley) else np.nan
            for one, valley in zip(histogram, valleys, strict=True)
        ]
        table = images.table(ratios, "max_over_median")
        table.insert(0, "median", np.median(get(f"{stream}_norm_median"), axis=0))
        table.insert(0, "layer", get(f"{stream}_layers"))
        table.insert(0, "stream", stream)
        tables.append(
            table.assign(
                largest_ratio=ratios.max(axis=0),
                above=above["above"],
                above_low=above["low"],
                above_high=above["high"],
                above_if_gaussian=float(norm.sf(n_sd)),
                valley=valleys,
                above_valley=upper,
            )
        )
    return pd.concat(tables, ignore_index=True)


def histogram_table(get: Get) -> pd.DataFrame:
    """Norms of image tokens of all items: per layer, the share of tokens in each bin that is not empty."""
    tables = []
    edges = bin_edges()
    for stream in STREAMS:
        counts = get(f"{stream}_histogram")
        for layer, one in zip(get(f"{stream}_layers").tolist(), counts, strict=True):
            used = np.flatnonzero(one)
            bins = {"from": edges[used], "to": edges[used + 1], "share": one[used] / one.sum(), "n_tokens": one[used]}
            tables.append(pd.DataFrame({"stream": stream, "layer": layer, **bins}))
    return pd.concat(tables, ignore_index=True)


def massive_table(get: Get) -> pd.DataFrame:
    """Per layer: the largest absolute value of any item, where it was, how many times the median of its hidden state, and in
    how many items some value is massive; `dimensions` names those that are, with the share of items.
    """
    rows = []
    for stream in STREAMS:
        largest, median = get(f"{stream}_largest").astype(np.float64), get(f"{stream}_median_size").astype(np.float64)
        n_massive, by_dimension = get(f"{stream}_n_massive"), get(f"{stream}_massive")
        for place, layer in enumerate(get(f"{stream}_layers").tolist()):
            top = int(largest[:, place].argmax())
            found = np.flatnonzero(by_dimension[place])
            most = found[np.argsort(-by_dimension[place, found], kind="stable")][:8]
            rows.append(
                {
                    "stream": stream,
                    "layer": layer,
                    "largest": largest[top, place],
                    "dimension": int(get(f"{stream}_dimension")[top, place]),
                    "token": str(get(f"{stream}_kind")[top, place]),
                    "times_median": largest[top, place] / median[top, place],
                    "items_with_massive": float((n_massive[:, place] > 0).mean()),
                    "n_dimensions": len(found),
                    "dimensions": ", ".join(f"{one} ({by_dimension[place, one] / len(largest):.0%})" for one in most),
                    "n_items": len(largest),
                }
            )
    return pd.DataFrame(rows)


def sinks_table(get: Get, images: Images) -> pd.DataFrame:
    """Per layer of the decoder, how many image tokens are attention sinks: mean over items."""
    table = images.table(get("n_sinks"), "sinks")
    table.insert(0, "layer", get("decoder_layers"))
    return table


def concentration_table(get: Get, images: Images) -> pd.DataFrame:
    """Per layer of the tower: the share of the encoder's attention on the first patches beside that of as many patches, and
    its share on objects beside their share of the area (items with known boxes).
    """
    table = images.table(get("top_share"), "top_share")
    on_objects, area = get("on_objects").astype(np.float64), get("area").astype(np.float64)
    objects = images.table(on_objects, "on_objects")
    above = images.table(on_objects - area[:, None], "above")
    known = np.isfinite(area)
    layers = get("tower_layers")
    table.insert(0, "layer", layers)
    table.insert(0, "encoder", str(get("encoder")))
    return table.assign(
        chance=float(get("top_chance").mean()),
        features=layers == get("compared")[0],
        on_objects=objects["on_objects"],
        on_objects_low=objects["low"],
        on_objects_high=objects["high"],
        area=area[known].mean() if known.any() else np.nan,
        above_area=above["above"],
        above_low=above["low"],
        above_high=above["high"],
        n_with_boxes=int(known.sum()),
    )
