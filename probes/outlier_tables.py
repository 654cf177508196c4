"""Tables of overlap, influence and agreement of outlier tokens, and of the maps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probes.image_means import Images
from probes.outlier_data import QUERIES, Mask, Tokens
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


def overlap_table(tokens: Tokens, images: Images) -> pd.DataFrame:
    """H_i of encoder and decoder, its chance level i / n, and the overlap with the decoder's attention on the next image.

    The last is a control: what is shared by all images, the middle of the image for example, gives overlap between images
    too. Compared is the next item that has another image; not where that image has other numbers of rows and columns.
    """
    parts = tokens.parts()
    sizes = np.array([sizes_of(part.stop - part.start) for part in parts])
    index = np.maximum(sizes - 1, 0)
    chance = np.where(sizes > 0, sizes / np.diff(tokens.starts)[:, None], np.nan)
    following = next_images(tokens.group)
    tables = []
    for number, layer in enumerate(tokens.compared):
        for place, query in enumerate(QUERIES):
            own, other = (np.full(sizes.shape, np.nan) for _ in range(2))
            for item, part in enumerate(parts):
                beside = parts[following[item]]
                seen = tokens.encoder[part, number]
                own[item] = overlap_curve(seen, tokens.decoder[part, place])[index[item]]
                if following[item] != item and np.array_equal(tokens.place[part], tokens.place[beside]):
                    other[item] = overlap_curve(seen, tokens.decoder[beside, place])[index[item]]
            own[sizes == 0], other[sizes == 0] = np.nan, np.nan
            used = np.isfinite(own).any(axis=0)
            if not used.any():
                continue
            known = np.where(np.isfinite(own), 1.0, np.nan)[:, used]
            table = images.table(own[:, used], "overlap")
            table.insert(0, "i", np.nanmean(known * sizes[:, used], axis=0))
            controls = images.table(other[:, used], "other_image")
            table = table.assign(
                chance=np.nanmean(known * chance[:, used], axis=0),
                other_image=controls["other_image"],
                other_low=controls["low"],
                other_high=controls["high"],
            )
            heads = {"encoder": tokens.encoder_name, "encoder_layer": layer, "features": number == 0, "query": query}
            for column, value in reversed(heads.items()):
                table.insert(0, column, value)
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def next_images(group: Array) -> NDArray[np.int64]:
    """Per item, the number of the next item that has another image (round the end); its own number where there is none."""
    found = np.arange(len(group))
    for item in range(len(group)):
        others = np.flatnonzero(np.roll(group, -item) != group[item])
        if len(others):
            found[item] = (item + others[0]) % len(group)
    return found


KINDS = ("influence", "random", "matched")
LABELS = ("object", "hallucinated")
NEIGHBOURS = "between true neighbours"


def influence_tables(
    get: Callable[[str], Array], tokens: Tokens, images: Images, n_influential: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """F at true and at hallucinated object words with its controls, and the difference between the two kinds of words.

    Columns of the first: `influence` (tokens first in the encoder's attention), `random` (as many at random), `matched` (as
    many others, each the nearest in the decoder's attention at the end of the prompt), `chance` (their share of the tokens).
    The second gives hallucinated minus true: "within images" over images with both kinds, "between images" over all, and
    `NEIGHBOURS`, which holds the place in the text fixed: hallucinated objects come late, and attention changes along a text.
    """
    values = get("mention_influence").astype(np.float64)  # [mention, layer, kind]
    label, token = get("mention_label"), get("mention_token")
    number = {name: place for place, name in enumerate(tokens.items.tolist())}
    item = np.array([number[one] for one in get("mention_item").tolist()])
    counts = np.diff(tokens.starts)
    chance = (np.minimum(n_influential, counts) / counts)[item]
    by_mention = Images(tokens.group[item], images.n_resamples, images.seed)
    total = {name: by_mention.sums(values * (label == name)[:, None, None]) for name in LABELS}  # [image, layer, kind]
    found = {name: by_mention.sums((label == name).astype(np.float64)) for name in LABELS}  # [image]
    rows, differences = [], []
    for layer, block in enumerate(tokens.compared):
        head = {"encoder": tokens.encoder_name, "encoder_layer": block, "features": layer == 0}
        for name in LABELS:
            here = label == name
            if not here.any():
                continue
            row: dict[str, object] = {**head, "label": name}
            for one, column in zip(by_mention.only(here).means(values[here, layer]), KINDS, strict=True):
                row |= {column: one.value, f"{column}_low": one.low, f"{column}_high": one.high}
            row["chance"] = float(chance[here].mean())
            rows.append({**row, "n_tokens": int(here.sum()), "n_images": int((found[name] > 0).sum())})
        if all(one.any() for one in found.values()):
            for kind, column in enumerate(KINDS):
                for how in ("within images", "between images"):
                    numbers = _difference({name: total[name][:, layer, kind] for name in LABELS}, found, how, images)
                    differences.append({**head, "tokens": column, "compared": how, **numbers})
                beside = against_neighbours(values[:, layer, kind], token, label, item, len(tokens.items))
                known = np.isfinite(beside)
                if known.any():
                    numbers = _numbers(images.only(known).means(beside[known, None], p_value=True)[0])
                    differences.append({**head, "tokens": column, "compared": NEIGHBOURS, **numbers})
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


def _difference(
    total: dict[str, FloatArray], count: dict[str, FloatArray], how: str, images: Images
) -> dict[str, object]:
    """Hallucinated minus true objects of [image], with the interval, p, and the number of images."""
    chosen = [count[name] > 0 for name in LABELS]
    kept = chosen[0] & chosen[1] if how == "within images" else chosen[0] | chosen[1]
    sums = np.stack([one[name][kept] for name in LABELS for one in (total, count)], axis=1)
    if not kept.any():
        return _numbers(Interval(np.nan, np.nan, np.nan, 0, p=np.nan))
    if how == "within images":
        sums = np.stack([sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1], np.ones(len(sums))], axis=1)
    found = cluster_bootstrap(
        sums,
        lambda s: (
            ratio(s[..., 0], s[..., 1])
            if how == "within images"
            else ratio(s[..., 2], s[..., 3]) - ratio(s[..., 0], s[..., 1])
        ),
        n_resamples=images.n_resamples,
        seed=images.seed,
        p_value=True,
    )
    assert isinstance(found, Interval)
    return _numbers(found)


def _numbers(one: Interval) -> dict[str, object]:
    return {"difference": one.value, "low": one.low, "high": one.high, "p": one.p, "n_images": one.n}


def outliers_table(tokens: Tokens, masks: dict[str, Mask], images: Images) -> pd.DataFrame:
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
        found = images.table(per_item)
        for column, one in zip(("tokens", "share", "attention", "on_objects", "area"), found.itertuples(), strict=True):
            row |= {column: one.mean, f"{column}_low": one.low, f"{column}_high": one.high}
        rows.append({**row, "n_items": len(per_item)})
    return pd.DataFrame(rows)


def agreement_table(tokens: Tokens, masks: dict[str, Mask], images: Images) -> pd.DataFrame:
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
            found = images.means(np.column_stack([array, array[:, 0] - array[:, 1]]))
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
    get: Callable[[str], Array], tokens: Tokens, masks: dict[str, Mask], n_maps: int
) -> dict[str, pd.DataFrame]:
    """Of the first items: attention of encoder and decoder and the outliers by place, and the pictures pixel by pixel."""
    maps, pictures = [], []
    kept = get("picture")[:n_maps] if n_maps else np.zeros((0, 1, 1, 3))
    for item, part, image in zip(tokens.items.tolist(), tokens.parts(), kept, strict=False):
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
