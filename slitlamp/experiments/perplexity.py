"""How likely the unmodified model finds what was generated under a condition: what a change of decoding costs in language."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from slitlamp.evaluation.statistics import Interval, cluster_bootstrap, paired_bootstrap, ratio
from slitlamp.tracing import sites

if TYPE_CHECKING:
    from slitlamp.decoding import Generation
    from slitlamp.vlm import VLM

FloatArray = NDArray[np.float64]


def negative_log_likelihood(vlm: VLM, generation: Generation) -> list[float]:
    """Per row, the sum over its generated tokens, the end token included, of -log p in nats under what is in force."""
    batch = generation.teacher_forced()
    with vlm.trace(sites.logits(positions="before_generated", label="perplexity")) as trace:
        vlm.forward(batch)
    log_p = trace["perplexity"][0].float().log_softmax(dim=-1)  # [row, token, vocab]
    found = []
    for row, tokens in enumerate(generation.tokens):
        ids = torch.tensor(tokens, device=log_p.device)
        found.append(-float(log_p[row, : len(tokens)].gather(1, ids[:, None]).double().sum()))
    return found


def perplexity_scores(rows: pd.DataFrame, **bootstrap: Any) -> pd.DataFrame:
    """The perplexity of some texts, exp(sum of -log p / tokens), with its interval over images.

    Args:
        rows: a row per text, with columns nll and n_tokens; one text per image.
        bootstrap: of `cluster_bootstrap`.

    Returns:
        One row: metric, value, low, high, n_images.
    """
    return _row(cluster_bootstrap(_counts(rows), _perplexity, **bootstrap), len(rows))


def perplexity_differences(rows_a: pd.DataFrame, rows_b: pd.DataFrame, **bootstrap: Any) -> pd.DataFrame:
    """The perplexity of b minus that of a, of texts about the same images in the same order: as `perplexity_scores`, and p."""
    return _row(paired_bootstrap(_counts(rows_a), _counts(rows_b), _perplexity, **bootstrap), len(rows_a))


def _counts(rows: pd.DataFrame) -> FloatArray:
    return rows[["nll", "n_tokens"]].to_numpy(dtype=np.float64)


def _perplexity(sums: FloatArray) -> FloatArray:
    return np.exp(ratio(sums[..., 0], sums[..., 1]))


def _row(found: Interval | list[Interval], n_images: int) -> pd.DataFrame:
    assert isinstance(found, Interval)
    row = {"metric": "perplexity", "value": found.value, "low": found.low, "high": found.high, "n_images": n_images}
    return pd.DataFrame([row | ({} if found.p is None else {"p": found.p})])
