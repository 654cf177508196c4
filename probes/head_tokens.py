"""T-VHD by kind of word and by kind of sentence, and how well it tells hallucinated from true objects (figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd

from slitlamp.errors import unknown
from slitlamp.evaluation.detection import auroc_interval
from slitlamp.evaluation.statistics import Interval, cluster_bootstrap, ratio

OBJECT, HALLUCINATED, OTHER, UNKNOWN = "object", "hallucinated", "other", ""
SentenceMean = Literal["tokens", "objects"]
SENTENCE_MEANS: tuple[str, ...] = get_args(SentenceMean)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: resamples of items, and the seed."""

    n_resamples: int
    seed: int

    def mean(self, rows: pd.DataFrame, column: str) -> Interval:
        """The mean of a column over rows, with an interval over the items in `group`."""
        sums = rows.groupby("group")[column].agg(["sum", "count"]).to_numpy(dtype=np.float64)
        found = cluster_bootstrap(
            sums, lambda total: ratio(total[..., 0], total[..., 1]), n_resamples=self.n_resamples, seed=self.seed
        )
        assert isinstance(found, Interval)
        return found


def check_sentence_means(kinds: Sequence[str]) -> None:
    """Refuse an unknown way of taking the mean over a sentence.

    Raises:
        UnknownNameError: not one of `SENTENCE_MEANS`.
    """
    for one in kinds:
        if one not in SENTENCE_MEANS:
            raise unknown("mean over a sentence", one, SENTENCE_MEANS)


def sentences(tokens: pd.DataFrame, ends: str, means: Sequence[str]) -> pd.DataFrame:
    """T-VHD of sentences: the mean over their tokens.

    A sentence ends with a token that ends in one of the characters of `ends`. It is "hallucinated" if it holds a
    hallucinated object, "object" if all its objects are true, "other" without an object.

    Args:
        tokens: columns item, group, token, word, label, t_vhd_...; tokens without a label (end tokens) belong to none.
        ends: characters that end a sentence.
        means: "tokens" for the mean over all tokens, "objects" for that over first tokens of objects alone.

    Returns:
        A row per sentence and mean: item, group, sentence (from 0), label, mean_over, n_tokens (averaged), t_vhd_...
    """
    known = tokens[tokens["label"] != UNKNOWN]
    last = known["word"].str.strip().str.endswith(tuple(ends)).astype(int)
    number = last.groupby(known["item"], sort=False).cumsum() - last
    known = known.assign(sentence=number, hallucinated=known["label"] == HALLUCINATED, true=known["label"] == OBJECT)
    keys = ["item", "group", "sentence"]
    columns = [str(name) for name in tokens if str(name).startswith("t_vhd_")]
    holds = known.groupby(keys, sort=False)[["hallucinated", "true"]].any()
    label = np.select([holds["hallucinated"], holds["true"]], [HALLUCINATED, OBJECT], OTHER)
    parts = []
    for kind in means:
        rows = known if kind == "tokens" else known[known["hallucinated"] | known["true"]]
        grouped = rows.groupby(keys, sort=False)
        part = grouped[columns].mean().join(grouped.size().rename("n_tokens"))
        part = part.join(pd.Series(label, index=holds.index, name="label")).reset_index()
        parts.append(part.assign(mean_over=kind))
    whole = pd.concat(parts, ignore_index=True)
    return whole[[*keys, "label", "mean_over", "n_tokens", *columns]]


def means_by_label(rows: pd.DataFrame, bootstrap: Bootstrap, unit: str) -> pd.DataFrame:
    """Mean T-VHD of each kind of word or sentence: k, label, mean, low, high, n_<unit>, n_items."""
    found = []
    for k, column in columns_by_k(rows).items():
        for label, part in rows[rows["label"] != UNKNOWN].groupby("label"):
            mean = bootstrap.mean(part, column)
            found.append((k, label, mean.value, mean.low, mean.high, len(part), mean.n))
    return pd.DataFrame(found, columns=["k", "label", "mean", "low", "high", f"n_{unit}", "n_items"])


def areas(rows: pd.DataFrame, bootstrap: Bootstrap, place: str) -> pd.DataFrame:
    """How well low T-VHD tells hallucinated from true objects, and how much of that their place in the caption explains.

    Hallucinated objects come late, and T-VHD falls along a caption. So beside the area of T-VHD stand that of a late place
    alone, and that of T-VHD less its mean at the place, true and hallucinated objects together.

    Args:
        rows: columns group, label, `place` and t_vhd_...
        bootstrap: over items.
        place: the column of the place.

    Returns:
        Per k: auroc, low, high, place_auroc, place_low, place_high, adjusted_auroc, adjusted_low, adjusted_high,
        n_hallucinated, n_true, n_items. Chance is .5.
    """
    named = rows[rows["label"].isin([OBJECT, HALLUCINATED])]
    found = []
    if len(named):
        late = _area(named, named[place], bootstrap, "place_")
        n_bad = int((named["label"] == HALLUCINATED).sum())
        counts = {"n_hallucinated": n_bad, "n_true": len(named) - n_bad, "n_items": named["group"].nunique()}
        for k, column in columns_by_k(rows).items():
            gap = named[column] - named.groupby(place)[column].transform("mean")
            own, adjusted = _area(named, -named[column], bootstrap), _area(named, -gap, bootstrap, "adjusted_")
            found.append({"k": k, **own, **late, **adjusted, **counts})
    return pd.DataFrame(found)


def with_mention(tokens: pd.DataFrame) -> pd.DataFrame:
    """The tokens that name an object, with the column `mention`: which mention of its caption each is, from 1."""
    named = tokens[tokens["label"].isin([OBJECT, HALLUCINATED])]
    return named.assign(mention=named.groupby("item", sort=False).cumcount() + 1)


def columns_by_k(rows: pd.DataFrame) -> dict[int, str]:
    """The columns of T-VHD by their number of heads."""
    names = [str(name) for name in rows if str(name).startswith("t_vhd_")]
    return {int(name.removeprefix("t_vhd_")): name for name in names}


def _area(named: pd.DataFrame, score: pd.Series[float], bootstrap: Bootstrap, prefix: str = "") -> dict[str, float]:
    one = auroc_interval(
        score.to_numpy(dtype=np.float64),
        (named["label"] == HALLUCINATED).to_numpy(),
        named["group"].to_numpy(dtype=str),
        n_resamples=bootstrap.n_resamples,
        seed=bootstrap.seed,
    )
    return {f"{prefix}auroc": one.value, f"{prefix}low": one.low, f"{prefix}high": one.high}
