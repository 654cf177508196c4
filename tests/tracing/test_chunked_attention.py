"""Attention within chunks (Llama 4), in a prompt longer than a chunk and in decoding, where the cache is cut."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models.llama4 import build

from slitlamp.tracing import sites
from slitlamp.vlm import VLM

CHUNK = 16


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return build(chunk=CHUNK)


@pytest.fixture(scope="module")
def batch(vlm, image):
    mark = "<|image|>"
    pictures = [[image(0, 10, 12)], None, [image(1, 40, 24), image(2, 16, 40)]]
    return vlm.encode(pictures, [f"{mark} is there a dog", "where is the cat", f"is {mark} and {mark} red ?"])


def test_rows_are_those_of_eager_and_reach_no_further_than_the_chunk(vlm, batch):
    with vlm.trace(sites.attention(queries="all", keys="all")) as trace:
        vlm.forward(batch)
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation("eager")
    positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        eager = model(**batch.inputs(), position_ids=positions, output_attentions=True).attentions
    assert max(batch.lengths) > 2 * CHUNK
    assert vlm.anatomy.attention_types == ("chunked_attention", "chunked_attention", "full_attention")
    for layer, kind in enumerate(vlm.anatomy.attention_types):
        for row, length in enumerate(batch.lengths):
            found = trace["attention"][layer][row, :, :length, :length]
            torch.testing.assert_close(found, eager[layer][row, :, -length:, -length:], rtol=0, atol=1e-5)
            place = torch.arange(length)
            reached = (place[:, None] >= place[None, :]).expand(4, -1, -1)
            if kind == "chunked_attention":
                reached = reached & (place[:, None] // CHUNK == place[None, :] // CHUNK)
            assert torch.equal(found > 0, reached)


def test_decoding_gives_the_rows_of_one_forward_pass(vlm, batch):
    wanted = (sites.attention(queries="last", keys="all"), sites.resid_post(positions="last"))
    with vlm.trace(*wanted) as steps:
        generation = vlm.generate(batch, max_new_tokens=CHUNK + 3, eos_token_id=[])
    wanted = (
        sites.attention(queries="before_generated", keys="all"),
        sites.resid_post(positions="before_generated"),
    )
    with vlm.trace(*wanted) as once:
        vlm.forward(generation.teacher_forced())
    for layer in range(3):
        torch.testing.assert_close(steps["resid_post"][layer], once["resid_post"][layer], rtol=0, atol=1e-4)
        found, expected = steps["attention"][layer], once["attention"][layer]
        assert not expected[..., found.shape[-1] :].any()  # the last token, which nothing reads
        torch.testing.assert_close(found, expected[..., : found.shape[-1]], rtol=0, atol=1e-5)
