"""The figures of `TokenLedger`, and what the ledger says in three sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pandas as pd
from matplotlib.figure import Figure

from slitlamp.reports import ledger_drawings as drawings
from slitlamp.reports import ledger_maps as maps
from slitlamp.reports.draw import (
    is_narrow,
    legend_below,
    own_legend,
    panel_grid,
)
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.style import new_figure, styled
from slitlamp.reports.wording import Estimate, count, join, number, sentence

TOP: Final = 3
"""How many signals have their ROC curve drawn beside the combination's."""
CLASSES: Final = 4
"""How many signals have their distributions drawn."""
TO_BEST: Final = ("to_best", "to_best_low", "to_best_high")
"""Columns of the ranking: the AUROC minus that of the best signal, paired."""
REFERENCES: Final = {
    "output and baselines": "what can be had without a look inside (output distribution, position, mention, frequency)",
    "baselines": "position, mention and frequency",
}
"""In a sentence, what combinations are compared with."""


def ranked(tables: Tables) -> pd.DataFrame | None:
    """The rows of the ranking figure: the combinations, the signals from the best, and the random number last."""
    ranking = tables.get("ranking")
    if ranking is None or not ranking["auroc"].notna().any():
        return None
    signals = ranking[ranking["auroc"].notna()]
    signals = pd.concat([signals[signals["family"] != "null"], signals[signals["family"] == "null"]])
    together = tables.get("combination")
    if together is None:
        return signals.reset_index(drop=True)
    rows = together.drop_duplicates("combination").rename(columns={"combination": "title"})
    rows = rows.assign(signal=["combined"] + [""] * (len(rows) - 1), family="together", sign=0, agrees="")
    return pd.concat([rows.reindex(columns=signals.columns), signals], ignore_index=True)


@styled
def _ranking(tables: Tables, width: float) -> Figure | None:
    rows = ranked(tables)
    if rows is None:
        return None
    sensitive = "tpr" in rows and rows["tpr"].notna().any()
    names = drawings.row_names(rows)
    height = 0.27 * len(rows)
    if not sensitive:
        figure = new_figure(width, height + 1.5)
        drawings.ranking_panel(rows, figure.add_subplot())
    elif is_narrow(width):
        figure = new_figure(width, 2 * height + 2.6)
        first, second = figure.subplots(2, 1)
        drawings.ranking_panel(rows, first)
        drawings.sensitivity_panel(rows, second)
    else:
        figure = new_figure(width, height + 1.5)
        first, second = figure.subplots(1, 2, width_ratios=[1.9, 1])
        drawings.ranking_panel(rows, first, names=names)
        drawings.sensitivity_panel(rows, second, names=())
        first.set_xlabel(first.get_xlabel(), loc="center")  # at the right it would meet the other panel's
    legend_below(figure, drawings.family_handles(rows))
    return figure


@styled
def _redundancy(tables: Tables, width: float) -> Figure | None:
    redundancy, ranking = tables.get("redundancy"), tables.get("ranking")
    if redundancy is None or ranking is None:
        return None
    narrow = is_narrow(width)
    figure = new_figure(width, width * (0.72 if narrow else 0.86))
    maps.redundancy_panel(redundancy, _signs(ranking), figure.add_subplot(), annotate=not narrow)
    return figure


@styled
def _roc(tables: Tables, width: float) -> Figure | None:
    ledger, rows = tables.get("ledger"), ranked(tables)
    if ledger is None or rows is None or not _both_kinds(ledger):
        return None
    single = rows[~rows["family"].isin(["together", "null"])].head(TOP)
    together = rows[(rows["signal"] == "combined") & bool(ledger["combined"].notna().all())]
    figure = new_figure(width, 4.4 if is_narrow(width) else 3.8)
    rate = float(rows["fpr"].dropna().iloc[0]) if "fpr" in rows and rows["fpr"].notna().any() else None
    panel = drawings.signal_roc_panel(ledger, pd.concat([together, single]), figure.add_subplot(), rate=rate)
    own_legend(figure, [panel])
    return figure


@styled
def _classes(tables: Tables, width: float) -> Figure | None:
    ledger, rows = tables.get("ledger"), ranked(tables)
    if ledger is None or rows is None or not _both_kinds(ledger):
        return None
    top = rows[~rows["family"].isin(["together", "null", "baseline"])].head(CLASSES)
    if top.empty:
        return None
    figure, panels = panel_grid(width, len(top), 1.9, columns=2)
    for panel, row in zip(panels, top.to_dict("records"), strict=True):
        note = f"AUROC {number(float(row['auroc']), 2)}"
        drawings.class_panel(ledger, str(row["signal"]), str(row["title"]), panel, note=note)
        panel.set_ylabel("")  # one for all
    figure.supylabel("share of the objects of its kind", fontsize=9)
    legend_below(figure, drawings.class_handles())
    return figure


