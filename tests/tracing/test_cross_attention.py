"""Attention to the image in a model that reads it by cross-attention, against Hugging Face's eager attention."""

import copy

import pytest
import torch
from tiny_models import mllama

from slitlamp.errors import SlitlampError
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

CROSS = mllama.CROSS_LAYERS
TEXTS = ["<|image|> is there a dog ?", "is there a <|image|> dog ?", "<|image|> what ?"]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return mllama.build()


@pytest.fixture(scope="module")
def batch(vlm, image):
    """Images of 2, 4 and 1 tiles, text before one of them."""
    pictures = [image(0), image(1, 40, 40), image(2, 16, 16)]
    return vlm.encode(pictures, TEXTS).with_continuation([[12, 13], [14], []])


def eager(vlm, batch):
    """Weights of every layer [batch, head, query, key], keys of cross-attention padding included, and hidden states."""
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation("eager")
    weights, states = {}, {}
    for layer in range(vlm.anatomy.n_layers):
        module = model.get_submodule(vlm.anatomy.attention(layer))
        module.register_forward_hook(lambda m, a, out, layer=layer: weights.__setitem__(layer, out[1]))
        block = model.get_submodule(vlm.anatomy.blocks[layer])
        block.register_forward_hook(lambda m, a, out, layer=layer: states.__setitem__(layer, out))
    with torch.no_grad():
        model(**batch.inputs())
    return weights, states


def test_weights_are_those_of_eager_in_the_order_of_the_patches(vlm, batch):
    weights, states = eager(vlm, batch)
    with vlm.trace(sites.cross_attention(queries="all"), sites.resid_post()) as trace:
        vlm.forward(batch)
    record = trace["cross_attention"]
    assert record.layers == tuple(CROSS)
    mask, key_mask = record.mask, record.key_mask
    for row in range(batch.size):
        count, keys = batch.lengths[row], len(batch.patches[row])
        assert mask[row].tolist() == [True] * count + [False] * (mask.shape[1] - count)
        assert key_mask[row].tolist() == [True] * keys + [False] * (key_mask.shape[1] - keys)
        for layer in CROSS:
            found = record[layer][row, :, :count]
            wanted = weights[layer][row][:, batch.real_mask[row]][:, :, batch.cross_mask[row]]
            torch.testing.assert_close(found[:, :, :keys], wanted, rtol=0, atol=1e-5)
            assert not found[:, :, keys:].any()
        for layer in range(vlm.anatomy.n_layers):
            torch.testing.assert_close(
                trace["resid_post"][layer][row, :count], states[layer][row][batch.real_mask[row]], rtol=0, atol=1e-4
            )


def test_text_after_an_image_attends_to_the_image_alone(vlm, batch):
    with vlm.trace(sites.cross_attention(queries="text_after_image", reduce_keys="sum")) as trace:
        vlm.forward(batch)
    for layer in CROSS:
        after = trace["cross_attention"][layer].transpose(1, 2)[trace.mask("cross_attention")]
        torch.testing.assert_close(after, torch.ones_like(after), rtol=0, atol=1e-5)


def test_text_before_an_image_reads_the_padding_too(vlm, image):
    """Hugging Face masks nothing in the rows of text that has no image before it. An image of one tile has three tiles of
    padding, which such text reads, and the image token and what comes after it do not."""
    batch = vlm.encode([image(0, 16, 16)], ["is there a <|image|> dog ?"])
    with vlm.trace(sites.cross_attention(queries="all", reduce_keys="sum")) as trace:
        vlm.forward(batch)
    at = int(batch.image_mask[0].nonzero()[0])
    for layer in CROSS:
        on_image = trace["cross_attention"][layer][0]  # [head, query]
        assert (on_image[:, :at] < 0.99).all()
        torch.testing.assert_close(on_image[:, at:], torch.ones_like(on_image[:, at:]), rtol=0, atol=1e-5)


def test_steps_of_a_generation_attend_as_one_pass_does(vlm, image):
    """At decode steps the keys are those of the cache."""
    batch = vlm.encode([image(0), image(1, 40, 40)], TEXTS[:2])
    asked = [
        sites.cross_attention(queries="last"),
        sites.attention(queries="last", keys="all"),
        sites.z(positions="last"),
    ]
    with vlm.trace(*asked) as steps:
        generation = vlm.generate(batch, max_new_tokens=4)
    fed = [tokens[:-1] for tokens in generation.tokens]
    whole = batch.with_continuation(fed)
    with vlm.trace(
        sites.cross_attention(queries="before_generated"),
        sites.cross_attention(queries="last", label="last"),
        sites.z(positions="before_generated"),
        sites.z(positions="last", label="z last"),
    ) as once:
        vlm.forward(whole)
    for row, tokens in enumerate(fed):
        for layer in CROSS:
            found = steps["cross_attention"][layer][row, :, : len(tokens)]
            torch.testing.assert_close(found, once["cross_attention"][layer][row, :, : len(tokens)], rtol=0, atol=1e-5)
            last = steps["cross_attention"][layer][row, :, len(tokens)]
            torch.testing.assert_close(last, once["last"][layer][row, :, 0], rtol=0, atol=1e-5)
        for layer in range(vlm.anatomy.n_layers):
            torch.testing.assert_close(
                steps["z"][layer][row, : len(tokens)], once["z"][layer][row, : len(tokens)], rtol=0, atol=1e-4
            )
    assert steps["attention"].layers == (0, 2)


def test_parts_of_a_cross_attention_block_add_up(vlm, batch):
    """The gate's tanh is in `attn_out`; there is no `mlp_out`, which is masked at text before an image, too."""
    with vlm.trace(
        sites.resid_pre(), sites.resid_mid(), sites.attn_out(), sites.resid_post(), sites.mlp_out(), sites.ln1()
    ) as trace:
        vlm.forward(batch)
    kept = trace.mask("resid_pre")
    for layer in range(vlm.anatomy.n_layers):
        pre, mid, out = (trace[name][layer][kept] for name in ("resid_pre", "resid_mid", "attn_out"))
        torch.testing.assert_close(mid, pre + out, rtol=0, atol=1e-5)
        assert out.abs().max() > 1e-2
    assert trace["mlp_out"].layers == (0, 2)
    for layer in (0, 2):
        torch.testing.assert_close(
            trace["resid_post"][layer][kept],
            (trace["resid_mid"][layer] + trace["mlp_out"][layer])[kept],
            rtol=0,
            atol=1e-5,
        )


def test_text_without_an_image_skips_the_layers(vlm):
    batch = vlm.encode(None, ["is there a dog ?"])
    with vlm.trace(sites.resid_post(), sites.cross_attention()) as trace:
        vlm.forward(batch)
    assert trace["resid_post"].layers == (0, 2)
    trace["resid_post"][2]
    for ask in (trace["resid_post"].stack, lambda: trace["resid_post"][3]):
        with pytest.raises(SlitlampError, match=r"layers \[.*3\] of 'resid_post' did not run.*that ran: \[0, 2\]"):
            ask()
    with pytest.raises(SlitlampError, match="recorded nothing"):
        trace["cross_attention"][1]


def test_self_attention_of_a_cross_attention_layer_is_refused(vlm):
    with pytest.raises(SlitlampError), vlm.trace(sites.attention(layers=[1])):
        pass
    with pytest.raises(SlitlampError), vlm.trace(sites.cross_attention(layers=[0])):
        pass


def test_other_families_have_no_cross_attention(llava):
    with pytest.raises(SlitlampError), llava.trace(sites.cross_attention()):
        pass
