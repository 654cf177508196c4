"""Tables of `ImplicitAlignment` that are means over items: norms, changes, vocabulary, massive dimensions, points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from probes.alignment_sample import STREAM, Bootstrap, Sample
from probes.alignment_states import IMAGE, MODALITIES, TEXT
from probes.alignment_vocabulary import KL_PAIRS, TOP
from slitlamp.evaluation.statistics import cluster_bootstrap, ratio
from slitlamp.tracing.probe import Array

Embedding = Literal["tsne", "pca", "none"]


def labelled(values: Array, axes: Mapping[str, Sequence[object]], groups: Array, bootstrap: Bootstrap) -> pd.DataFrame:
    """Means over items [item, *axes] with intervals, one row per place on the axes that any item has."""
    keys = pd.MultiIndex.from_product(list(axes.values()), names=list(axes)).to_frame(index=False)
    flat = values.reshape(len(values), -1)
    there = ~np.isnan(flat).all(axis=0)
    found = bootstrap.mean(flat[:, there], groups)
    return pd.concat([keys[there].reset_index(drop=True), found], axis=1)


def norms(values: Array, groups: Array, bootstrap: Bootstrap) -> pd.DataFrame:
    """Median token norm of each modality, and the ratio of image to text: [item, modality, layer] to modality, layer, value."""
    layers = list(range(values.shape[2]))
    table = labelled(values, {"modality": MODALITIES, "layer": layers}, groups, bootstrap)
    names, index = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(names), 2 * len(layers)))
    np.add.at(sums, index, values.reshape(len(values), -1).astype(np.float64))
    found = cluster_bootstrap(
        sums,
        lambda total: ratio(*np.split(total, 2, axis=-1)),
        n_resamples=bootstrap.n_resamples,
        seed=bootstrap.seed,
    )
    assert isinstance(found, list)
    rows = [
        {"modality": "image / text", "layer": layer, "value": one.value, "low": one.low, "high": one.high}
        for layer, one in zip(layers, found, strict=True)
    ]
    return pd.concat([table, pd.DataFrame(rows).assign(n_items=len(values))], ignore_index=True)


def massive_dimensions(sample: Sample) -> pd.DataFrame:
    """Per layer of the residual stream: what "removed" removes, and how much of the mean square one dimension holds."""
    space = sample.spaces[STREAM]
    total = space.power.sum(axis=1)
    return pd.DataFrame(
        {
            "layer": np.arange(len(total)),
            "n_removed": space.removed.sum(axis=1),
            "dimensions": [" ".join(str(one) for one in np.flatnonzero(row)) for row in space.removed],
            "removed_share": ratio((space.power * space.removed).sum(axis=1), total),
            "largest_dimension": space.power.argmax(axis=1),
            "largest_share": ratio(space.power.max(axis=1), total),
            "largest_to_median": ratio(np.sqrt(space.power.max(axis=1)), np.sqrt(np.median(space.power, axis=1))),
        }
    )


def histogram(top: Array, texts: Array, groups: Array, bootstrap: Bootstrap, n_ids: int) -> pd.DataFrame:
    """The vocabulary that tokens are read as: shares of tokens with an id as their most probable, or among the five.

    Args:
        top: ids [item, modality, slot, layer, 5], -1 where there is no token.
        texts: the tokenizer's text of every id.
        groups, bootstrap: of the intervals.
        n_ids: how many ids to list per layer and modality, the most frequent.

    Returns:
        layer, modality, top (1 or 5), rank, id, token, value (mean over items of the share of tokens), low, high, n_items.
    """
    tables = []
    for layer in range(top.shape[3]):
        for modality, name in enumerate(MODALITIES):
            for depth in (1, TOP):
                ids = top[:, modality, :, layer, :depth]
                count = (ids[..., 0] >= 0).sum(axis=1)
                there = ids >= 0
                # by the mean share, to which every item adds the same however many tokens it has
                totals = np.bincount(ids[there], weights=np.broadcast_to(1 / count[:, None, None], ids.shape)[there])
                listed = np.argsort(-totals, kind="stable")[:n_ids]
                listed = listed[totals[listed] > 0]
                shares = np.stack([(ids == one).any(axis=2).sum(axis=1) / count for one in listed], axis=1)
                table = bootstrap.mean(shares, groups)
                keys = {
                    "layer": layer,
                    "modality": name,
                    "top": depth,
                    "rank": np.arange(1, len(listed) + 1),
                    "id": listed,
                    "token": texts[listed].astype(object),
                }
                tables.append(pd.concat([pd.DataFrame(keys), table], axis=1))
    return pd.concat(tables, ignore_index=True)


def divergences(values: Array, groups: Array, bootstrap: Bootstrap) -> pd.DataFrame:
    """KL between pooled distributions [item, pair, layer]: pair, layer, value (nats), low, high, n_items."""
    return labelled(values, {"pair": KL_PAIRS, "layer": range(values.shape[2])}, groups, bootstrap)


def entropies(values: Array, groups: Array, bootstrap: Bootstrap, n_vocabulary: int) -> pd.DataFrame:
    """Entropies [item, kind, modality, layer]: kind, modality, layer, value (nats), low, high, n_items, uniform (the most)."""
    axes = {
        "kind": ("of a token", "pooled"),
        "modality": MODALITIES,
        "layer": range(values.shape[3]),
    }
    return labelled(values, axes, groups, bootstrap).assign(uniform=np.log(n_vocabulary))


def points(sample: Sample, layers: Sequence[int], n_tokens: int, embedding: Embedding, seed: int) -> pd.DataFrame:
    """Tokens of both modalities in two dimensions: layer, modality, pc1, pc2, explained (share of variance), tsne1, tsne2.

    At most `n_tokens` of each modality, drawn once and followed through the layers. PCA (and t-SNE on the first 30
    components) of each layer by itself, raw states.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rng = np.random.default_rng(seed)
    chosen = []
    for modality in (IMAGE, TEXT):
        places = np.argwhere(sample.real[:, modality])
        kept = np.sort(rng.permutation(len(places))[:n_tokens])
        chosen.append(places[kept])
    names = np.repeat(MODALITIES, [len(one) for one in chosen])
    tables = []
    for layer in layers:
        values = np.concatenate(
            [sample.tokens[one[:, 0], modality, one[:, 1], layer] for modality, one in enumerate(chosen)]
        ).astype(np.float64)
        n_components = min(30, len(values), values.shape[1])
        pca = PCA(n_components=n_components, svd_solver="full").fit(values)
        scores = pca.transform(values)
        table = pd.DataFrame(
            {
                "layer": layer,
                "modality": names,
                "pc1": scores[:, 0],
                "pc2": scores[:, 1],
                "explained": pca.explained_variance_ratio_[:2].sum(),
            }
        )
        if embedding == "tsne":
            perplexity = min(30.0, (len(values) - 1) / 3)
            where = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(scores)
            table["tsne1"], table["tsne2"] = where[:, 0].astype(np.float64), where[:, 1].astype(np.float64)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def summary(tables: Mapping[str, pd.DataFrame], missing: Sequence[str]) -> str:
    """What was found, in two sentences; `missing` are the taps that this family lacks."""
    scores = tables["ima"].set_index(["kind", "variant"])
    one, clean = scores.loc[("same_layer", "raw")], scores.loc[("same_layer", "removed")]
    curve = tables["similarity"].query("pair == 'image-text' and variant == 'removed'")
    n_removed = int(tables["massive"]["n_removed"].sum())
    without = f"{clean['value']:.2f} without {n_removed} massive dimensions" if n_removed else "no massive dimension"
    ratios = tables["norms"].query("modality == 'image / text' and layer == 0").iloc[0]
    text = (
        f"Image-text cosine, mean over layers: {one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}] ({without}), from "
        f"{curve['value'].iloc[0]:.3f} at the input to {curve['value'].iloc[-1]:.3f} after the last block; an image and "
        f"its own text minus another's: {clean['difference']:.4f} [{clean['difference_low']:.4f}, "
        f"{clean['difference_high']:.4f}] (n = {int(one['n_items'])})."
    )
    absent = f" This family has no {', '.join(missing)}." if missing else ""
    return (
        f"{text} Image tokens enter at {ratios['value']:.2f} [{ratios['low']:.2f}, {ratios['high']:.2f}] times the norm of "
        f"text.{absent}"
    )
