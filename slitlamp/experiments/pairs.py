"""Pairs of treatments: which of them a model refuses, and how far both together are from the sum of the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.evaluation.statistics import holm
from slitlamp.experiments.conditions import Condition

if TYPE_CHECKING:
    from slitlamp.vlm import VLM

METRICS = {"captions": ("chair_i", "recall"), "pope": ("f1",)}
"""The metrics of the table `interactions`, by task."""
_EFFECTS = ("value", "low", "high", "p")


def refused_pairs(conditions: Sequence[Condition], vlm: VLM) -> pd.DataFrame:
    """The pairs whose interventions a model does not take together, as `vlm.apply` says: condition, first, second, reason."""
    rows = []
    for one in conditions:
        if one.pair_of is None:
            continue
        try:
            with vlm.apply(*one.interventions):
                pass
        except (InputError, UnsupportedError) as error:
            rows.append((one.name, *one.pair_of, str(error)))
    return pd.DataFrame(rows, columns=["condition", "first", "second", "reason"], dtype=object)


def interaction_table(found: pd.DataFrame, differences: pd.DataFrame, reference: str) -> pd.DataFrame:
    """The interactions of pairs beside the effects that they are made of.

    Args:
        found: a row per pair, data set and metric: condition, first, second, dataset, task, metric, the interaction (effect of
            both - effect of the first - effect of the second) as value, low, high, p, and n_images.
        differences: of the run.
        reference: the condition whose differences the effects are.

    Returns:
        `found` with p_holm, over the pairs of a data set and metric, and the effects against the reference, from
        `differences`: first_value, first_low, first_high, first_p, and the same of second and both.
    """
    table = found.copy()
    table["p_holm"] = table.groupby(["dataset", "metric"], sort=False)["p"].transform(holm)
    effects = differences[differences["reference"] == reference]
    keys = ["dataset", "metric"]
    for side, column in (("first", "first"), ("second", "second"), ("both", "condition")):
        names = {name: f"{side}_{name}" for name in _EFFECTS} | {"condition": column}
        own = effects[["condition", *keys, *_EFFECTS]].rename(columns=names)
        table = table.merge(own, on=[column, *keys], how="left", validate="many_to_one")
    return table
