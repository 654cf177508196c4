"""Hidden states with a label: which positions of a batch are samples of a target, and what is kept of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import Site, Trace, sites
from slitlamp.tracing.probe import Array, Labels

POSITIONS = ("before_object", "at_object", "last", "image_mean")
STATES = {
    name: getattr(sites, name)
    for name in (
        *("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "ln1", "ln2"),
        *("z", "mlp_post"),
    )
}
LABEL = "state"
POSITIVES = {"label": "hallucinated", "correct": "correct", "truth": "yes"}
"""Of the targets with two values, the one that counts as positive; other targets are taken one value against the rest."""


def state_site(site: str, layers: Sequence[int] | None, position: str, anatomy: Anatomy) -> Site:
    """What to record for samples at `position`.

    Raises:
        InputError: an unknown site or position, or layers that the model lacks.
    """
    if site not in STATES:
        raise unknown("site of states", site, STATES)
    if position not in POSITIONS:
        raise unknown("position", position, POSITIONS)
    if layers is not None and not (len(layers) and all(0 <= one < anatomy.n_layers for one in layers)):
        raise InputError(f"layers lie between 0 and {anatomy.n_layers - 1}, at least one: found {list(layers)}")
    make = STATES[site]
    if position == "image_mean":
        return make(layers, "image", "mean", label=LABEL)
    # the last position of the prompt is the first that predicts a generated token
    return make(layers, "generated" if position == "at_object" else "before_generated", label=LABEL)


def need_images(batch: Batch) -> None:
    """Refuse rows without an image, which have no mean over it.

    Raises:
        InputError: names them.
    """
    missing = [name for name, row in zip(batch.ids, batch.image_mask, strict=True) if not bool(row.any())]
    if missing:
        raise InputError(f"rows without an image have no mean over it: {', '.join(missing)}")


def samples(table: pd.DataFrame, n_generated: int, position: str, target: str) -> pd.DataFrame:
    """The samples of one row: token, value of the target, and type (the word where nothing else is known).

    At "before_object" and "at_object" they are the mentions of a caption, or the answer of a question; at "last" and
    "image_mean" the first generated token's, which is the answer of a question. Tokens without a value are no samples.

    Args:
        table: labels of the row's tokens (`slitlamp.tracing.probe.Labels`).
        n_generated: tokens of the text.
        position: one of `POSITIONS`.
        target: "label" (object or hallucinated), "correct" (correct or wrong), or a column of the table.

    Raises:
        InputError: the table has no such column.
    """
    rows = table[(table["token"] < n_generated) & (table["label"] != "other")]
    if position in ("last", "image_mean"):
        rows = rows[rows["token"] == 0]
    if target in ("label", "correct"):
        kinds = ("object", "hallucinated") if target == "label" else ("correct", "wrong")
        rows = rows[rows["label"].isin(kinds)]
        value = rows["label"]
    elif target in table:
        rows = rows[rows[target].notna()]
        value = rows[target]
    else:
        raise InputError(f"the labels have no column {target!r}: found {', '.join(map(str, table.columns))}")
    word = rows["word"].astype(str).str.strip().str.lower()
    kind = word if "category" not in rows else rows["category"].where(rows["category"].notna(), word)
    return pd.DataFrame(
        {"token": rows["token"].astype(int), "value": value.astype(str), "type": kind.astype(str)}
    ).reset_index(drop=True)


def gathered_rows(batch: Batch, trace: Trace, labels: Labels | None, position: str, target: str) -> dict[str, Array]:
    """The samples of a batch, for `GatheringProbe._rows`: item, group, token, value, type, and states [sample, layer, d]."""
    if position == "image_mean":
        need_images(batch)
    record = trace[LABEL]
    states = record.stack().flatten(2 if position == "image_mean" else 3).float()  # [layer, batch, (position,) d]
    found: dict[str, list[Array]] = {one: [] for one in ("item", "group", "token", "value", "type", "state")}
    for row, name in enumerate(batch.ids):
        table = labels[row] if labels else None
        if table is None:
            continue
        chosen = samples(table, batch.n_generated[row], position, target)
        if position == "image_mean":
            mine = states[:, row].expand(len(chosen), -1, -1)
        else:
            tokens = chosen["token"].tolist() if position.endswith("_object") else [0] * len(chosen)
            place = torch.tensor(tokens, dtype=torch.long)
            mine = states[:, row][:, place.to(states.device)].transpose(0, 1)
        found["item"].append(np.full(len(chosen), name))
        found["group"].append(np.full(len(chosen), batch.groups[row]))
        found["token"].append(chosen["token"].to_numpy(dtype=np.int64))
        found["value"].append(chosen["value"].to_numpy(dtype=str))
        found["type"].append(chosen["type"].to_numpy(dtype=str))
        found["state"].append(mine.cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items() if parts}


def classes(value: Array, group: Array, target: str, most: int, fewest: int = 2) -> list[str]:
    """The values to tell from the rest: the positive one of a target with two, else the most common ones.

    Args:
        value, group: [sample].
        target: see `samples`.
        most: how many at most.
        fewest: groups that both sides need.

    Raises:
        InputError: no value can be told from the rest.
    """
    names, counts = np.unique(value, return_counts=True)
    ordered = [str(one) for one in names[np.argsort(-counts, kind="stable")]]
    if target in POSITIVES:
        ordered = [POSITIVES[target]]
    elif len(ordered) == 2:
        ordered = ordered[:1]
    usable = [
        one
        for one in ordered
        if min(len(np.unique(group[value == one])), len(np.unique(group[value != one]))) >= fewest
    ]
    if not usable:
        found = ", ".join(f"{name}: {count}" for name, count in zip(names, counts, strict=True)) or "no samples"
        raise InputError(
            f"{target!r} cannot be probed: both sides need samples in at least {fewest} images, found {found}"
        )
    return usable[:most]
