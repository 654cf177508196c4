"""Tables of `TokenAblation`: effects of every set and its controls, their contrasts, and the sizes of the sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from probes.image_means import Images
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


def effects_table(ablated: Ablated, images: Images) -> pd.DataFrame:
    """Change of log p and share of changed predictions by set, what was ablated, and kind of token; items count equally."""
    rows = []
    for number, role, known in ablated.cells():
        for kind, name in enumerate(ablated.kinds):
            values = np.stack(
                [ablated.change[known, number, kind, role], ablated.flipped[known, number, kind, role]], axis=1
            )
            one, flip = images.only(known).means(values)
            rows.append(
                {
                    "set": ablated.sets[number], "ablated": name, "role": ROLES[role],
                    "change": one.value, "low": one.low, "high": one.high,
                    "flipped": flip.value, "flipped_low": flip.low, "flipped_high": flip.high,
                    "n_tokens": int(ablated.n_tokens[known, role].sum()), "n_items": int(known.sum()),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def contrasts_table(ablated: Ablated, images: Images) -> pd.DataFrame:
    """The set minus its controls, item by item: change of log p (nats) and share of changed predictions, with p values
    (bootstrap; `p_adjusted` by Benjamini and Hochberg over the changes of the table).
    """
    rows = []
    for number, role, known in ablated.cells():
        for kind, name in enumerate(ablated.kinds):
            if kind == 0:
                continue
            measured = (ablated.change[known, number, :, role], ablated.flipped[known, number, :, role])
            less = np.stack([one[:, 0] - one[:, kind] for one in measured], axis=1)
            one, flip = images.only(known).means(less, p_value=True)
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


def sets_table(ablated: Ablated, images: Images) -> pd.DataFrame:
    """How many tokens each set has, as a number and as a share of the image's, in items that have it."""
    sizes = np.where(ablated.size > 0, ablated.size, np.nan).astype(np.float64)
    table = images.table(sizes, "tokens")
    share = images.table(sizes / ablated.n_image_tokens[:, None], "share")
    table.insert(0, "set", list(ablated.sets))
    return table.assign(share=share["share"], share_low=share["low"], share_high=share["high"])


def completeness_table(attributed: Array, change: Array, n_steps: int, images: Images) -> pd.DataFrame:
    """Whether integrated gradients are complete: what they attribute to all image tokens against what replacing them costs.

    Args:
        attributed: [item], the sum of the integrated gradients.
        change: [item], log p of the target as it is minus that with all image tokens replaced.
        n_steps: of the integral.
        images: which items share an image.

    Returns:
        One row: steps; attributed, change and error = |attributed - change| (nats), means over items with low and high;
        relative_error, the sum of errors over that of |change|; n_items.
    """
    error = np.abs(attributed - change)
    row: dict[str, object] = {"steps": n_steps}
    found = images.means(np.stack([attributed, change, error], axis=1))
    for name, one in zip(("attributed", "change", "error"), found, strict=True):
        row |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    relative = float(error.sum() / np.abs(change).sum()) if change.any() else 0.0
    return pd.DataFrame([{**row, "relative_error": relative, "n_items": len(change)}])


def summary(contrasts: pd.DataFrame, completeness: pd.DataFrame | None) -> str:
    """The first set's tokens against random ones, at the object's word or the answer about it."""
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
    if completeness is not None:
        one = completeness.iloc[0]
        parts.append(
            f"Integrated gradients ({int(one['steps'])} steps) attribute {one['attributed']:.2f} nats to the image tokens; "
            f"replacing all of them costs {one['change']:.2f} (mean error {one['error']:.3f} [{one['error_low']:.3f}, "
            f"{one['error_high']:.3f}])."
        )
    return " ".join(parts)
