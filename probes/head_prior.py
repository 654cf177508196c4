"""The language prior: what the model says to the same prefix when the image is gone (figure 1)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.head_tokens import UNKNOWN, Bootstrap

MAX_BINS = 16
"""Most bins of places in the caption."""
COLUMNS = ("kl", "log_p", "log_p_image_free", "top", "top_image_free")


def prior_values(logits: Tensor, image_free: Tensor, emitted: Tensor) -> dict[str, Tensor]:
    """What the image changes about each generated token.

    Args:
        logits: [token, vocabulary], with the image.
        image_free: the same without it, after the same prefix.
        emitted: int64 [token], the generated tokens.

    Returns:
        [token] each: `kl`, the divergence of the prediction with the image from that without it, in nats; `log_p` and
        `log_p_image_free` of the generated token; `top` and `top_image_free`, the most probable tokens.
    """
    own, free = logits.float().log_softmax(dim=-1), image_free.float().log_softmax(dim=-1)
    gap = torch.where(own.isneginf(), 0.0, own - free)  # a token that cannot be said adds nothing
    place = emitted.to(own.device)[:, None]
    return {
        "kl": (own.exp() * gap).sum(dim=-1).clamp(min=0),
        "log_p": own.gather(1, place)[:, 0],
        "log_p_image_free": free.gather(1, place)[:, 0],
        "top": own.argmax(dim=-1),
        "top_image_free": free.argmax(dim=-1),
    }


def prior_tables(tokens: pd.DataFrame, bootstrap: Bootstrap) -> dict[str, pd.DataFrame]:
    """Tables `prior` (by kind of word) and `prior_place` (by place in the caption).

    Columns: kl, in nats; same, the share of tokens whose most probable token is the same without the image; same_chance,
    that share if the two were dealt out at random among the tokens of the kind; gain, what the image adds to log p of the
    generated token; each with its interval over items; n_tokens and n_items.
    """
    known = tokens.assign(
        same=(tokens["top"] == tokens["top_image_free"]).astype(float),
        gain=tokens["log_p"] - tokens["log_p_image_free"],
    )
    rows = [{"label": "all", **_row(known, bootstrap)}]
    for label, part in known[known["label"] != UNKNOWN].groupby("label"):
        rows.append({"label": label, **_row(part, bootstrap)})
    width = -(-(int(known["token"].max()) + 1) // MAX_BINS)
    places = [
        {"first": int(number) * width, "last": (int(number) + 1) * width - 1, **_row(part, bootstrap)}
        for number, part in known.groupby(known["token"] // width)
    ]
    return {"prior": pd.DataFrame(rows), "prior_place": pd.DataFrame(places)}


def _row(part: pd.DataFrame, bootstrap: Bootstrap) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in ("kl", "same", "gain"):
        one = bootstrap.mean(part, name)
        found |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    shares, free_shares = (part[name].value_counts(normalize=True) for name in ("top", "top_image_free"))
    chance = float(np.sum(shares.mul(free_shares, fill_value=0.0)))
    return {**found, "same_chance": chance, "n_tokens": len(part), "n_items": part["group"].nunique()}
