"""DeepStack (Qwen3-VL): features of the tower's earlier layers are added to the residual stream between blocks."""

from __future__ import annotations

import pytest
import torch
from tiny_models.qwen import build_qwen3_vl

from slitlamp.tracing import sites
from slitlamp.vlm import VLM


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return build_qwen3_vl()


@pytest.fixture(scope="module")
def batch(vlm, image):
    mark = vlm.processor.image_token
    pictures = [[image(0, 40, 24), image(1)], None, [image(2, 24, 40)]]
    return vlm.encode(pictures, [f"{mark} and {mark} ?", "a dog ?", f"is {mark} red ?"])


def test_the_next_block_gets_the_features_on_top_at_image_positions_alone(vlm, batch):
    with vlm.trace(sites.resid_pre(), sites.resid_post()) as trace:
        vlm.forward(batch)
    with torch.no_grad():
        features = vlm.model.model.get_image_features(
            batch.extra["pixel_values"], batch.extra["image_grid_thw"]
        ).deepstack_features
    assert vlm.anatomy.deepstack_layers == (0, 1)
    mask = torch.zeros_like(trace.mask("resid_pre"))
    for row, real in enumerate(batch.real_mask):  # recordings are packed to the left
        mask[row, : int(real.sum())] = batch.image_mask[row][real]
    for layer in (0, 1):
        added = trace["resid_pre"][layer + 1] - trace["resid_post"][layer]
        torch.testing.assert_close(added[mask], torch.cat(features[layer]), rtol=0, atol=1e-5)
        assert float(added[mask].abs().max()) > 0.1
        assert torch.all(added[~mask] == 0)


def test_inside_a_block_the_parts_add_up(vlm, batch):
    with vlm.trace(
        sites.resid_pre(), sites.attn_out(), sites.resid_mid(), sites.mlp_out(), sites.resid_post()
    ) as trace:
        vlm.forward(batch)
    for layer in range(3):
        middle = trace["resid_pre"][layer] + trace["attn_out"][layer]
        torch.testing.assert_close(trace["resid_mid"][layer], middle, rtol=0, atol=1e-5)
        torch.testing.assert_close(trace["resid_post"][layer], middle + trace["mlp_out"][layer], rtol=0, atol=1e-5)


def test_the_states_are_those_of_the_model_up_to_the_features(vlm, batch):
    """Hugging Face's hidden states are what comes out of a block, before DeepStack adds to it."""
    with vlm.trace(sites.resid_post()) as trace:
        vlm.forward(batch)
    with torch.no_grad():
        hidden = vlm.model(**batch.inputs(), output_hidden_states=True).hidden_states
    for layer in (0, 1):  # the last one is normed
        for row, real in enumerate(batch.real_mask):
            own = hidden[layer + 1][row][real]
            torch.testing.assert_close(trace["resid_post"][layer][row, : len(own)], own, rtol=0, atol=1e-5)


def test_queries_and_keys_are_recorded_before_their_norms(vlm, batch):
    with vlm.trace(sites.ln1(layers=[1]), sites.q(layers=[1]), sites.k(layers=[1])) as trace:
        vlm.forward(batch)
    attention = vlm.model.model.language_model.layers[1].self_attn
    with torch.no_grad():
        for name, heads in (("q", 4), ("k", 2)):
            wanted = getattr(attention, f"{name}_proj")(trace["ln1"][1]).unflatten(-1, (heads, 8))
            torch.testing.assert_close(trace[name][1], wanted, rtol=0, atol=1e-5)
