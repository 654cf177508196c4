"""The table and the figure of the tracing benchmark."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _cases import CASES
from _contestants import CONTESTANTS
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from slitlamp.reports import style

SLACK = 32 * 2**20
"""Bytes that recording may take beside 1.5 times what it recorded."""
COLUMNS = (
    *("case", "contestant", "status", "ratio", "ratio_low", "ratio_high", "rounds", "seconds", "plain_seconds"),
    *("extra_bytes", "recorded_bytes", "predicted_bytes", "target_ratio", "time_met", "memory_met", "note"),
)
_COLOURS = {
    "slitlamp": (style.BLUE, "o"),
    "hf-eager": (style.VERMILLION, "s"),
    "nnsight-trace": (style.GREEN, "D"),
    "nnsight-cache": (style.ORANGE, "^"),
    "transformer-bridge": (style.PURPLE, "P"),
}

Row = dict[str, Any]


def judge(row: Row) -> Row:
    """The row with whether slitlamp reached what was promised: of time where the case has a target, of memory always."""
    target = CASES[row["case"]].target
    if row["contestant"] != "slitlamp" or row["status"] != "measured":
        return row
    if target is not None:
        row |= {"target_ratio": target, "time_met": row["ratio"] <= target}
    if row["extra_bytes"] is not None:
        row["memory_met"] = row["extra_bytes"] <= 1.5 * row["recorded_bytes"] + SLACK
    return row


def verdicts(rows: Sequence[Row]) -> list[str]:
    """One line per promise: reached or missed, with the figure and its interval."""
    lines = []
    for row in rows:
        title = CASES[row["case"]].title
        if row.get("time_met") is not None:
            word = "reached" if row["time_met"] else "MISSED"
            interval = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
            lines.append(f"{word}: {title}: {interval} times the plain run, promised at most {row['target_ratio']:.2f}")
        if row.get("memory_met") is not None:
            word = "reached" if row["memory_met"] else "MISSED"
            limit = 1.5 * row["recorded_bytes"] + SLACK
            lines.append(
                f"{word}: {title}: {_megabytes(row['extra_bytes'])} of extra peak memory, promised at most "
                f"{_megabytes(limit)} (1.5 x {_megabytes(row['recorded_bytes'])} recorded + 32 MiB)"
            )
    return lines


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)


def _plain(value: Any) -> Any:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else value


def markdown(rows: Sequence[Row], setting: dict[str, str]) -> str:
    """The table, what was promised, and how it was measured."""
    lines = [
        "# Recording of every layer: time and peak memory",
        "",
        "Each case records, of all layers, `resid_post` (mean over image tokens, and last position), `z` (last) and the",
        "attention of the last position over the image tokens; when decoding, those of the last position at every step. Times",
        "are over those of the plain SDPA run of the same process, run by run in turn: the median ratio and its 95 % bootstrap",
        "interval. Extra memory is the peak above that of the plain run. `python benchmarks/tracing.py` makes this page.",
        "",
        *(f"- {name}: {value}" for name, value in setting.items()),
        "",
        "| case | recorder | time / plain | seconds (plain) | rounds | extra peak memory | recorded |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append("| " + " | ".join(_cells(row)) + " |")
    return "\n".join([*lines, "", "## What was promised", "", *(f"- {line}" for line in verdicts(rows)), ""])


def _cells(row: Row) -> list[str]:
    names = [CASES[row["case"]].title, CONTESTANTS[row["contestant"]].title]
    if row["status"] != "measured":
        return [*names, row["note"], "", "", "", ""]
    extra = "not measured" if row["extra_bytes"] is None else _megabytes(row["extra_bytes"])
    return [
        *names,
        f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        + (f" ({row['note']})" if row["note"] else ""),
        f"{row['seconds']:.3g} ({row['plain_seconds']:.3g})",
        str(row["rounds"]),
        extra,
        _megabytes(row["recorded_bytes"]),
    ]


def _megabytes(count: float) -> str:
    megabytes = count / 1e6
    return f"{megabytes:,.0f} MB" if abs(megabytes) >= 10 else f"{megabytes:.2g} MB"


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Two panels: time over plain, extra memory; both on logarithmic axes, one line per case, one mark per recorder."""
    cases = [name for name in CASES if any(row["case"] == name for row in rows)]
    names = [name for name in CONTESTANTS if name in _COLOURS and any(row["contestant"] == name for row in rows)]
    with style.style():
        figure = style.new_figure(9.2, 1.3 + 0.62 * len(cases))
        left, right = figure.subplots(1, 2, sharey=True)
        for place, case in enumerate(cases):
            for axes in (left, right):
                axes.axhspan(place - 0.5, place + 0.5, color="#f4f4f4" if place % 2 else "white", zorder=0, linewidth=0)
            for number, name in enumerate(names):
                found = [row for row in rows if (row["case"], row["contestant"]) == (case, name)]
                height = place + 0.7 * ((number + 0.5) / len(names) - 0.5)
                for row in found:
                    _mark(left, right, row, height)
            if CASES[case].target is not None:
                left.plot(
                    [CASES[case].target] * 2, [place - 0.5, place + 0.5], color=style.INK, linewidth=1.1, zorder=2
                )
        for name in names:
            colour, marker = _COLOURS[name]
            left.plot([], [], linestyle="", color=colour, marker=marker, label=CONTESTANTS[name].title)
        left.plot([], [], color=style.INK, linewidth=1.1, label="promised at most")
        right.plot(
            [], [], linestyle="", color=style.GREY, marker="s", markerfacecolor="white", label="hollow: predicted"
        )
        left.set_xscale("log")
        left.axvline(1, color=style.GREY, linewidth=0.8, zorder=1)
        left.set_xlabel("time, in times of the plain run")
        ticks = [0.8, 1, 1.25, 1.5, 2, 3, 5, 8, 12, 20]
        low, high = left.get_xlim()
        shown = [tick for tick in ticks if low <= tick <= high]
        left.set_xticks(shown, [f"{tick:g}" for tick in shown])
        left.minorticks_off()
        right.set_xscale("log")
        right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        right.xaxis.set_minor_formatter(NullFormatter())
        right.set_xlabel("extra peak memory, MB")
        left.set_yticks(range(len(cases)), [CASES[case].title for case in cases])
        left.set_ylim(len(cases) - 0.5, -0.5)
        handles = [handle for axes in (left, right) for handle in axes.get_legend_handles_labels()[0]]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"tracing.{suffix}", dpi=150, metadata={"Date": None} if suffix == "svg" else None)


def _mark(left: Axes, right: Axes, row: Row, height: float) -> None:
    colour, marker = _COLOURS[row["contestant"]]
    if row["status"] == "measured":
        left.plot([row["ratio_low"], row["ratio_high"]], [height, height], color=colour, linewidth=1.4, zorder=3)
        left.plot([row["ratio"]], [height], color=colour, marker=marker, zorder=4)
        if row["extra_bytes"] is not None:
            # less than 0.1 MB is drawn at the edge: the peak of a process does not resolve it
            right.plot([max(row["extra_bytes"] / 1e6, 0.1)], [height], color=colour, marker=marker, zorder=4)
    elif row["predicted_bytes"]:
        right.plot(
            [row["predicted_bytes"] / 1e6], [height], color=colour, marker=marker, markerfacecolor="white", zorder=4
        )
