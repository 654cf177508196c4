"""Mistral 3, and LLaVA on a Pixtral tower: grids of any size, and one sequence for all images."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import pixtral
from tiny_models.common import IMAGE

from slitlamp.models import BASE_VIEW
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

TOKEN = {"mistral3": 8, "llava pixtral": 4}  # pixels per side of a token
SIZES = [(20, 16), (32, 32), (40, 10), (7, 31), (4, 4)]


@pytest.fixture(scope="module", params=list(pixtral.BUILDERS))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def vlm(name) -> VLM:
    return pixtral.BUILDERS[name]()


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_grid_is_that_of_the_break_tokens(width, height, vlm, image):
    batch = vlm.encode([image(0, width, height)], ["[IMG] what ?"])
    (patches,) = batch.patches
    tokens = vlm.tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist())
    row, column, places = 0, 0, []
    for token in tokens:
        if token == "[IMG]":
            places.append((row, column))
            column += 1
        elif token == "[IMG_BREAK]":
            row, column = row + 1, 0
    assert list(zip(patches.row.tolist(), patches.column.tolist(), strict=True)) == places
    assert patches.grids == {(0, BASE_VIEW): (row + 1, column)}
    assert tokens.count("[IMG_END]") == 1
    assert set(batch.input_ids[batch.image_mask].tolist()) == {IMAGE}


def test_pixels_of_a_patch_reach_the_token_of_its_row_and_column(name, vlm):
    """32 x 24 pixels are not resized; a vision tower without attention passes nothing from one patch to another."""
    model = copy.deepcopy(vlm.model)
    for path in vlm.anatomy.vision_blocks:
        torch.nn.init.zeros_(model.get_submodule(path).attention.o_proj.weight)
    alone = VLM.wrap(model, vlm.processor)

    def embeddings(pixels):
        batch = alone.encode([pixels], ["[IMG] what ?"])
        with alone.trace(sites.resid_pre(layers=0, positions="image")) as trace:
            alone.forward(batch)
        return batch.patches[0], trace["resid_pre"][0][0]

    pixels = np.random.default_rng(0).integers(0, 200, (24, 32, 3), dtype=np.uint8)
    patches, before = embeddings(pixels)
    side = TOKEN[name]
    assert patches.grids == {(0, BASE_VIEW): (24 // side, 32 // side)}
    for row, column in [(0, 0), (2, 0), (1, 3)]:
        changed = pixels.copy()
        changed[side * row : side * row + side, side * column : side * column + side] = 255
        _, after = embeddings(changed)
        moved = (after - before).abs().amax(dim=-1) > 1e-4
        assert torch.equal(moved, (patches.row == row) & (patches.column == column))


def several(vlm, image):
    """Rows of two images, none and one, all of other sizes."""
    return vlm.encode(
        [[image(0), image(1, 32, 24)], None, [image(2, 9, 30)]], ["[IMG] is [IMG] there ?", "what ?", "describe [IMG]"]
    )


def test_image_tokens_of_several_images_are_where_the_model_puts_its_features(vlm, image):
    batch = several(vlm, image)
    with torch.no_grad():
        features = vlm.model.get_image_features(
            pixel_values=batch.extra["pixel_values"], image_sizes=batch.extra["image_sizes"], return_dict=True
        ).pooler_output
    with vlm.trace(sites.resid_pre(layers=0)) as trace:
        vlm.forward(batch)
    embedded = torch.zeros(batch.size, batch.length, vlm.anatomy.d_model)
    embedded[batch.real_mask] = trace["resid_pre"][0][trace.mask("resid_pre")]
    torch.testing.assert_close(embedded[batch.image_mask], torch.cat(list(features)), rtol=0, atol=1e-5)


def test_unpack_finds_each_image_in_the_sequence_of_all(vlm, image):
    """A tile is what the tower, or the projector, makes of its image alone: images do not see each other."""
    batch = several(vlm, image)
    tower = vlm.model.get_submodule(vlm.anatomy.modules["vision_tower"])
    model = vlm.model.model
    pixels, image_sizes = batch.extra["pixel_values"], batch.extra["image_sizes"]
    unpack = vlm.anatomy.tower.unpack
    with torch.no_grad():
        packed = tower(pixels, image_sizes=image_sizes).last_hidden_state[0]
        joined = torch.cat(list(model.get_image_features(pixels, image_sizes=image_sizes).pooler_output))
    parts = unpack(vlm.model.config, batch.extra, False)
    merged = unpack(vlm.model.config, batch.extra, True)
    assert torch.equal(torch.cat(parts), torch.arange(len(packed)))
    assert torch.equal(torch.cat(merged), torch.arange(len(joined)))
    for number, (height, width) in enumerate(image_sizes.tolist()):
        own, size = pixels[number : number + 1, :, :height, :width], image_sizes[number : number + 1]
        with torch.no_grad():
            alone = tower(own, image_sizes=size).last_hidden_state[0]
            (projected,) = model.get_image_features(own, image_sizes=size).pooler_output
        torch.testing.assert_close(packed[parts[number]], alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(joined[merged[number]], projected, rtol=0, atol=1e-5)


def test_vision_sites_come_tile_by_tile(vlm, image):
    """States and attention of each image are what the tower computes for it alone by eager attention."""
    batch = several(vlm, image)
    heads = vlm.anatomy.n_vision_heads
    with vlm.trace(
        sites.vision_resid_post(), sites.projector_out(), sites.vision_attention(queries="all", keys="all")
    ) as trace:
        vlm.forward(batch)
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation("eager")
    tower = model.get_submodule(vlm.anatomy.modules["vision_tower"])
    states, weights = trace["vision_resid_post"], trace["vision_attention"]
    mask = trace.mask("vision_resid_post")
    for number, (height, width) in enumerate(batch.extra["image_sizes"].tolist()):
        with torch.no_grad():
            out = tower(
                batch.extra["pixel_values"][number : number + 1, :, :height, :width],
                image_sizes=batch.extra["image_sizes"][number : number + 1],
                output_hidden_states=True,
                output_attentions=True,
            )
        count = height * width // 16
        assert mask[number].tolist() == [True] * count + [False] * (mask.shape[1] - count)
        for layer in range(vlm.anatomy.n_vision_layers):
            torch.testing.assert_close(
                states[layer][number, :count], out.hidden_states[layer + 1][0], rtol=0, atol=1e-5
            )
            assert weights[layer].shape[1] == heads
            torch.testing.assert_close(
                weights[layer][number, :, :count, :count], out.attentions[layer][0], rtol=0, atol=1e-5
            )
            assert not weights[layer][number, :, count:].any()
            assert not weights[layer][number, :, :, count:].any()
    projected = trace["projector_out"][0]
    counts = [len(one) for one in vlm.anatomy.tower.unpack(vlm.model.config, batch.extra, True)]
    assert projected.shape == (3, max(counts), vlm.anatomy.d_model)
    with torch.no_grad():
        features = vlm.model.model.get_image_features(
            batch.extra["pixel_values"], image_sizes=batch.extra["image_sizes"]
        ).pooler_output
    for number, wanted in enumerate(features):
        torch.testing.assert_close(projected[number, : len(wanted)], wanted, rtol=0, atol=1e-5)
