"""The logit lens: what the model would say if it stopped after a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from slitlamp.tracing.trace import Source

_LENS_VALUES: Final = 16_000_000
"""Most logits held at a time (64 MB in float32)."""


def lens_logits(source: Source, states: Tensor) -> Iterator[Tensor]:
    """The logit lens: the model's own final norm and unembedding on states [token, d_model], some tokens at a time.

    Yields:
        [some tokens, vocabulary] in float32, soft-capped where the model does so.
    """
    norm = source.model.get_submodule(source.anatomy.modules["final_norm"])
    head = source.model.get_submodule(source.anatomy.modules["head"])
    cap = source.anatomy.logit_softcap
    with torch.no_grad():
        for some in states.split(max(1, _LENS_VALUES // source.anatomy.d_vocab)):
            logits = head(norm(some[None]))[0].float()
            yield logits if cap is None else cap * torch.tanh(logits / cap)
