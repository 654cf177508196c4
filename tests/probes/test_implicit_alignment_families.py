"""IMA in families that lack a tap, cap their logits, add image features between blocks, or have no image tokens at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import BUILDERS

from probes import ImplicitAlignment
from probes.alignment_vocabulary import Lens
from slitlamp.errors import UnsupportedError
from slitlamp.models import Batch
from slitlamp.tracing import sites
from slitlamp.vlm import VLM


def encoded(vlm: VLM, image: Any) -> Batch:
    batch = vlm.encode(
        images=[image(n, 64, 48) for n in range(2)],
        prompts=[f"{vlm.processor.image_token} is there a dog ?"] * 2,
        ids=["a", "b"],
    )
    return batch.with_continuation([[6, 7, 8], [6, 7]])


@pytest.mark.parametrize("family", ["aya_vision", "paligemma gemma2", "qwen3_vl"])
def test_the_lens_after_the_last_block_is_the_prediction(family: str, image: Any) -> None:
    """Soft caps, scales and norms of every kind: what the head of `Lens` gives is what the model gives."""
    vlm = BUILDERS[family]()
    batch = encoded(vlm, image)
    with vlm.trace(sites.resid_post(), sites.logits(positions="all")) as trace:
        vlm.forward(batch)
    assert trace.source is not None
    row = trace.mask("resid_post")[0]
    found = Lens(trace.source).log_probabilities(trace["resid_post"][vlm.anatomy.n_layers - 1][0][row])
    torch.testing.assert_close(found, trace["logits"][0][0][row].float().log_softmax(dim=-1), rtol=0, atol=1e-5)


def test_a_family_without_a_tap_says_so(image: Any) -> None:
    vlm = BUILDERS["aya_vision"]()
    probe = ImplicitAlignment(n_resamples=20, embedding="none", reductions=["avg"], vocabulary=False)
    vlm.measure(probe, encoded(vlm, image))
    result = probe.result()
    assert "This family has no resid_mid, ln2." in result.summary
    assert set(result.tables["inside"]["tap"]) == {"ln1", "attn_out", "mlp_post", "mlp_out", "resid_post"}


def test_models_that_read_the_image_by_cross_attention_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="no image tokens in the residual stream"):
        ImplicitAlignment().sites(BUILDERS["mllama"]().anatomy)