@styled
def _strip(tables: Tables, width: float) -> Figure | None:
    ledger, rows = tables.get("ledger"), ranked(tables)
    if ledger is None or rows is None:
        return None
    shown = rows[((rows["family"] != "together") | (rows["signal"] == "combined")) & (rows["family"] != "null")]
    shown = shown[[bool(ledger[name].notna().any()) for name in shown["signal"]]]
    figure = new_figure(width, (2.4 if is_narrow(width) else 1.5) + 0.24 * len(shown))
    maps.strip_panel(ledger, maps.telling_item(ledger), shown, figure.add_subplot(), annotate=not is_narrow(width))
    return figure


@styled
def _comparison(tables: Tables, width: float) -> Figure | None:
    rankings, agreement = tables.get("rankings"), tables.get("agreement")
    if rankings is None or agreement is None:
        return None
    parts = _part_names(rankings)
    rankings = rankings.assign(part=parts)
    known = rankings[rankings["auroc"].notna()]
    if known.empty:
        return None
    n_parts = rankings["part"].nunique()
    figure = new_figure(width, 1.3 + 0.3 * known["signal"].nunique() * max(1.0, n_parts / 3))
    own_legend(figure, [drawings.comparison_panel(rankings, figure.add_subplot())])
    return figure


def _part_names(rankings: pd.DataFrame) -> list[str]:
    """A name for the part of each row, from what differs between parts."""
    differing = [one for one in ("model", "condition", "dataset") if rankings[one].nunique() > 1] or ["model"]
    return [", ".join(str(row[one]) for one in differing) for row in rankings.to_dict("records")]


def _signs(ranking: pd.DataFrame) -> dict[str, int]:
    return {str(name): int(sign) for name, sign in zip(ranking["signal"], ranking["sign"], strict=True)}


def _both_kinds(ledger: pd.DataFrame) -> bool:
    false = ledger["label"].isin(drawings.FALSE)
    return bool(false.any() and not false.all())


def _sizes(tables: Tables) -> str:
    """How many objects of how many images were measured."""
    for name in ("ranking", "rankings"):
        table = tables.get(name)
        if table is not None and len(table):
            row = table.loc[table["n_tokens"].idxmax()]
            return (
                f"{count(int(row['n_tokens']), 'named object')} ({count(int(row['n_hallucinated']), 'hallucinated one')}) in "
                f"the captions of {count(int(row['n_images']), 'image')}"
            )
    return "no objects"


def _comparison_caption(tables: Tables) -> str:
    agreement = tables.get("agreement", pd.DataFrame())
    pairs = []
    for row in agreement.head(6).to_dict("records"):
        differing = [one for one in ("model", "condition", "dataset") if row[f"{one}_a"] != row[f"{one}_b"]]
        sides = [", ".join(str(row[f"{one}_{side}"]) for one in differing) for side in "ab"]
        pairs.append(f"{sides[0]} and {sides[1]} {Estimate.of(row, 'spearman').text(2)}")
    tail = f" Rank correlation of the rankings, intervals over signals, chance 0: {'; '.join(pairs)}." if pairs else ""
    return (
        "AUROC of every signal in its declared direction, with 95 % bootstrap intervals over images, for every model, "
        f"condition and data set measured; dashed: chance.{tail}"
    )


def ledger_headline(tables: Tables) -> list[str]:
    """Three plain sentences on the ledger: the best signal, what is left when position and frequency are held fixed, and what a
    look inside adds to what the output says.
    """
    rows = ranked(tables)
    if rows is None:
        return []
    single = rows[~rows["family"].isin(["together", "null"])]
    if single.empty:
        return []
    best = single.iloc[0]
    lines = [
        f"Of {count(len(single), 'signal')} read at the moment before the model names an object, {best['title']} tells "
        f"hallucinated from true objects best: AUROC {Estimate.of(best.to_dict(), 'auroc').text(2)}, where chance is .5, over "
        f"{_sizes(tables)}.{_rivals(single)}"
    ]
    return lines + _direction_sentence(single) + _together_sentence(tables)


