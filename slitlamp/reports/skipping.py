"""Skipped computation against what it costs (IMA, figure 11), and subnetworks against masks of equal size (figure 12)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from interventions import SkipPerceptual, SubnetMask
from slitlamp.decoding import Intervention
from slitlamp.flops import BlockSizes, Tokens
from slitlamp.reports import findings
from slitlamp.reports.data import RunData
from slitlamp.reports.draw import condition_handles, is_narrow, legend_below, need, panel_grid
from slitlamp.reports.metrics import metric, split_name
from slitlamp.reports.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    ConditionStyle,
    axes_or_new,
    styled,
)

POPE_METRICS: Final = ("accuracy",)
CHAIR_METRICS: Final = ("chair_i", "recall")
SKIP_LOOKS: Final = {
    "skip the FFN": ConditionStyle(BLUE, "o", "-", True),
    "skip the block": ConditionStyle(VERMILLION, "s", (0, (6, 1.5)), True),
    "attention and FFN in parallel": ConditionStyle(GREEN, "D", (0, (4, 1.5, 1, 1.5)), True),
    "skip the FFN, random blocks": ConditionStyle(SKY, "v", (0, (2, 1.2)), False),
    "skip the block, random blocks": ConditionStyle(ORANGE, "^", (0, (2, 1.2)), False),
    "attention and FFN in parallel, random blocks": ConditionStyle(GREEN, "<", (0, (2, 1.2)), False),
    "skip the FFN, text tokens": ConditionStyle(PURPLE, "P", (0, (1, 1.2)), False),
    "skip the block, text tokens": ConditionStyle(INK, "X", (0, (1, 1.2)), False),
    "attention and FFN in parallel, text tokens": ConditionStyle(GREY, ">", (0, (1, 1.2)), False),
}
SKIP_NAMES: Final = {"ffn": "skip the FFN", "block": "skip the block", "parallel": "attention and FFN in parallel"}
RULE_LOOKS: Final = {
    "wanda": ConditionStyle(BLUE, "o", "-", True),
    "magnitude": ConditionStyle(ORANGE, "^", (0, (5, 1.5, 1, 1.5)), False),
    "random": ConditionStyle(GREY, "v", (0, (2, 1.2)), False),
}
RULE_NAMES: Final = {
    "wanda": "weights that the tokens activate",
    "magnitude": "control: as many, the largest",
    "random": "control: as many at random",
}


def _single(data: RunData, kind: type[Intervention]) -> Iterator[tuple[str, Any]]:
    """The conditions that are one intervention of a kind, and those of their controls that are: (name, intervention)."""
    conditions = data.config.get("conditions")
    given = conditions if isinstance(conditions, Mapping) else {}
    known = {one.name for one in fields(kind) if one.init}  # type: ignore[arg-type]
    made: dict[str, Any] = {}
    for name, entries in given.items():
        if not isinstance(entries, list) or len(entries) != 1:
            continue
        found = _parameters(entries[0], kind.name)
        if found is not None and set(found) <= known:
            made[str(name)] = kind(**found)
    for one in data.conditions:
        if one.name in made:
            yield one.name, made[one.name]
        elif one.control_of in made:
            control = made[one.control_of].controls().get(one.name.removeprefix(f"{one.control_of}_"))
            if control is not None:
                yield one.name, control


def _parameters(entry: Any, name: str) -> dict[str, Any] | None:
    """The parameters of an entry of a configuration, `Name`, `{Name: {...}}` or `{name: Name, parameters: {...}}`."""
    if entry == name:
        return {}
    if not isinstance(entry, Mapping):
        return None
    if entry.get("name") == name:
        return dict(entry.get("parameters") or {})
    return dict(entry[name] or {}) if name in entry else None


def _scores(data: RunData, names: Sequence[str]) -> pd.DataFrame | None:
    """The scores of some conditions and of the reference: condition, dataset, metric, value, low, high."""
    table = data.table("conditions", "condition", "dataset", "metric", "value", "low", "high")
    if table is None:
        return None
    shown: dict[str, tuple[str, ...]] = dict.fromkeys(findings.caption_datasets(data)[:1], CHAIR_METRICS)
    shown |= dict.fromkeys(findings.pope_datasets(data)[:1], POPE_METRICS)
    rows = table[table["condition"].astype(str).isin([*names, data.reference])]
    pairs = zip(rows["dataset"].astype(str), rows["metric"].astype(str), strict=True)
    rows = rows[[name in shown.get(dataset, ()) for dataset, name in pairs]]
    return None if rows.empty else rows.reset_index(drop=True)


def _runs(data: RunData) -> dict[str, list[Tokens]] | None:
    """Of the reference condition, the numbers of tokens of every item by data set; None where the run has not kept them.

    Text is taken to follow the image, which matters only to the few operations of attention.
    """
    path = data.folder / "predictions.parquet"
    table = pd.read_parquet(path) if path.is_file() else pd.DataFrame()
    if not {"n_prompt", "n_image"} <= set(table.columns):
        return None
    rows = table[table["condition"].astype(str) == data.reference]
    return {
        str(dataset): [
            Tokens(0, int(n_image), int(n_prompt - n_image), int(n))
            for n_prompt, n_image, n in zip(own["n_prompt"], own["n_image"], own["n_tokens"], strict=True)
        ]
        for dataset, own in rows.groupby("dataset", sort=False)
    }


def skipping_table(data: RunData) -> pd.DataFrame | None:
    """The scores of the conditions that skip computation, with what they save.

    Columns: condition, dataset, metric, value, low, high; series (what is skipped, by whom), start, interval, n_blocks, and
    saved, the mean over items of the share of the operations of the decoder's blocks that need not be done, on the prompts and
    lengths of the reference (0 for the reference itself).

    None for a run without such conditions, or without the sizes of its model.
    """
    given, runs = dict(_single(data, SkipPerceptual)), _runs(data)
    sizes = data.environment.get("block_sizes")
    table = _scores(data, list(given))
    if not given or runs is None or not isinstance(sizes, Mapping) or table is None:
        return None
    block = BlockSizes(**sizes)
    columns: list[dict[str, Any]] = []
    for row in table.to_dict("records"):
        one: SkipPerceptual | None = given.get(str(row["condition"]))
        if one is None:
            columns.append({"series": "reference", "start": -1, "interval": 0, "n_blocks": 0, "saved": 0.0})
            continue
        saved = np.mean([one.saved(block, tokens) for tokens in runs[str(row["dataset"])]])
        series = SKIP_NAMES[one.skip]
        if one.select == "random":
            series += ", random blocks"
        if one.tokens != "perceptual":
            series += f", {one.tokens} tokens"
        n_blocks = len(one.blocks(block.n_layers))
        columns.append(
            {
                "series": series,
                "start": one.start,
                "interval": one.interval,
                "n_blocks": n_blocks,
                "saved": float(saved),
            }
        )
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def mask_table(data: RunData) -> pd.DataFrame | None:
    """The scores of the conditions that run on a subnetwork, with its rule, tokens and sparsity.

    Those whose masks are from a file, or, where there is none, those with masks of each prompt's own tokens; `tokens` is
    "file" for the former. The reference has sparsity 0 and rule "reference". None for a run without such conditions.
    """
    given: dict[str, SubnetMask] = dict(_single(data, SubnetMask))
    given = {name: one for name, one in given.items() if one.masks is not None} or given
    table = _scores(data, list(given))
    if not given or table is None:
        return None
    columns = [
        {"rule": "reference", "tokens": "", "sparsity": 0.0}
        if (one := given.get(str(row["condition"]))) is None
        else {"rule": one.rule, "tokens": one.tokens if one.masks is None else "file", "sparsity": one.sparsity}
        for row in table.to_dict("records")
    ]
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def _reference(ax: Axes, rows: pd.DataFrame) -> None:
    """The unmodified model as a line with the band of its interval."""
    for row in rows.to_dict("records"):
        ax.axhline(row["value"], color=INK, linewidth=1.0, linestyle=(0, (4, 2)), zorder=1, label="_reference")
        ax.axhspan(row["low"], row["high"], color=GREY, alpha=0.14, linewidth=0, zorder=0, label="_reference_band")


@styled
def cost_curves(
    table: pd.DataFrame, x: str, by: str, ax: Axes | None = None, *, looks: Mapping[str, ConditionStyle] | None = None
) -> Axes:
    """One score of several series against a number, with interval bars, and the reference as a line.

    Args:
        table: of one data set and metric (named, if the columns are there): value, low, high and the columns named below; the
            reference has "reference" in `by`.
        x: the column across: saved, start or sparsity.
        by: the column that names the series.
        ax: where to draw; a new figure if None.
        looks: of each series; those of skips or of rules of masks if None.
    """
    need(table, x, by, "value", "low", "high")
    ax = axes_or_new(ax, height=2.8)
    looks = looks or (RULE_LOOKS if by == "rule" else SKIP_LOOKS)
    _reference(ax, table[table[by] == "reference"])
    for name, look in looks.items():
        rows = table[table[by] == name].sort_values([x, "value"])
        if rows.empty:
            continue
        along = rows[x].to_numpy(dtype=float)
        low, high = (rows[end].to_numpy(dtype=float) for end in ("low", "high"))
        ax.vlines(along, low, high, color=look.colour, linewidth=1.0, alpha=0.8, label="_interval")
        ax.plot(
            along, rows["value"].to_numpy(dtype=float), color=look.colour, marker=look.marker, markerfacecolor=look.face,
            linestyle=look.line, markersize=5, linewidth=1.2, label=f"_{name}",
        )  # fmt: skip
    if "metric" in table:
        one, dataset = str(table["metric"].iloc[0]), str(table["dataset"].iloc[0])
        ax.set_title(f"{metric(one).label}, POPE {split_name(dataset)}" if one == "accuracy" else metric(one).label)
        ax.set_ylabel(metric(one).unit)
    ax.set_xlabel({"saved": "operations saved (%)", "start": "start (later blocks skip)"}.get(x, "dropped per row (%)"))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return ax


def _panels(
    table: pd.DataFrame,
    width: float,
    x: str,
    by: str,
    looks: Mapping[str, ConditionStyle],
    names: Mapping[str, str],
) -> Figure:
    """A panel per data set and metric, with a legend below."""
    pairs = list(dict.fromkeys(zip(table["dataset"].astype(str), table["metric"].astype(str), strict=True)))
    narrow = is_narrow(width)
    used = [name for name in looks if (table[by] == name).any()]
    figure, axes = panel_grid(width, len(pairs), 2.1, columns=3, extra=0.45 + 0.19 * len(used) / (1 if narrow else 2))
    for ax, (dataset, name) in zip(axes, pairs, strict=True):
        cost_curves(
            table[(table["dataset"].astype(str) == dataset) & (table["metric"] == name)], x, by, ax, looks=looks
        )
    reference = {"reference": ConditionStyle(INK, "", (0, (4, 2)), True)}
    shown = ["reference", *used]
    legend_below(
        figure,
        condition_handles(shown, {**reference, **looks}, {"reference": "the model as it is", **names}, lines=True),
        columns=1 if narrow else 2,
    )
    return figure


@styled
def skipped_operations(data: RunData, width: float) -> Figure | None:
    """Scores against the share of operations saved: what is skipped, by which tokens.

    None where a run does not skip two things, or one in two numbers of blocks: one point is no comparison.
    """
    table = skipping_table(data)
    if table is None:
        return None
    table = table[table["start"] <= 0].assign(saved=100 * table["saved"])
    ways = table.loc[table["series"].isin(SKIP_NAMES.values()), ["series", "n_blocks"]].drop_duplicates()
    return _panels(table, width, "saved", "series", SKIP_LOOKS, {}) if len(ways) > 1 else None


def skipped_operations_note(data: RunData) -> str:
    """The caption of `skipped_operations`."""
    return (
        "Image tokens skip the FFN, or the block, or run attention and FFN in parallel (which saves no operation), in every "
        "block between the first and the last, or one in several; across, the estimated share of the operations of the "
        "decoder's blocks that need not be done, on the prompts and lengths of the run. Controls (open markers): as many blocks "
        "drawn at random, and text tokens of the prompt in place of image tokens. Bars are bootstrap intervals over images; the "
        "dashed line with its band is the model as it is. Everything was computed and put aside: operations are an estimate, not "
        "a time."
    )


@styled
def skipped_from(data: RunData, width: float) -> Figure | None:
    """Scores against the block after which every block is skipped; None where a run has no two such conditions."""
    table = skipping_table(data)
    if table is None:
        return None
    table = table[(table["interval"] == 1) | (table["series"] == "reference")]
    several = table[table["series"] != "reference"].groupby("series")["start"].nunique()
    kept = [*several[several > 1].index, "reference"]
    if len(kept) < 2:
        return None
    return _panels(table[table["series"].isin(kept)], width, "start", "series", SKIP_LOOKS, {})


def skipped_from_note(data: RunData) -> str:
    """The caption of `skipped_from`."""
    return (
        "Every block after the start and before the last is skipped: a later start skips fewer. Controls (open markers): as many "
        "blocks drawn at random, and text tokens of the prompt in place of image tokens. Bars are bootstrap intervals over "
        "images; the dashed line with its band is the model as it is."
    )


@styled
def subnetworks(data: RunData, width: float) -> Figure | None:
    """Scores of the model on subnetworks against masks of equal size; None where a run has no two sparsities of them."""
    table = mask_table(data)
    if table is None:
        return None
    rules = (table["rule"] == "reference") | (table["tokens"] == "both")
    table = (table[rules] if (table["tokens"] == "both").any() else table).assign(sparsity=100 * table["sparsity"])
    if table.loc[table["rule"] != "reference", "sparsity"].nunique() < 2:
        return None
    return _panels(table, width, "sparsity", "rule", RULE_LOOKS, RULE_NAMES)


def subnetworks_note(data: RunData) -> str:
    """The caption of `subnetworks`."""
    table = mask_table(data)
    filed = table is not None and (table["tokens"] == "file").any()
    whose = "of the items on which a file of masks was calibrated" if filed else "of the prompt"
    return (
        f"The model with only those weights of its blocks that all kinds of tokens {whose} activate (by Wanda's score); across, "
        "the share of each row that each kind drops: what all keep is sparser. The controls keep as many weights in every row: "
        "the largest, or random ones. Bars are bootstrap intervals over images; the dashed line with its band is the model as it "
        "is."
    )
