"""What `TruthfulDirection` found, in words."""

from __future__ import annotations

import pandas as pd

from probes.truthful_tables import CHOSEN, CONFIDENCE


def summary(tables: dict[str, pd.DataFrame], position: str, reason: str) -> str:
    """What was found, in up to three sentences.

    Args:
        tables: of `TruthfulDirection.result`.
        position: "before" or "at".
        reason: why nothing could be trained, or "".
    """
    if reason:
        return f"Nothing was trained: {reason.rstrip('.')}."
    metrics, layers = tables["metrics"], tables["layers"]
    method = layers["method"].iloc[0]
    rows = metrics[(metrics["method"] == method) & (metrics["metric"] == "auroc")]
    nested = rows[rows["layer"] == CHOSEN]
    one = nested.iloc[0] if len(nested) else rows.loc[rows["value"].idxmax()]
    where = (
        "the layer chosen on other images"
        if len(nested)
        else f"layer {one['layer']}, the best of all: too high a value"
    )
    what = "before an object's first token" if position == "before" else "at an object's first token"
    baseline = tables["baselines"]
    other = baseline[(baseline["method"] == method) & (baseline["baseline"] == CONFIDENCE)].iloc[0]
    best = layers[layers["method"] == method].sort_values("auroc").iloc[-1]
    text = (
        f"States {what} tell hallucinated from true mentions with AUROC {one['value']:.2f} [{one['low']:.2f}, "
        f"{one['high']:.2f}] ({method.replace('_', ' ')}, {where}; {int(one['n_hallucinated'])} hallucinated and "
        f"{int(one['n_true'])} true mentions in {int(one['n_items'])} images); -log p alone: {other['auroc']:.2f}, probe minus "
        f"-log p {other['gain']:+.2f} [{other['gain_low']:+.2f}, {other['gain_high']:+.2f}], probe at equal -log p "
        f"{other['beyond']:.2f} [{other['beyond_low']:.2f}, {other['beyond_high']:.2f}]."
    )
    if pd.notna(best["control_auroc"]):
        text += (
            f" Random labels of the objects reach {best['control_auroc']:.2f} ({best['control_low']:.2f} to "
            f"{best['control_high']:.2f}) at layer {int(best['layer'])}, the best of all, where the true "
            f"ones reach {best['auroc']:.2f}."
        )
    rates = tables["threshold"].query("method == @method").set_index("metric")
    if pd.notna(rates.loc["fpr", "value"]):
        text += (
            f" A threshold set for a false positive rate of {rates['wanted_fpr'].iloc[0]:g} on other images finds "
            f"{rates.loc['tpr', 'value']:.3f} [{rates.loc['tpr', 'low']:.3f}, {rates.loc['tpr', 'high']:.3f}] of the "
            f"hallucinations at a rate of {rates.loc['fpr', 'value']:.3f} [{rates.loc['fpr', 'low']:.3f}, "
            f"{rates.loc['fpr', 'high']:.3f}]."
        )
    return text
