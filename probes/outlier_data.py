"""What `ClsOutliers` gathered, item by item, and means over items with their intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray

from probes.outlier_definitions import norm_outliers, norm_valley, top_tokens
from slitlamp.evaluation.statistics import FloatArray, Interval, cluster_bootstrap, ratio
from slitlamp.tracing.probe import Array

CLS = "CLS attention"
RECEIVED = "mean attention received"
QUERIES = ("end of the prompt", "true objects", "hallucinated objects")
"""At which positions the decoder's attention was taken; the last two are means over the object words of an item."""

TOP = "first in the encoder's attention"
NORM = "norm above mean + sd"
VALLEY = "norm above the valley"
SINK = "attention sink of the decoder"
DEFINITIONS = (TOP, NORM, VALLEY, SINK)

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Settings:
    """The parameters of the probe that its tables depend on."""

    top_k: int
    n_influential: int
    n_sd: float
    sink_threshold: float
    n_maps: int
    seed: int
    n_resamples: int


@dataclass(frozen=True, eq=False)
class Tokens:
    """One number per image token and quantity, of all items.

    Attributes:
        items: [item].
        starts: [item + 1], where the tokens of each item start.
        place: int [token, 3]: row, column, and number among the item's image tokens.
        encoder: [token, compared layer], shares of attention.
        norm, sink, area: [token]: norm of the features, phi(x), share of the token that lies on an object.
        decoder: [token, query of `QUERIES`].
        compared: the layers of the tower that are compared.
        encoder_name: `CLS` or `RECEIVED`.
    """

    items: Array
    starts: Array
    place: Array
    encoder: FloatArray
    norm: FloatArray
    sink: FloatArray
    decoder: FloatArray
    area: FloatArray
    compared: list[int]
    encoder_name: str

    @staticmethod
    def of(get: Callable[[str], Array]) -> Tokens:
        """From what was gathered."""
        values, compared = get("token_values").astype(np.float64), get("compared").tolist()
        n = len(compared)
        return Tokens(
            items=get("item"),
            starts=np.concatenate([[0], np.cumsum(get("n_tokens"))]),
            place=get("token_place"),
            encoder=values[:, :n],
            norm=values[:, n],
            sink=values[:, n + 1],
            decoder=values[:, n + 2 : n + 2 + len(QUERIES)],
            area=values[:, -1],
            compared=compared,
            encoder_name=str(get("encoder")),
        )

    def parts(self) -> list[slice]:
        """The tokens of each item."""
        return [slice(int(start), int(end)) for start, end in zip(self.starts[:-1], self.starts[1:], strict=True)]


def outlier_masks(tokens: Tokens, settings: Settings, valley: float) -> dict[str, Mask]:
    """bool [token] by definition: which tokens are outliers; `VALLEY` is left out where there is no valley."""
    top, norm = np.zeros(len(tokens.norm), dtype=bool), np.zeros(len(tokens.norm), dtype=bool)
    for part in tokens.parts():
        top[part] = top_tokens(torch.from_numpy(tokens.encoder[part, 0]), settings.top_k).numpy()
        norm[part] = norm_outliers(torch.from_numpy(tokens.norm[part]), settings.n_sd).numpy()
    found = {TOP: top, NORM: norm, VALLEY: tokens.norm > valley, SINK: tokens.sink >= settings.sink_threshold}
    if np.isnan(valley):
        found.pop(VALLEY)
    return found


def features_valley(get: Callable[[str], Array]) -> float:
    """The valley of the norms of the features that the model reads; NaN where they have one mode."""
    layers = get("tower_layers").tolist()
    return norm_valley(get("tower_histogram")[layers.index(int(get("compared")[0]))])


class Resampling(Protocol):
    """Parameters of a bootstrap over items."""

    @property
    def n_resamples(self) -> int:
        """How many resamples."""

    @property
    def seed(self) -> int:
        """Of the resampling."""


def mean_intervals(values: ArrayLike, settings: Resampling, name: str = "mean") -> pd.DataFrame:
    """The mean over items of each column of [item, k], missing ones left out: `name`, low, high, n_items; one row per column."""
    found = intervals(np.asarray(values, dtype=np.float64), settings)
    return pd.DataFrame(
        {
            name: [one.value for one in found],
            "low": [one.low for one in found],
            "high": [one.high for one in found],
            "n_items": np.isfinite(np.asarray(values, dtype=np.float64)).sum(axis=0),
        }
    )


def intervals(values: FloatArray, settings: Resampling, *, p_value: bool = False) -> list[Interval]:
    """Means over items of [item, k] with their bootstrap intervals; NaN is left out."""
    known = np.isfinite(values)
    width = values.shape[1]
    found = cluster_bootstrap(
        np.hstack([np.where(known, values, 0), known]),
        lambda total: ratio(total[..., :width], total[..., width:]),
        n_resamples=settings.n_resamples,
        seed=settings.seed,
        p_value=p_value,
    )
    return found if isinstance(found, list) else [found]
