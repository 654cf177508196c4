"""The interactive viewer: one script, one style sheet and the data of some items, as HTML that needs no network."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup

from probes.ledger_signals import SIGNALS
from slitlamp.experiments.viewer import item_paths, read_index, read_item
from slitlamp.experiments.viewer_detail import Arrays, packed
from slitlamp.reports.data import RunData
from slitlamp.reports.style import MAP
from slitlamp.reports.wording import count

SCRIPTS: Final = ("viewer_data.js", "viewer_draw.js", "viewer_panels.js", "viewer.js")
FEWEST: Final = 20
"""Named objects below which no percentile is given."""
_COLOURS: Final = 33
_KINDS: Final = {"captions": ("object", "hallucinated"), "pope": ("correct", "wrong")}


@dataclass(frozen=True)
class Entry:
    """One item for the page: its header, its arrays, and its picture with the picture's kind ("png", "jpeg")."""

    header: Mapping[str, Any]
    arrays: Arrays
    picture: bytes = b""
    kind: str = ""


@dataclass(frozen=True)
class Viewer:
    """The viewer of a page: its data as JSON, how the items were chosen, and what stands in place of it without a script."""

    data: Markup
    note: str


@functools.cache
def script() -> Markup:
    """The one script of the viewer."""
    parts = [_template(name) for name in SCRIPTS]
    return Markup('(() => {\n"use strict";\n' + "\n".join(parts) + "})();\n")


def style_sheet() -> Markup:
    """The style sheet of the viewer; it uses the colours that the page's own declares."""
    return Markup(_template("viewer.css"))


