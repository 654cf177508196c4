"""What head divergence found, in a few sentences."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd


def summary(tables: Mapping[str, pd.DataFrame], contrast: str) -> str:
    """The most divergent head; what T-VHD tells apart; what the image changes."""
    heads = tables["heads"]
    top = heads.loc[heads["vhd"].idxmax()]
    median = heads["vhd"].median()
    times = f", {top['vhd'] / median:.1f} times the median head" if median > 0 else ""
    text = (
        f"The most divergent head is {int(top['layer'])}.{int(top['head'])}: VHD {top['vhd']:.2f} [{top['low']:.2f}, "
        f"{top['high']:.2f}]{times} (image {contrast}, n = {int(top['n_items'])})."
        if top["vhd"] > 0
        else f"No head's output depends on the image (n = {int(top['n_items'])})."
    )
    areas = tables.get("t_vhd_auroc")
    if areas is not None and len(areas) and areas["auroc"].notna().any():
        row = areas.iloc[len(areas) // 2]
        text += (
            f" Low T-VHD (k = {int(row['k'])}) tells hallucinated from true objects with AUROC {row['auroc']:.2f} "
            f"[{row['low']:.2f}, {row['high']:.2f}]; a late mention alone does so with {row['place_auroc']:.2f}, T-VHD less "
            f"its mean at the mention with {row['adjusted_auroc']:.2f} [{row['adjusted_low']:.2f}, "
            f"{row['adjusted_high']:.2f}]."
        )
    prior = tables.get("prior")
    if prior is not None:
        row = prior.iloc[0]
        text += (
            f" Without the image the most probable token is the same at {row['same']:.2f} [{row['same_low']:.2f}, "
            f"{row['same_high']:.2f}] of the tokens (chance {row['same_chance']:.2f}; n = {int(row['n_tokens'])})."
        )
    return text
