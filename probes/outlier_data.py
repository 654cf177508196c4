"""What `ClsOutliers` gathered, token by token, and which tokens are outliers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from probes.outlier_definitions import norm_outliers, norm_valley, top_tokens
from slitlamp.evaluation.statistics import FloatArray
from slitlamp.tracing.probe import Array

CLS = "CLS attention"
RECEIVED = "mean attention received"
QUERIES = ("end of the prompt", "true objects", "hallucinated objects")
"""At which positions the decoder's attention was taken; the last two are means over the object words of an item."""

TOP = "first in the encoder's attention"
NORM = "norm above mean + sd"
THRESHOLD = "norm above the threshold"
SINK = "attention sink of the decoder"

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Tokens:
    """One number per image token and quantity, of all items.

    Attributes:
        items: [item].
        group: [item], its image.
        starts: [item + 1], where the tokens of each item start.
        place: int [token, 3]: row, column, and number among the item's image tokens.
        encoder: [token, compared layer], shares of attention.
        norm, sink, area: [token]: norm of the features, phi(x), share of the token that lies on an object.
        decoder: [token, query of `QUERIES`].
        compared: the layers of the tower that are compared.
        encoder_name: `CLS` or `RECEIVED`.
    """

    items: Array
    group: Array
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
            group=get("group"),
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


def outlier_masks(
    tokens: Tokens, threshold: float, *, top_k: int, n_sd: float, sink_threshold: float
) -> dict[str, Mask]:
    """bool [token] by definition: which tokens are outliers; `THRESHOLD` is left out where it is NaN."""
    top, norm = np.zeros(len(tokens.norm), dtype=bool), np.zeros(len(tokens.norm), dtype=bool)
    for part in tokens.parts():
        top[part] = top_tokens(torch.from_numpy(tokens.encoder[part, 0]), top_k).numpy()
        norm[part] = norm_outliers(torch.from_numpy(tokens.norm[part]), n_sd).numpy()
    found = {TOP: top, NORM: norm, THRESHOLD: tokens.norm > threshold, SINK: tokens.sink >= sink_threshold}
    if np.isnan(threshold):
        found.pop(THRESHOLD)
    return found


def features_valley(get: Callable[[str], Array]) -> float:
    """The valley of the norms of the features that the model reads; NaN where they have one mode."""
    layers = get("tower_layers").tolist()
    return norm_valley(get("tower_histogram")[layers.index(int(get("compared")[0]))])
