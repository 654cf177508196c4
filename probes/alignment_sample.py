"""The examples that `ImplicitAlignment` keeps, and their similarities: grids of pairs by layer and space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probes.alignment_grid import Reduction, grid_intervals, mean_intervals, pooled_cosines, token_cosines, unit
from probes.alignment_space import VARIANTS, Space
from probes.alignment_states import IMAGE, MODALITIES, TEXT, item_hash
from slitlamp.tracing.probe import Array

STREAM = "stream"
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are found: over groups (images)."""

    n_resamples: int
    seed: int

    def grid(self, grids: Array, rows: Array, columns: Array, *, paired: bool) -> pd.DataFrame:
        """See `grid_intervals`."""
        return grid_intervals(grids, rows, columns, paired=paired, n_resamples=self.n_resamples, seed=self.seed)

    def mean(self, values: Array, groups: Array) -> pd.DataFrame:
        """See `mean_intervals`."""
        return mean_intervals(values, groups, n_resamples=self.n_resamples, seed=self.seed)


@dataclass(frozen=True)
class Sample:
    """What is kept of some examples.

    Attributes:
        groups: [n], the group (image) of each.
        vectors: by place, mean-pooled states [n, modality, layer, d].
        spaces: by place.
        token_groups: [m], of the fewer examples whose tokens are kept.
        tokens: float32 [m, modality, slot, layer, d], of the residual stream.
        real: bool [m, modality, slot], which slots hold a token.
        bootstrap: how intervals are found.
    """

    groups: Array
    vectors: Mapping[str, Array]
    spaces: Mapping[str, Space]
    token_groups: Array
    tokens: Array
    real: Array
    bootstrap: Bootstrap

    def halves(self, groups: Array) -> tuple[Array, Array] | None:
        """Which examples are in the first and in the second half; None with fewer than two groups.

        Halves are of groups, in an order that their names and the seed give, so that no image is in both.
        """
        names = np.unique(groups)
        if len(names) < 2:
            return None
        order = sorted(names, key=lambda name: item_hash(self.bootstrap.seed, "half", name))
        first = np.isin(groups, order[: len(names) // 2])
        return np.flatnonzero(first), np.flatnonzero(~first)

    def pooled(self, modality: int, layer: int, variant: str, place: str = STREAM, other: int | None = None) -> Array:
        """Mean-pooled states of a layer in one of the spaces, [n, d]."""
        return self.spaces[place].apply(self.vectors[place][:, modality, layer], modality, layer, variant, other)  # type: ignore[arg-type]

    def tokens_of(self, modality: int, layer: int, variant: str, other: int | None = None) -> Array:
        """The kept tokens of a layer in one of the spaces, [m, slot, d]."""
        return self.spaces[STREAM].apply(self.tokens[:, modality, :, layer], modality, layer, variant, other)  # type: ignore[arg-type]

    def n_layers(self, place: str = STREAM) -> int:
        """How many layers a place has."""
        return int(self.vectors[place].shape[2])


def _keys(n_layers: int, **constants: object) -> pd.DataFrame:
    """variant x layer, in the order of the grids."""
    table = pd.DataFrame(
        {"variant": np.repeat(VARIANTS, n_layers), "layer": np.tile(np.arange(n_layers), len(VARIANTS))}
    )
    for place, (name, value) in enumerate(constants.items()):
        table.insert(place, name, value)
    return table


def similarity(sample: Sample) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cosines of mean-pooled tokens (`avg`) at every layer in every space, and the alignment scores.

    Returns:
        The table of curves: pair, variant, layer and the columns of `grid_intervals`. Pairs are "image-text" (an image
        against a text at the same layer), "input image-text" (the image tokens of the input against a text at the layer),
        "image-image" and "text-text" (one half of the examples against the other) and "mean image-text" (the mean of all
        images against each text). And the scores, means over layers of the first two: kind "same_layer" and
        "input_layer", variant, the same columns.
    """
    n_layers, groups = sample.n_layers(), sample.groups
    curves, scores = [], []
    for pair, kind, source in (("image-text", "same_layer", None), ("input image-text", "input_layer", 0)):
        grids = np.stack(
            [
                pooled_cosines(
                    sample.pooled(IMAGE, layer if source is None else source, variant, other=layer),
                    sample.pooled(TEXT, layer, variant, other=layer if source is None else source),
                )
                for variant in VARIANTS
                for layer in range(n_layers)
            ]
        )
        found = sample.bootstrap.grid(grids, groups, groups, paired=True)
        curves.append(pd.concat([_keys(n_layers, pair=pair), found], axis=1))
        means = grids.reshape(len(VARIANTS), n_layers, *grids.shape[1:]).mean(axis=1)
        found = sample.bootstrap.grid(means, groups, groups, paired=True)
        scores.append(pd.concat([pd.DataFrame({"kind": kind, "variant": VARIANTS}), found], axis=1))
    halves = sample.halves(groups)
    if halves is not None:
        for modality, name in enumerate(MODALITIES):
            grids = np.stack(
                [
                    pooled_cosines(*(sample.pooled(modality, layer, variant)[half] for half in halves))
                    for variant in VARIANTS
                    for layer in range(n_layers)
                ]
            )
            found = sample.bootstrap.grid(grids, groups[halves[0]], groups[halves[1]], paired=False)
            curves.append(pd.concat([_keys(n_layers, pair=f"{name}-{name}"), found], axis=1))
    curves.append(_mean_image(sample))
    return pd.concat(curves, ignore_index=True), pd.concat(scores, ignore_index=True)


def _mean_image(sample: Sample) -> pd.DataFrame:
    """The mean of all images against each text: what is left of image-text similarity when no image is anything special."""
    values = np.stack(
        [
            pooled_cosines(
                sample.pooled(IMAGE, layer, variant).mean(axis=0, keepdims=True), sample.pooled(TEXT, layer, variant)
            )[0]
            for variant in VARIANTS
            for layer in range(sample.n_layers())
        ],
        axis=1,
    )
    found = sample.bootstrap.mean(values, sample.groups).assign(sd=values.std(axis=0), n_groups=len(set(sample.groups)))
    return pd.concat([_keys(sample.n_layers(), pair="mean image-text"), found], axis=1)


def inside_similarity(sample: Sample, tap: str, layers: Array) -> pd.DataFrame:
    """Image-text cosines of mean-pooled tokens at one tap inside the blocks; tap, variant, layer and `grid_intervals`."""
    grids = np.stack(
        [
            pooled_cosines(sample.pooled(IMAGE, place, variant, tap), sample.pooled(TEXT, place, variant, tap))
            for variant in VARIANTS
            for place in range(len(layers))
        ]
    )
    keys = _keys(len(layers), tap=tap)
    keys["layer"] = layers[keys["layer"]]
    return pd.concat([keys, sample.bootstrap.grid(grids, sample.groups, sample.groups, paired=True)], axis=1)


def reductions(sample: Sample, names: Sequence[Reduction]) -> pd.DataFrame:
    """Every reduction over token x token cosines, of the examples whose tokens are kept: pair, reduction, variant, layer."""
    n_layers, groups = sample.tokens.shape[3], sample.token_groups
    everything = np.arange(len(groups))
    wanted = [("image-text", IMAGE, TEXT, (everything, everything))]
    halves = sample.halves(groups)
    if halves is not None:
        wanted += [("image-image", IMAGE, IMAGE, halves), ("text-text", TEXT, TEXT, halves)]
    tables = []
    for pair, first, second, (rows, columns) in wanted:
        found: dict[Reduction, list[_Floats]] = {name: [] for name in names}
        for variant in VARIANTS:
            for layer in range(n_layers):
                grids = token_cosines(
                    sample.tokens_of(first, layer, variant)[rows],
                    sample.tokens_of(second, layer, variant)[columns],
                    sample.real[rows, first],
                    sample.real[columns, second],
                    names,
                )
                for name, grid in grids.items():
                    found[name].append(grid)
        for name, each in found.items():
            table = sample.bootstrap.grid(np.stack(each), groups[rows], groups[columns], paired=first != second)
            tables.append(pd.concat([_keys(n_layers, pair=pair, reduction=name), table], axis=1))
    return pd.concat(tables, ignore_index=True)


def token_change(sample: Sample, intervals: Sequence[int]) -> pd.DataFrame:
    """cos(state of a token, state of the same token some layers on), and of two different tokens of the same example.

    Of the examples whose tokens are kept: interval, modality, variant, layer (of the earlier state), value, low, high,
    control, control_low, control_high (different tokens; NaN where an example has one token), n_items.
    """
    tables = []
    n_layers = sample.tokens.shape[3]
    for step in intervals:
        for modality, name in enumerate(MODALITIES):
            keys, own, others = [], [], []
            count = sample.real[:, modality].sum(axis=1)
            for variant in VARIANTS:
                for layer in range(n_layers - step):
                    mask = sample.real[:, modality, :, None]
                    before = np.where(mask, unit(sample.tokens_of(modality, layer, variant, layer + step)), 0.0)
                    after = np.where(mask, unit(sample.tokens_of(modality, layer + step, variant, layer)), 0.0)
                    same = (before * after).sum(axis=(1, 2))
                    all_pairs = (before.sum(axis=1) * after.sum(axis=1)).sum(axis=1)
                    keys.append((step, name, variant, layer))
                    own.append(same / count)
                    others.append((all_pairs - same) / np.where(count > 1, count * (count - 1), np.nan))
            found = sample.bootstrap.mean(np.stack(own, axis=1), sample.token_groups)
            control = sample.bootstrap.mean(np.stack(others, axis=1), sample.token_groups)
            found[["control", "control_low", "control_high"]] = control[["value", "low", "high"]]
            tables.append(
                pd.concat([pd.DataFrame(keys, columns=["interval", "modality", "variant", "layer"]), found], axis=1)
            )
    return pd.concat(tables, ignore_index=True)