def _rivals(single: pd.DataFrame) -> str:
    """Which signals the best one is not told from, on the same objects."""
    behind = {str(row["title"]): Estimate.of(row, *TO_BEST) for row in single.to_dict("records")}
    known = {title: one for title, one in behind.items() if one.has_interval}
    close = [f"{title} ({one.text(3, signed=True)})" for title, one in known.items() if not one.direction]
    if close:
        return f" On the same objects it is not told from {join(close)}."
    return f" On the same objects all {len(known)} others are behind it." if known else ""


def _direction_sentence(single: pd.DataFrame) -> list[str]:
    clear, against = single[single["agrees"] == "yes"], single[single["agrees"] == "no"]
    text = f"{len(clear)} of them point the way that was declared beforehand (false discovery rate 5 %)"
    if len(against):
        text += f", {join(list(against['title']))} the other way"
    if "partial" not in clear:
        return [sentence(text)]
    kept = clear[clear["partial_low"] > 0.5]
    lost = clear[clear["partial"].notna() & ~(clear["partial_low"] > 0.5)]
    if len(kept) + len(lost):
        text += (
            f"; when position in the caption and object frequency are held fixed, {len(kept)} of the {len(kept) + len(lost)} "
            "still tell more than chance"
        )
    if len(lost):
        text += f", and {join(list(lost['title']))} {'does' if len(lost) == 1 else 'do'} not"
    return [sentence(text)]


def _together_sentence(tables: Tables) -> list[str]:
    together = tables.get("combination")
    if together is None:
        return []
    every = together[together["combination"] == "all signals"]
    if every.empty:
        return []
    area = Estimate.of(every.iloc[0].to_dict(), "auroc").text(2)
    parts = [_against(row) for row in every.head(2).to_dict("records")]
    return [sentence(f"all signals together, cross-validated by image, reach AUROC {area}: {join(parts)}")]


def _against(row: Mapping[str, Any]) -> str:
    """A combination against another detector, as a clause."""
    gain = Estimate.of(row, "difference", "difference_low", "difference_high")
    name = REFERENCES.get(str(row["against"]), str(row["against"]))
    if not gain.direction:
        return f"not distinguishable from {name} (difference {gain.text(3, signed=True)})"
    where = "above" if gain.direction == "up" else "below"
    size = Estimate(abs(gain.value), *sorted((abs(gain.low), abs(gain.high))))
    return f"{where} {name} by {size.text(3)}"


FIGURES: Final = {
    "ranking": Drawing(
        "Which internal signal knows that an object is hallucinated",
        lambda tables: (
            f"Every signal as a detector, over {_sizes(tables)}, measured at the token before the object. An arrow says which "
            "way it was expected to point before the data were seen (↑ higher when hallucinated, ↓ lower), a cross that the "
            "data say the opposite. Filled: AUROC; hollow: the same with position in the caption and object frequency held "
            "fixed; bars: 95 % bootstrap intervals over images; dashed: chance. Above the line: signals combined by a "
            "cross-validated logistic regression; baselines are position, mention index and frequency. The random number shows "
            "what nothing looks like: one such interval in twenty misses chance."
        ),
        _ranking,
    ),
    "roc": Drawing(
        "What the best signals find when false alarms must be rare",
        lambda tables: (
            f"ROC curves of the {TOP} best signals and of all signals together (out-of-fold), over {_sizes(tables)}. The axis of "
            "false alarms is logarithmic; bars: 95 % bootstrap intervals over images at the rate of the table; dashed: chance."
        ),
        _roc,
    ),
    "strip": Drawing(
        "One caption in the ledger",
        lambda tables: (
            "The objects that one caption names (across; a cross marks those that are not in the image) and what every signal "
            "says of them (down, the best signal first): the percentile of its value among all named objects, turned so that "
            "dark means a warning. Shown is the caption with most objects of both kinds."
        ),
        _strip,
    ),
    "classes": Drawing(
        "The best signals in true and in hallucinated objects",
        lambda tables: (
            f"Histograms of the {CLASSES} best signals that read the model, each kind as shares of its own objects, over "
            f"{_sizes(tables)}; triangles: medians. Values beyond the 0.5 % and 99.5 % quantiles are in the outer bins."
        ),
        _classes,
    ),
    "redundancy": Drawing(
        "Which signals say the same",
        lambda tables: (
            "Spearman correlation of every pair of signals, both turned so that higher means hallucinated, over "
            f"{_sizes(tables)}; signals that agree stand together (average linkage). A dot in place of a cell: the 95 % "
            "bootstrap interval over images holds zero."
        ),
        _redundancy,
    ),
    "comparison": Drawing("Whether the ranking holds elsewhere", _comparison_caption, _comparison),
}
