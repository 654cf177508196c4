"""Alignment across data sets, over models (training checkpoints), and against what the models score."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import combinations
from typing import Final

import numpy as np
import pandas as pd

from probes.alignment_grid import pooled_cosines
from probes.alignment_sample import STREAM, Sample, similarity
from probes.alignment_space import VARIANTS, Space, Variant
from probes.alignment_states import IMAGE, TEXT
from slitlamp.evaluation.statistics import benjamini_hochberg, correlation_interval
from slitlamp.tracing import ProbeResult
from slitlamp.tracing.probe import Part

EXPECTED: Final[dict[str, str]] = {
    **dict.fromkeys(("accuracy", "precision", "recall", "f1"), "positive"),
    **dict.fromkeys(("chair_i", "chair_s"), "negative"),
}
"""The direction that the paper's claim gives each score: alignment goes with performance, against hallucination."""

_STEP: Final = re.compile(r"step-?(\d+)")


def compare(name: str, samples: Mapping[Part, Sample], scores: pd.DataFrame | None) -> ProbeResult | None:
    """See `ImplicitAlignment.compare`."""
    if len(samples) < 2:
        return None
    tables: dict[str, pd.DataFrame] = {}
    across = [
        _across(first, second, samples[first], samples[second])
        for first, second in combinations(samples, 2)
        if (first.model, first.condition) == (second.model, second.condition)
    ]
    if across:
        tables["across"] = pd.concat(across, ignore_index=True)
    if len({(part.model, part.condition) for part in samples}) > 1:
        tables |= _models(samples)
        if scores is not None and len(scores):
            tables |= _against_scores(tables["model_scores"], scores)
    return ProbeResult(name=name, tables=tables, summary=_summary(tables))


# -- data sets ------------------------------------------------------------------------------------------------------


def _joint(first: Space, second: Space) -> Space:
    """The space of two data sets together, each weighing half: what either removes is removed."""
    mean = (first.mean + second.mean) / 2
    square = (first.sd**2 + first.mean**2 + second.sd**2 + second.mean**2) / 2
    sd = np.sqrt(np.maximum(square - mean**2, 0.0))
    return Space(mean, np.where(sd == 0, 1.0, sd), first.removed | second.removed, (first.power + second.power) / 2)


def _across(first: Part, second: Part, one: Sample, other: Sample) -> pd.DataFrame:
    """Every example of a data set against every one of another: pair, variant, layer and the columns of `grid_intervals`.

    Both may hold the same images: `mismatched` is over pairs of different images.
    """
    space, n_layers = _joint(one.spaces[STREAM], other.spaces[STREAM]), one.n_layers()

    def states(
        sample: Sample, modality: int, layer: int, variant: Variant
    ) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        return space.apply(sample.vectors[STREAM][:, modality, layer], modality, layer, variant)

    tables = []
    for pair, left, right in (("image-image", IMAGE, IMAGE), ("text-text", TEXT, TEXT), ("image-text", IMAGE, TEXT)):
        grids = np.stack(
            [
                pooled_cosines(states(one, left, layer, variant), states(other, right, layer, variant))
                for variant in VARIANTS
                for layer in range(n_layers)
            ]
        )
        keys = {
            "model": first.model,
            "condition": first.condition,
            "dataset": first.dataset,
            "other": second.dataset,
            "pair": pair,
            "variant": np.repeat(VARIANTS, n_layers),
            "layer": np.tile(np.arange(n_layers), len(VARIANTS)),
        }
        found = one.bootstrap.grid(grids, one.groups, other.groups, paired=False)
        found = found.drop(columns=[column for column in found if column.startswith(("matched", "difference"))])
        tables.append(pd.concat([pd.DataFrame(keys), found], axis=1))
    return pd.concat(tables, ignore_index=True)


# -- models ---------------------------------------------------------------------------------------------------------


def training_step(model: str) -> float:
    """The step in a checkpoint's name ("step-00400"); NaN for a model whose name holds none."""
    found = _STEP.search(model)
    return float(found.group(1)) if found else float("nan")


