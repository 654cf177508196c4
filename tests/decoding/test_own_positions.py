"""Models that count positions by themselves (multimodal rotary embedding of Qwen-VL): forward, generate and batches agree,
and what the model keeps of a run is put back."""

from __future__ import annotations

import pytest
import torch
from tiny_models import qwen

from slitlamp.tracing import sites
from slitlamp.vlm import VLM

MARK = "<|image_pad|>"


@pytest.fixture(scope="module", params=list(qwen.BUILDERS))
def vlm(request) -> VLM:
    return qwen.BUILDERS[request.param]()


@pytest.fixture
def rows(image):
    """Images and prompts: two sizes, two images, and no image."""
    pictures = [[image(0)], [image(1, 40, 24)], None, [image(2, 24, 44), image(3, 30, 30)]]
    texts = [f"{MARK} is there a dog", f"what {MARK}", "where is the cat", f"is {MARK} and {MARK} red ?"]
    return list(zip(pictures, texts, strict=True))


def spoken(vlm, logits):
    """The greedy choice: the tiny models may not say special tokens."""
    logits = logits.clone()
    logits[..., vlm.model.generation_config.suppress_tokens] = -torch.inf
    return logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("without_images", [False, True])
def test_generation_is_what_one_forward_pass_over_the_whole_text_says(without_images, vlm, rows):
    batch = vlm.encode(*zip(*rows, strict=True))
    batch = batch.without_images() if without_images else batch
    with vlm.trace(sites.resid_post(positions="last"), sites.attention(queries="last", keys="all")) as steps:
        generation = vlm.generate(batch, max_new_tokens=6, eos_token_id=[])
    forced = generation.teacher_forced()
    before = sites.resid_post(positions="before_generated")
    rows_of = sites.attention(queries="before_generated", keys="all")
    with vlm.trace(before, rows_of) as once:
        logits = vlm.forward(forced).logits[:, -7:-1]
    assert [list(one) for one in generation.tokens] == spoken(vlm, logits)
    for layer in range(3):
        torch.testing.assert_close(once["resid_post"][layer], steps["resid_post"][layer], rtol=0, atol=1e-4)
        for row, length in enumerate(batch.lengths):
            one, two = (trace["attention"][layer][row, ..., :length] for trace in (once, steps))
            torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


def test_a_row_alone_and_in_a_batch_give_the_same(vlm, rows):
    batch = vlm.encode(*zip(*rows, strict=True))
    logits = vlm.forward(batch).logits
    generation = vlm.generate(batch, max_new_tokens=5)
    for row, (pictures, text) in enumerate(rows):
        one = vlm.encode([pictures], [text])
        torch.testing.assert_close(vlm.forward(one).logits[0], logits[row, -one.length :], rtol=0, atol=1e-4)
        assert vlm.generate(one, max_new_tokens=5).tokens[0] == generation.tokens[row]


def test_forward_counts_as_the_model_does_when_nothing_is_padded(vlm, rows):
    one = vlm.encode(*zip(rows[3], strict=True))
    with torch.no_grad():
        wanted = vlm.model(**one.inputs()).logits
    assert torch.equal(vlm.forward(one).logits, wanted)
    text = vlm.encode(*zip(rows[2], strict=True))
    with torch.no_grad():
        wanted = vlm.model(**text.inputs()).logits
    torch.testing.assert_close(vlm.forward(text).logits, wanted, rtol=0, atol=1e-6)


def test_what_the_model_keeps_of_a_run_is_put_back(vlm, rows):
    """A user in the midst of a conversation of their own finds the model's `rope_deltas` as they were."""
    batch = vlm.encode(*zip(*rows, strict=True))
    inner = vlm.model.model
    with torch.no_grad():
        vlm.model(**batch.inputs())
    mine = inner.rope_deltas
    assert mine is not None
    vlm.forward(batch)
    assert inner.rope_deltas is mine
    vlm.generate(batch, max_new_tokens=2)
    assert inner.rope_deltas is mine
    one = vlm.encode(*zip(rows[1], strict=True))
    plain = vlm.forward(one).logits
    inner.rope_deltas = None
    assert torch.equal(vlm.forward(one).logits, plain)  # nor does a run read what an earlier one left
    assert inner.rope_deltas is None
    handle = vlm.model.lm_head.register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            vlm.generate(one, max_new_tokens=2)
    finally:
        handle.remove()
    assert inner.rope_deltas is None


def fail(*args):
    raise RuntimeError("on purpose")
