"""The figures of probes' results, found by `ProbeResult.figures` through the entry points `slitlamp.probe_figures`."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure

from slitlamp.reports import heads, summaries
from slitlamp.reports.style import WIDE, new_figure


def head_divergence(tables: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
    """The layer x head map, every head with its interval, and T-VHD by kind of word where words are labelled.

    Args:
        tables: of `HeadDivergence`: `heads`, and `tokens` and `t_vhd` where there was a continuation.
    """
    drawn = {}
    for name, draw in (("head_map", heads.head_map), ("head_intervals", heads.head_intervals)):
        drawn[name] = new_figure(WIDE, 3.2)
        draw(tables["heads"], drawn[name].add_subplot())
    tokens = tables.get("tokens")
    if tokens is not None and (tokens["label"] != "").any():
        column, k = summaries.t_vhd_column(tokens)
        means = tables["t_vhd"]
        drawn["t_vhd_histogram"] = new_figure(WIDE, 3.6)
        labelled = tokens[tokens["label"] != ""]
        heads.t_vhd_histogram(labelled, column, means[means["k"] == k], drawn["t_vhd_histogram"].add_subplot())
    return drawn
