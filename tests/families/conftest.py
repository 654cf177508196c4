"""Each family's tiny model with a batch, what is recorded of it, and what Hugging Face's eager attention computes."""

from __future__ import annotations

import pytest
from contract import CONTINUATIONS, Setting, all_sites, encode, pictures_of
from eager import Eager
from tiny_models import BUILDERS


@pytest.fixture(scope="session", params=list(BUILDERS))
def setting(request: pytest.FixtureRequest) -> Setting:
    """Each family in turn."""
    vlm = BUILDERS[request.param]()
    pictures = pictures_of(vlm)
    prompts = encode(vlm, pictures)
    ids = [vlm.tokenizer.convert_tokens_to_ids(list(words)) for words in CONTINUATIONS]
    batch = prompts.with_continuation(ids[: prompts.size])
    eager = Eager(vlm, batch)
    with vlm.trace(*all_sites(vlm)) as trace:
        out = vlm.forward(batch)
    return Setting(request.param, vlm, pictures, batch, trace, out.logits, eager)
