"""Ways of removing the image compared: do they name the same heads, and how many heads does the outlier rule zero?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probes.head_agreement import agreement_of_means, pairwise_agreement, top_heads
from probes.head_tokens import Bootstrap
from slitlamp.evaluation.statistics import cluster_bootstrap, ratio

Array = NDArray[Any]


def contrast_tables(
    names: Sequence[str],
    maps: Array,
    selected: Array,
    layers: Array,
    groups: Array,
    *,
    k: int,
    bootstrap: Bootstrap,
) -> dict[str, pd.DataFrame]:
    """Tables `contrasts` (agreement of each pair) and `contrast_maps` (every head under every contrast).

    Args:
        names: the ways of removing the image, the primary one first.
        maps: VHD [item, contrast, layer, head] at the first token.
        selected: bool of the same shape: heads that reinforcement would pick.
        layers: [layer], their numbers.
        groups: [item], the unit of the bootstrap.
        k: how many heads count as the top ones.
        bootstrap: over items.
    """
    options: dict[str, Any] = {"k": k, "n_resamples": bootstrap.n_resamples, "seed": bootstrap.seed}
    pairs = []
    for one, two in combinations(range(len(names)), 2):
        sides = maps[:, one], groups, maps[:, two], groups
        for level, found in (
            ("mean maps", agreement_of_means(*sides, **options)),
            ("maps of one item", pairwise_agreement(*sides, same_item=True, **options)),
        ):
            pairs.append({"contrast": names[one], "other": names[two], "level": level, **found.columns()})
    tables = [
        _heads(name, maps[:, place], selected[:, place], layers, groups, k, bootstrap)
        for place, name in enumerate(names)
    ]
    primary = tables[0]["top"].to_numpy()
    for each in tables:
        each["changed"] = each["top"].to_numpy() != primary
    return {"contrasts": pd.DataFrame(pairs), "contrast_maps": pd.concat(tables, ignore_index=True)}


def _heads(
    name: str, maps: Array, selected: Array, layers: Array, groups: Array, k: int, bootstrap: Bootstrap
) -> pd.DataFrame:
    """One row per head: contrast, layer, head, vhd, low, high, rank (1: the largest), top (among the k), selected, n_items."""
    frame = head_means(maps, layers, groups, bootstrap).assign(
        contrast=name,
        selected=selected.reshape(len(maps), -1).mean(axis=0),
    )
    values = frame["vhd"].to_numpy()
    frame["rank"] = frame["vhd"].rank(ascending=False, method="first").astype(int)
    frame["top"] = top_heads(values, k)
    return frame[["contrast", "layer", "head", "vhd", "low", "high", "rank", "top", "selected", "n_items"]]


def head_means(maps: Array, layers: Array, groups: Array, bootstrap: Bootstrap) -> pd.DataFrame:
    """Mean VHD of every head over maps [item, layer, head], with its interval: layer, head, vhd, low, high, n_items."""
    n_items, n_layers, n_heads = maps.shape
    rows = np.hstack([maps.reshape(n_items, -1).astype(np.float64), np.ones((n_items, 1))])
    found = cluster_bootstrap(
        by_group(rows, groups),
        lambda total: ratio(total[..., :-1], total[..., -1:]),
        n_resamples=bootstrap.n_resamples,
        seed=bootstrap.seed,
    )
    intervals = found if isinstance(found, list) else [found]
    return pd.DataFrame(
        {
            "layer": np.repeat(layers, n_heads),
            "head": np.tile(np.arange(n_heads), n_layers),
            "vhd": [one.value for one in intervals],
            "low": [one.low for one in intervals],
            "high": [one.high for one in intervals],
            "n_items": n_items,
        }
    )


def outlier_table(
    names: Sequence[str], counts: Array, layers: Array, groups: Array, n_heads: int, bootstrap: Bootstrap
) -> pd.DataFrame:
    """How many heads the outlier rule zeroes, per contrast and layer.

    Args:
        names: the ways of removing the image.
        counts: [item, contrast, layer, 3]: heads that the rule zeroes; whose VHD is high; whose activation without the
            image is high.
        layers, groups, n_heads, bootstrap: as above.

    Returns:
        contrast, layer, zeroed (heads per item) with low and high, expected (if high VHD and high activation had nothing to
        do with each other), high_vhd and high_activation (heads per item), n_heads, n_items.
    """
    rows = []
    for place, name in enumerate(names):
        for number, layer in enumerate(layers):
            own = counts[:, place, number].astype(np.float64)
            sums = by_group(np.hstack([own, np.ones((len(own), 1))]), groups)
            found = cluster_bootstrap(
                sums,
                lambda total: ratio(total[..., :1], total[..., 3:]),
                n_resamples=bootstrap.n_resamples,
                seed=bootstrap.seed,
            )
            zeroed = found[0] if isinstance(found, list) else found
            rows.append(
                {
                    "contrast": name,
                    "layer": int(layer),
                    "zeroed": zeroed.value,
                    "low": zeroed.low,
                    "high": zeroed.high,
                    "expected": float((own[:, 1] * own[:, 2]).mean() / n_heads),
                    "high_vhd": float(own[:, 1].mean()),
                    "high_activation": float(own[:, 2].mean()),
                    "n_heads": n_heads,
                    "n_items": len(own),
                }
            )
    return pd.DataFrame(rows)


def by_group(rows: Array, groups: Array) -> Array:
    """Sums of rows [row, k] over groups: [group, k], in order of first appearance."""
    found: Array = pd.DataFrame(rows).groupby(np.asarray(groups), sort=False).sum().to_numpy(dtype=np.float64)
    return found