def _models(samples: Mapping[Part, Sample]) -> dict[str, pd.DataFrame]:
    """Curves and scores of every model, checkpoints first, in the order of their steps; then the others as they came."""
    names = list(dict.fromkeys(part.model for part in samples))
    names.sort(key=lambda name: np.nan_to_num(training_step(name), nan=np.inf))
    curves: list[pd.DataFrame] = []
    scores: list[pd.DataFrame] = []
    for part, sample in sorted(samples.items(), key=lambda item: names.index(item[0].model)):
        keys = {
            "model": part.model,
            "order": names.index(part.model),
            "step": training_step(part.model),
            "condition": part.condition,
            "dataset": part.dataset,
        }
        curve, score = similarity(sample)
        for found, parts in ((curve[curve["pair"] == "image-text"], curves), (score, scores)):
            parts.append(pd.concat([pd.DataFrame(keys, index=found.index), found], axis=1))
    return {
        "model_curves": pd.concat(curves, ignore_index=True),
        "model_scores": pd.concat(scores, ignore_index=True),
    }


def _against_scores(alignment: pd.DataFrame, scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Alignment of every model (under every condition) beside its scores, and their correlations over the models."""
    named = scores[scores["metric"].isin(EXPECTED)]
    table = alignment.merge(
        named.rename(columns={"dataset": "score_dataset", "value": "score", "low": "score_low", "high": "score_high"})[
            ["model", "condition", "score_dataset", "metric", "score", "score_low", "score_high"]
        ],
        on=["model", "condition"],
    ).dropna(subset=["value", "score"])
    table = table.reset_index(drop=True)
    if table.empty:
        return {}
    rows = []
    keys = ["dataset", "kind", "variant", "score_dataset", "metric"]
    for values, group in table.groupby(keys, sort=False):
        stepped = group[group["step"].notna()]
        for against, x, of in (("alignment", "value", group), ("training step", "step", stepped)):
            for method in ("spearman", "pearson"):
                if against == "training step" and (method == "pearson" or of["model"].nunique() < 2):
                    continue
                found = correlation_interval(of[x], of["score"], method)
                rows.append(
                    {
                        **dict(zip(keys, values, strict=True)),
                        "of": against,
                        "method": method,
                        "r": found.value,
                        "low": found.low,
                        "high": found.high,
                        "p": found.p,
                        "n_models": found.n,
                        "expected": EXPECTED[str(values[-1])],
                    }
                )
    correlations = pd.DataFrame(rows)
    tested = correlations["p"].where(correlations["of"] == "alignment")
    correlations["p_adjusted"] = benjamini_hochberg(tested) if tested.notna().any() else np.nan
    return {"score_relation": table, "correlations": correlations}


def _summary(tables: Mapping[str, pd.DataFrame]) -> str:
    parts = []
    if "across" in tables:
        found = tables["across"].query("variant == 'removed'").groupby("pair")["value"].mean()
        parts.append(
            "Across data sets, mean over layers: images with images "
            f"{found['image-image']:.2f}, texts with texts {found['text-text']:.2f}, images with texts {found['image-text']:.2f}."
        )
    if "correlations" in tables:
        best = tables["correlations"]
        best = best[(best["kind"] == "same_layer") & (best["variant"] == "raw") & (best["method"] == "spearman")]
        best = best[best["r"].notna()]
        for metric in [one for one in ("accuracy", "chair_i") if (best["metric"] == one).any()]:
            rows = best[best["metric"] == metric].groupby("of", sort=False).first()
            own = rows.loc["alignment"]
            control = (
                f"; of the training step {rows.loc['training step', 'r']:.2f}" if "training step" in rows.index else ""
            )
            parts.append(
                f"Alignment with {metric} over {int(own['n_models'])} models: Spearman {own['r']:.2f} [{own['low']:.2f}, "
                f"{own['high']:.2f}], expected {own['expected']}{control}."
            )
    elif "model_scores" in tables:
        parts.append(f"Alignment of {tables['model_scores']['model'].nunique()} models side by side.")
    return " ".join(parts)