def script_source() -> str:
    """What a Content-Security-Policy lets run: this script and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()}'"


def _template(name: str) -> str:
    return (resources.files("slitlamp.reports") / "templates" / name).read_text(encoding="utf-8")


def viewer_of(data: RunData) -> Viewer | None:
    """The viewer of a run, from its folder; None where the run recorded none."""
    index = read_index(data.folder)
    if index is None:
        return None
    read = [read_item(path) for path in item_paths(data.folder, int(index["n_items"]))]
    ranked = Percentiles.of(data, [header for header, _, _ in read])
    entries = [
        Entry({**header, "signals": ranked.put(header["signals"])}, arrays, picture, header["picture"])
        for header, arrays, picture in read
    ]
    note = f"{index['rule']} {_detail_note([one.header for one in entries])}"
    return Viewer(page_data(entries, keep_address=True), note)


def _detail_note(headers: Sequence[Mapping[str, Any]]) -> str:
    """What level of detail the items have."""
    said = {
        "all": "attention of every token by head",
        "named": "attention by head at tokens that name objects, and the mean over heads at all others",
        "mean": "attention as the mean over heads",
    }
    levels = [(one["detail"], int(one["pooled"])) if "detail" in one else ("none", 1) for one in headers]
    parts = []
    for level in sorted(set(levels), key=lambda one: ([*said, "none"].index(one[0]), one[1])):
        what = said.get(level[0], "no attention over an image")
        pooled = f" over squares of {level[1]} × {level[1]} patches" if level[1] > 1 else ""
        whom = "" if len(set(levels)) == 1 else f" ({count(levels.count(level), 'item')})"
        parts.append(f"{what}{pooled}{whom}")
    return f"This page holds {'; '.join(parts)}; weights to 1/255 of the largest of each map."


def page_data(entries: Sequence[Entry], *, keep_address: bool) -> Markup:
    """The data of a viewer as JSON that can stand in a script element.

    Args:
        entries: the items.
        keep_address: whether what is picked is written into the address of the page.
    """
    tasks = dict.fromkeys(str(one.header.get("task", "")) for one in entries)
    known = {label for one in entries for label in one.header.get("labels", ())}
    content = {
        "items": [_item(one) for one in entries],
        "colours": _colours(),
        "signals": {
            name: {"title": one.title, "meaning": one.meaning, "sign": one.sign} for name, one in SIGNALS.items()
        },
        "legend": [kind for task in tasks for kind in _KINDS.get(task, ()) if known - {"other"}],
        "onlyLabel": "only wrong answers" if list(tasks) == ["pope"] else "only with hallucinations",
        "hash": keep_address,
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # inside a script element only "<" can end it or open a comment
    return Markup(text.replace("<", "\\u003c"))


def _item(one: Entry) -> dict[str, Any]:
    head = one.header
    picture = f"data:image/{one.kind};base64,{base64.b64encode(one.picture).decode()}" if one.picture else ""
    return {
        "item": head["item"],
        "text": head["text"],
        "wrong": bool({"hallucinated", "wrong"} & set(head.get("labels", ()))),
        "picture": picture,
        "data": base64.b64encode(packed(head, one.arrays)).decode(),
    }


def _colours() -> list[list[int]]:
    """The colour map as red, green, blue of 0 to 255, from the least to the most."""
    table = matplotlib.colormaps[MAP](np.linspace(0, 1, _COLOURS))[:, :3]
    return [[round(255 * float(part)) for part in one] for one in table]


@dataclass(frozen=True)
class Percentiles:
    """Where a value of a signal stands among all named objects."""

    values: Mapping[str, np.ndarray[Any, Any]]
    among: str

    @staticmethod
    def of(data: RunData, headers: Sequence[Mapping[str, Any]]) -> Percentiles:
        """Among the run's own ledger where the signals are from it, else among the items of the viewer."""
        own = {(one["condition"], one["dataset"]) for one in headers if one["signals"]["source"] == "run"}
        tables = [
            data.table(name, "condition", "dataset", "token") for name in data.table_names if name.endswith("_ledger")
        ]
        for frame in tables:
            chosen = (
                [
                    frame[(frame["condition"].astype(str) == condition) & (frame["dataset"].astype(str) == dataset)]
                    for condition, dataset in sorted(own)
                ]
                if frame is not None
                else []
            )
            if chosen:
                rows = pd.concat(chosen)
                names = [name for name in rows if pd.api.types.is_numeric_dtype(rows[name])]
                return _ranked({str(name): rows[name].to_numpy(dtype=float) for name in names}, len(rows), "this run")
        found: dict[str, list[float]] = {}
        n_rows = 0
        for one in headers:
            for row in one["signals"]["rows"]:
                n_rows += 1
                for name, value in zip(one["signals"]["names"], row["values"], strict=True):
                    found.setdefault(name, []).append(np.nan if value is None else value)
        return _ranked({name: np.array(values) for name, values in found.items()}, n_rows, "the items shown here")

    def put(self, signals: Mapping[str, Any]) -> dict[str, Any]:
        """The signals of an item with the percentile of each value, and what it is among."""
        rows = [
            {
                **row,
                "percentiles": [
                    self._place(name, value) for name, value in zip(signals["names"], row["values"], strict=True)
                ],
            }
            for row in signals["rows"]
        ]
        return {**signals, "rows": rows, "among": self.among}

    def _place(self, name: str, value: float | None) -> float | None:
        """The share of values below, and half of those that are equal, in per cent; None where there are too few."""
        values = self.values.get(name)
        if value is None or values is None or len(values) < FEWEST:
            return None
        below, equal = float((values < value).mean()), float((values == value).mean())
        return round(100 * (below + equal / 2), 1)


def _ranked(values: Mapping[str, np.ndarray[Any, Any]], n_rows: int, whose: str) -> Percentiles:
    finite = {name: one[np.isfinite(one)] for name, one in values.items()}
    among = f"Percentiles are among the {count(n_rows, 'named object')} of {whose}; small marks are the others of this text."
    if n_rows < FEWEST:
        among = f"{count(n_rows, 'named object')} of {whose}: too few for percentiles, so values alone are given."
    return Percentiles(finite, among)
