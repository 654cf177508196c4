"""The positions that predict what is generated, whether the tokens come one by one or all at once."""

from __future__ import annotations

import torch

from slitlamp.models import Batch
from slitlamp.tracing.sites import Positions


def predicting_rows(batch: Batch) -> tuple[Positions, Positions]:
    """The last position of the prompt, bool [batch, position], and the name of the generated ones: disjoint."""
    place = torch.arange(batch.length, device=batch.device)
    return place == batch.last_prompt_position[:, None], "generated"
