"""What `ClsOutliers` found, in a few sentences."""

from __future__ import annotations

import pandas as pd

from probes.outlier_tables import NEIGHBOURS


def summary(tables: dict[str, pd.DataFrame], top_k: int) -> str:
    """Overlap at the number of outliers, concentration, norms, and influence; each with its interval and its control."""
    return " ".join(
        one
        for one in (
            _overlap(tables["overlap"], top_k),
            _towers(tables),
            _massive(tables),
            _influence(tables.get("influence_difference")),
        )
        if one
    )


def _overlap(table: pd.DataFrame, top_k: int) -> str:
    rows = table[(table["query"] == "end of the prompt") & table["features"]]
    row = rows.loc[(rows["i"] - top_k).abs().idxmin()]
    against = f"; against the next image's {row['other_image']:.2f}" if row["other_image"] == row["other_image"] else ""
    return (
        f"Of the {row['i']:.0f} image tokens first in the encoder's attention ({row['encoder']}, layer "
        f"{int(row['encoder_layer'])}), {row['overlap']:.2f} [{row['low']:.2f}, {row['high']:.2f}] are among the decoder's "
        f"first {row['i']:.0f} (chance {row['chance']:.2f}{against}; n = {int(row['n_items'])})."
    )


def _towers(tables: dict[str, pd.DataFrame]) -> str:
    norms, top = tables["norms"][tables["norms"]["stream"] == "tower"], tables["concentration"].iloc[-1]
    largest = norms.loc[norms["largest_ratio"].idxmax()]
    valleys = norms["valley"].notna().sum()
    modes = (
        f"{valleys} of {len(norms)} layers have two modes of norms" if valleys else "norms have one mode in every layer"
    )
    return (
        f"The largest norm in the tower is {largest['largest_ratio']:.2f} times the median (layer {int(largest['layer'])}); "
        f"{modes}. The last layer's first patches hold {top['top_share']:.2f} [{top['low']:.2f}, {top['high']:.2f}] of its "
        f"{top['encoder']} (chance {top['chance']:.2f})."
    )


def _massive(tables: dict[str, pd.DataFrame]) -> str:
    massive, sinks = tables["massive"], tables["sinks"]["sinks"].max()
    some = massive[massive["n_dimensions"] > 0]
    if not len(some):
        largest = massive.loc[massive["times_median"].idxmax()]
        found = f"no activation is massive (the largest is {largest['times_median']:.0f} times the median of its state)"
    else:
        places = ", ".join(f"{one.stream} layer {one.layer}" for one in some.itertuples())
        found = f"activations are massive in {places}"
    return f"{found[0].upper()}{found[1:]}; at most {sinks:.1f} image tokens of an item are attention sinks of the decoder."


def _influence(table: pd.DataFrame | None) -> str:
    if table is None:
        return ""
    found = {(row["tokens"], row["compared"]): row for _, row in table[table["features"]].iterrows() if row["n_images"]}
    if ("influence", "within images") not in found:
        return ""
    one, other = found["influence", "within images"], found["matched", "within images"]
    beside = found.get(("influence", NEIGHBOURS))
    place = ""
    if beside is not None:
        place = (
            f"; against the true objects named before and after: {beside['difference']:+.3f} [{beside['low']:+.3f}, "
            f"{beside['high']:+.3f}], n = {int(beside['n_images'])}"
        )
    return (
        f"At hallucinated objects the decoder's attention to the first tokens differs from that at true ones by "
        f"{one['difference']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}] (matched tokens: {other['difference']:+.3f} "
        f"[{other['low']:+.3f}, {other['high']:+.3f}]; n = {int(one['n_images'])}{place})."
    )
