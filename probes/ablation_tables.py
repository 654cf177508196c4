"""Tables of `TokenAblation`: effects of every set and its controls, their contrasts, and the sizes of the sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from probes.outlier_data import Resampling, intervals, mean_intervals
from slitlamp.evaluation.statistics import benjamini_hochberg
from slitlamp.tracing.probe import Array

ABLATED = ("set", "random", "shifted")
ROLES = (
    *("named object", "other true objects", "hallucinated objects", "other words"),
    *("answer, object in the image", "answer, object not in the image"),
)


@dataclass(frozen=True, eq=False)
class Ablated:
    """What was measured, item by item.

    Attributes:
        sets, kinds: names of the sets, and of what was ablated: the set, and its controls.
        change: [item, set, kind, role], mean change of log p (nats) over the item's tokens of a role; NaN where there is none.
        flipped: the same of the share of changed predictions.
        n_tokens: [item, role].
        size: [item, set], how many tokens.
        n_image_tokens: [item].
    """

    sets: Sequence[str]
    kinds: Sequence[str]
    change: Array
    flipped: Array
    n_tokens: Array
    size: Array
    n_image_tokens: Array

    def cells(self) -> Iterator[tuple[int, int, Array]]:
        """Sets and roles that were measured together, and in which items (bool [item])."""
        for number in range(len(self.sets)):
            for role in range(len(ROLES)):
                known = np.isfinite(self.change[:, number, 0, role])
                if known.any():
                    yield number, role, known


def effects_table(ablated: Ablated, resampling: Resampling) -> pd.DataFrame:
    """Change of log p and share of changed predictions by set, what was ablated, and kind of token; items count equally."""
    rows = []
    for number, role, known in ablated.cells():
        for kind, name in enumerate(ablated.kinds):
            values = np.stack(
                [ablated.change[known, number, kind, role], ablated.flipped[known, number, kind, role]], axis=1
            )
            one, flip = intervals(values, resampling)
            rows.append(
                {
                    "set": ablated.sets[number], "ablated": name, "role": ROLES[role],
                    "change": one.value, "low": one.low, "high": one.high,
                    "flipped": flip.value, "flipped_low": flip.low, "flipped_high": flip.high,
                    "n_tokens": int(ablated.n_tokens[known, role].sum()), "n_items": int(known.sum()),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def contrasts_table(ablated: Ablated, resampling: Resampling) -> pd.DataFrame:
    """The set minus its controls, item by item: change of log p (nats) and share of changed predictions, with p values
    (bootstrap; `p_adjusted` by Benjamini and Hochberg over the changes of the table).
    """
    rows = []
    for number, role, known in ablated.cells():
        for kind, name in enumerate(ablated.kinds):
            if kind == 0:
                continue
            measured = (ablated.change[known, number, :, role], ablated.flipped[known, number, :, role])
            one, flip = intervals(np.stack([m[:, 0] - m[:, kind] for m in measured], axis=1), resampling, p_value=True)
            rows.append(
                {
                    "set": ablated.sets[number], "control": name, "role": ROLES[role],
                    "difference": one.value, "low": one.low, "high": one.high, "p": one.p,
                    "flipped": flip.value, "flipped_low": flip.low, "flipped_high": flip.high, "flipped_p": flip.p,
                    "n_items": int(known.sum()),
                }
            )  # fmt: skip
    table = pd.DataFrame(rows)
    some = bool(table["p"].notna().any())
    return table.assign(p_adjusted=benjamini_hochberg(table["p"].astype(float)) if some else np.nan)


def sets_table(ablated: Ablated, resampling: Resampling) -> pd.DataFrame:
    """How many tokens each set has, as a number and as a share of the image's, in items that have it."""
    sizes = np.where(ablated.size > 0, ablated.size, np.nan).astype(np.float64)
    table = mean_intervals(sizes, resampling, "tokens")
    share = mean_intervals(sizes / ablated.n_image_tokens[:, None], resampling, "share")
    table.insert(0, "set", list(ablated.sets))
    return table.assign(share=share["share"], share_low=share["low"], share_high=share["high"])


def summary(contrasts: pd.DataFrame) -> str:
    """The object's own tokens against shifted and random ones, at its word or the answer about it."""
    parts: list[str] = []
    for role in ("named object", "answer, object in the image", "other words"):
        rows = contrasts[(contrasts["role"] == role) & (contrasts["control"] == "random")]
        if not len(rows) or (parts and role == "other words"):
            continue
        row = rows.iloc[0]
        change = f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
        flips = f"{row['flipped']:+.2f} [{row['flipped_low']:+.2f}, {row['flipped_high']:+.2f}]"
        parts.append(
            f"Replacing the tokens of the set {row['set']!r} changes log p ({role}) by {change} nats against as many random "
            f"tokens, and changes {flips} of the predictions more (n = {int(row['n_items'])})."
        )
    return " ".join(parts)
