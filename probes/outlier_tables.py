"""Tables of overlap, influence and agreement of outlier tokens, and of the maps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probes.outlier_data import (
    QUERIES,
    Mask,
    Settings,
    Tokens,
    intervals,
    mean_intervals,
)
from probes.outlier_definitions import expected_jaccard
from slitlamp.evaluation.statistics import FloatArray, Interval, cluster_bootstrap, ratio
from slitlamp.tracing.probe import Array

N_SIZES = 64
"""At how many sizes i the overlap is given where there are more image tokens than that."""


def overlap_curve(first: FloatArray, second: FloatArray) -> FloatArray:
    """H_i for i = 1..n: the share of the i largest of `first` [token] that are among the i largest of `second`.

    Ties are taken in the order of the tokens. NaN everywhere where either has missing values.
    """
    n = len(first)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return np.full(n, np.nan)
    ranks = np.empty((2, n), dtype=np.int64)
    for rank, values in zip(ranks, (first, second), strict=True):
        rank[np.argsort(-values, kind="stable")] = np.arange(n)
    both = np.bincount(
        ranks.max(axis=0), minlength=n
    ).cumsum()  # a token is in both sets once i is above both its ranks
    shares: FloatArray = both / np.arange(1, n + 1)
    return shares


def sizes_of(n: int) -> NDArray[np.int64]:
    """The sizes i at which the overlap of n tokens is given: all, or the first 16 and then evenly up to n; 0 fills up."""
    if n <= N_SIZES:
        return np.pad(np.arange(1, n + 1), (0, N_SIZES - n))
    return np.concatenate([np.arange(1, 17), np.linspace(16, n, N_SIZES - 15)[1:].round().astype(np.int64)])


def overlap_table(tokens: Tokens, settings: Settings) -> pd.DataFrame:
    """H_i of encoder and decoder, its chance level i / n, and the overlap with the decoder's attention on the next item.

    The last is a control: what is shared by all images, the middle of the image for example, gives overlap between images
    too. Items whose images have other numbers of rows and columns are not compared.
    """
    parts = tokens.parts()
    sizes = np.array([sizes_of(part.stop - part.start) for part in parts])
    index = np.maximum(sizes - 1, 0)
    chance = np.where(sizes > 0, sizes / np.diff(tokens.starts)[:, None], np.nan)
    tables = []
    for number, layer in enumerate(tokens.compared):
        for place, query in enumerate(QUERIES):
            own, other = (np.full(sizes.shape, np.nan) for _ in range(2))
            for item, part in enumerate(parts):
                following = parts[(item + 1) % len(parts)]
                seen = tokens.encoder[part, number]
                own[item] = overlap_curve(seen, tokens.decoder[part, place])[index[item]]
                if len(parts) > 1 and np.array_equal(tokens.place[part], tokens.place[following]):
                    other[item] = overlap_curve(seen, tokens.decoder[following, place])[index[item]]
            own[sizes == 0], other[sizes == 0] = np.nan, np.nan
            used = np.isfinite(own).any(axis=0)
            if not used.any():
                continue
            known = np.where(np.isfinite(own), 1.0, np.nan)[:, used]
            table = mean_intervals(own[:, used], settings, "overlap")
            table.insert(0, "i", np.nanmean(known * sizes[:, used], axis=0))
            controls = mean_intervals(other[:, used], settings, "other_item")
            table = table.assign(
                chance=np.nanmean(known * chance[:, used], axis=0),
                other_item=controls["other_item"],
                other_low=controls["low"],
                other_high=controls["high"],
            )
            heads = {"encoder": tokens.encoder_name, "encoder_layer": layer, "features": number == 0, "query": query}
            for column, value in reversed(heads.items()):
                table.insert(0, column, value)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


KINDS = ("influence", "random", "matched")
LABELS = ("object", "hallucinated")
NEIGHBOURS = "between true neighbours"


def influence_tables(
    get: Callable[[str], Array], tokens: Tokens, settings: Settings
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """F at true and at hallucinated object words with its controls, and the difference between the two kinds of words.

    Columns of the first: `influence` (tokens first in the encoder's attention), `random` (as many at random), `matched` (as
    many others, each the nearest in the decoder's attention at the end of the prompt), `chance` (their share of the tokens).
    The second gives hallucinated minus true: "within images" over images with both kinds, "between images" over all, and
    `NEIGHBOURS`, which holds the place in the text fixed: hallucinated objects come late, and attention changes along a text.
    """
    values = get("mention_influence").astype(np.float64)  # [mention, layer, kind]
    label, item = get("mention_label"), get("mention_item")
    number = {name: place for place, name in enumerate(tokens.items.tolist())}
    place = np.array([number[one] for one in item.tolist()])
    counts = np.diff(tokens.starts)
    shares = np.minimum(settings.n_influential, counts) / counts
    n_items, shape = len(tokens.items), values.shape[1:]
    sums = {name: np.zeros((n_items, *shape)) for name in LABELS}
    found = {name: np.zeros(n_items) for name in LABELS}
    for name in LABELS:
        np.add.at(sums[name], place[label == name], values[label == name])
        np.add.at(found[name], place[label == name], 1)
    rows, differences = [], []
    for layer, block in enumerate(tokens.compared):
        head = {"encoder": tokens.encoder_name, "encoder_layer": block, "features": layer == 0}
        for name in LABELS:
            if not found[name].any():
                continue
            row: dict[str, object] = {**head, "label": name}
            for kind, column in enumerate(KINDS):
                mean = _ratio_interval(sums[name][:, layer, kind], found[name], settings)
                row |= {column: mean[0], f"{column}_low": mean[1], f"{column}_high": mean[2]}
            row["chance"] = float((shares * found[name]).sum() / found[name].sum())
            row |= {"n_tokens": int(found[name].sum()), "n_items": int((found[name] > 0).sum())}
            rows.append(row)
        if all(one.any() for one in found.values()):
            for kind, column in enumerate(KINDS):
                for how in ("within images", "between images"):
                    one = _difference({name: sums[name][:, layer, kind] for name in LABELS}, found, how, settings)
                    differences.append({**head, "tokens": column, "compared": how, **one})
                beside = against_neighbours(values[:, layer, kind], get("mention_token"), label, place, n_items)
                if np.isfinite(beside).any():
                    (found_here,) = intervals(beside[:, None], settings, p_value=True)
                    numbers = _numbers(found_here)
                    n = int(np.isfinite(beside).sum())
                    differences.append({**head, "tokens": column, "compared": NEIGHBOURS, **numbers, "n_items": n})
    return pd.DataFrame(rows), pd.DataFrame(differences)


def against_neighbours(values: FloatArray, token: Array, label: Array, item: Array, n_items: int) -> FloatArray:
    """Per item, the mean over hallucinated objects between two true ones of their value minus that of the nearest true ones
    before and after, interpolated to the same token; NaN where there is none.

    Args:
        values, token, label, item: [mention]; `item` is a number.
        n_items: how many items.
    """
    found = np.full(n_items, np.nan)
    for one in range(n_items):
        here = item == one
        true, false = here & (label == "object"), here & (label == "hallucinated")
        if true.sum() < 2:
            continue
        order = np.argsort(token[true])
        places, known = token[true][order], values[true][order]
        inside = false & (token > places[0]) & (token < places[-1])
        if inside.any():
            found[one] = float((values[inside] - np.interp(token[inside], places, known)).mean())
    return found


def _ratio_interval(total: FloatArray, count: FloatArray, settings: Settings) -> tuple[float, float, float]:
    """Mean over words, whole items resampled."""
    kept = count > 0
    found = cluster_bootstrap(
        np.stack([total[kept], count[kept]], axis=1),
        lambda sums: ratio(sums[..., :1], sums[..., 1:]),
        n_resamples=settings.n_resamples,
        seed=settings.seed,
    )
    one = found[0] if isinstance(found, list) else found
    return one.value, one.low, one.high


def _difference(
    total: dict[str, FloatArray], count: dict[str, FloatArray], how: str, settings: Settings
) -> dict[str, object]:
    """Hallucinated minus true objects, with the interval, p, and the number of items."""
    both = (count["object"] > 0) & (count["hallucinated"] > 0)
    if how == "within images":
        within = ratio(total["hallucinated"], count["hallucinated"]) - ratio(total["object"], count["object"])
        if not both.any():
            return {"difference": np.nan, "low": np.nan, "high": np.nan, "p": np.nan, "n_items": 0}
        (one,), n = intervals(within[both][:, None], settings, p_value=True), int(both.sum())
    else:
        some = (count["object"] > 0) | (count["hallucinated"] > 0)
        sums = np.stack([one[name][some] for name in LABELS for one in (total, count)], axis=1)
        found = cluster_bootstrap(
            sums,
            lambda s: (ratio(s[..., 2], s[..., 3]) - ratio(s[..., 0], s[..., 1]))[..., None],
            n_resamples=settings.n_resamples,
            seed=settings.seed,
            p_value=True,
        )
        one, n = found[0] if isinstance(found, list) else found, int(some.sum())
    return {**_numbers(one), "n_items": n}


def _numbers(difference: Interval) -> dict[str, object]:
    return {"difference": difference.value, "low": difference.low, "high": difference.high, "p": difference.p}


def outliers_table(tokens: Tokens, masks: dict[str, Mask], settings: Settings) -> pd.DataFrame:
    """How many tokens each definition marks, and how much of the decoder's attention and of the objects they hold.

    `attention` is the share of the decoder's attention to image tokens at the end of the prompt, beside the share of tokens;
    `on_objects` how much of them lies on objects, beside `area`, how much of all tokens does.
    """
    rows = []
    for name, mask in masks.items():
        per_item = []
        for part in tokens.parts():
            chosen, attended, area = mask[part], tokens.decoder[part, 0], tokens.area[part]
            some = chosen.any()
            per_item.append(
                [
                    chosen.sum(),
                    chosen.mean(),
                    attended[chosen].sum() / attended.sum(),
                    area[chosen].mean() if some else np.nan,
                    area.mean() if some else np.nan,
                ]
            )
        row: dict[str, object] = {"definition": name}
        found = mean_intervals(per_item, settings)
        for column, one in zip(("tokens", "share", "attention", "on_objects", "area"), found.itertuples(), strict=True):
            row |= {column: one.mean, f"{column}_low": one.low, f"{column}_high": one.high}
        rows.append({**row, "n_items": len(per_item)})
    return pd.DataFrame(rows)


def agreement_table(tokens: Tokens, masks: dict[str, Mask], settings: Settings) -> pd.DataFrame:
    """Jaccard index of every two definitions, over the items in which both mark a token, and its chance level: the mean
    index of random sets of the same sizes.
    """
    rows = []
    names = list(masks)
    for one in range(len(names)):
        for other in range(one + 1, len(names)):
            values = []
            for part in tokens.parts():
                a, b = masks[names[one]][part], masks[names[other]][part]
                both = a.any() and b.any()
                chance = expected_jaccard(int(a.sum()), int(b.sum()), len(a))
                values.append([(a & b).sum() / (a | b).sum(), chance] if both else [np.nan, np.nan])
            array = np.array(values)
            found = intervals(np.column_stack([array, array[:, 0] - array[:, 1]]), settings)
            rows.append(
                {
                    "first": names[one],
                    "second": names[other],
                    **{"jaccard": found[0].value, "low": found[0].low, "high": found[0].high},
                    "chance": found[1].value,
                    **{"above_chance": found[2].value, "above_low": found[2].low, "above_high": found[2].high},
                    "n_items": int(np.isfinite(array[:, 0]).sum()),
                }
            )
    return pd.DataFrame(rows)


def map_tables(
    get: Callable[[str], Array], tokens: Tokens, masks: dict[str, Mask], settings: Settings
) -> dict[str, pd.DataFrame]:
    """Of the first items: attention of encoder and decoder and the outliers by place, and the pictures pixel by pixel."""
    maps, pictures = [], []
    images = get("picture")[: settings.n_maps] if settings.n_maps else np.zeros((0, 1, 1, 3))
    for item, part, image in zip(tokens.items.tolist(), tokens.parts(), images, strict=False):
        attended = tokens.decoder[part, 0]
        table = pd.DataFrame({"item": item, "row": tokens.place[part, 0], "column": tokens.place[part, 1]})
        for number, layer in enumerate(tokens.compared):
            table[f"encoder_{layer}"] = tokens.encoder[part, number]
        table["decoder"] = attended / attended.sum()
        table["norm"] = tokens.norm[part]
        for name, mask in masks.items():
            table[name] = mask[part]
        maps.append(table.assign(encoder=tokens.encoder_name))
        y, x = np.indices(image.shape[:2])
        pixels = {"item": item, "y": y.ravel(), "x": x.ravel()}
        pictures.append(
            pd.DataFrame({**pixels, **dict(zip(("red", "green", "blue"), image.reshape(-1, 3).T, strict=True))})
        )
    if not maps:
        return {}
    return {"maps": pd.concat(maps, ignore_index=True), "pictures": pd.concat(pictures, ignore_index=True)}
