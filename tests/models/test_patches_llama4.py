"""Llama 4: where image tokens lie on tiles and on the whole image, and where the tower has its CLS token."""

from __future__ import annotations

import copy

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_models.llama4 import build

from slitlamp.errors import UnsupportedError
from slitlamp.models.patches_llama4 import _tile_grids
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

MARK = "<|image|>"


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return build()


@pytest.fixture(scope="module")
def blind(vlm) -> VLM:
    """The model with a tower in which no position sees another: each image token depends on its own pixels alone."""
    model = copy.deepcopy(vlm.model)
    for block in model.vision_model.model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.self_attn.o_proj.bias)
    return VLM.wrap(model, vlm.processor, "blind")


def picture(rows, columns, at=None) -> PIL.Image.Image:
    """Black, in cells of 8 px (one token of a tile); the cell at (row, column) is coloured."""
    pixels = np.zeros((rows * 8, columns * 8, 3), dtype=np.uint8)
    if at is not None:
        row, column = at
        pixels[row * 8 : (row + 1) * 8, column * 8 : (column + 1) * 8] = (120, 60, 200)
    return PIL.Image.fromarray(pixels)


def test_every_image_token_is_where_its_pixels_are(blind):
    """Of three images in a prompt one cell is painted: its token of the tiles changes, and one of the whole image."""
    shapes = [(4, 6), (2, 2), (6, 2)]  # in cells; a tile has 2 x 2

    def embeddings(which=0, at=None):
        pictures = [picture(*shape, at if number == which else None) for number, shape in enumerate(shapes)]
        batch = blind.encode([pictures], [f"{MARK} and {MARK} and {MARK}"])
        with blind.trace(sites.resid_pre(layers=[0], positions="image")) as trace:
            blind.forward(batch)
        return trace["resid_pre"][0][0], batch.patches[0]

    plain, patches = embeddings()
    assert patches.n_tiles == 7 + 1 + 4
    assert patches.grids == {(0, 0): (2, 2), (0, 1): (4, 6), (1, 0): (2, 2), (2, 0): (2, 2), (2, 1): (6, 2)}
    for which, (rows, columns) in enumerate(shapes):
        for row, column in np.ndindex(rows, columns):
            changed = (embeddings(which, (row, column))[0] != plain).any(dim=1)
            tiles = changed & (patches.view == 1)
            if (rows, columns) == (2, 2):  # not cut
                assert not tiles.any()
                assert patches.table[changed].tolist() == [[which, row, column]]
                continue
            assert patches.table[tiles].tolist() == [[which, row, column]]
            whole = patches.table[changed & (patches.view == 0)].tolist()
            assert [which, row * 2 // rows, column * 2 // columns] in whole  # smaller, so neighbours may change too
            assert all(image == which for image, *_ in whole)


def test_the_cls_token_of_the_tower_is_given_first_and_patches_in_raster_order(blind):
    def states(at=None):
        with blind.trace(sites.vision_resid_pre(layers=[0]), sites.projector_out()) as trace:
            pixels = np.zeros((16, 32, 3), dtype=np.uint8)
            if at is not None:
                tile, row, column = at
                pixels[row * 4 : row * 4 + 4, tile * 16 + column * 4 : tile * 16 + column * 4 + 4] = 90
            blind.forward(blind.encode([PIL.Image.fromarray(pixels)], [f"{MARK} ?"]))
        return trace["vision_resid_pre"][0], trace["projector_out"][0]

    plain, plain_tokens = states()
    assert plain.shape == (3, 17, 16)
    assert plain_tokens.shape == (3, 4, 32)
    assert torch.equal(plain[0, 0], plain[1, 0])
    for tile, row, column in [(0, 0, 0), (0, 3, 3), (1, 0, 2), (1, 2, 1)]:
        changed, tokens = states((tile, row, column))
        found = (changed[:2] != plain[:2]).any(dim=2).nonzero().tolist()  # the third tile is the whole image
        assert found == [[tile, 1 + 4 * row + column]]
        found = (tokens[:2] != plain_tokens[:2]).any(dim=2).nonzero().tolist()
        assert found == [[tile, row // 2 * 2 + column // 2]]


def test_attention_of_the_cls_token_is_the_last_row_of_the_tower(vlm, image):
    batch = vlm.encode([image(0, 30, 14)], [f"{MARK} ?"])
    with vlm.trace(sites.vision_attention()) as trace:
        vlm.forward(batch)
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        # it looks for attentions after hidden states
        asked = {"output_attentions": True, "output_hidden_states": True}
        eager = model.vision_model(batch.extra["pixel_values"], **asked).attentions
    for layer in range(3):
        assert trace["vision_attention"][layer].shape == (3, 2, 1, 16)
        torch.testing.assert_close(trace["vision_attention"][layer], eager[layer][:, :, -1:, :-1], rtol=0, atol=1e-5)


def test_layers_with_experts_have_no_hidden_layer_but_an_output(vlm, image):
    assert vlm.anatomy.layers("mlp_pre") == vlm.anatomy.layers("mlp_post") == (0, 2)
    assert vlm.anatomy.d_mlp == 48
    with pytest.raises(UnsupportedError, match=r"layer 1 of this Llama 4 has no 'mlp_pre'"):
        vlm.anatomy.place("mlp_pre", 1)
    batch = vlm.encode([image(0), None], [f"{MARK} ?", "a dog ?"])
    with vlm.trace(sites.ln2(layers=[1]), sites.mlp_out(layers=[1])) as trace:
        vlm.forward(batch)
    with torch.no_grad():
        wanted, _ = vlm.model.language_model.model.layers[1].feed_forward(trace["ln2"][1][trace.mask("ln2")])
    torch.testing.assert_close(trace["mlp_out"][1][trace.mask("mlp_out")], wanted, rtol=0, atol=1e-5)


def test_tokens_that_make_no_grid_are_refused(vlm):
    config = vlm.model.config
    start, end, patch = config.boi_token_index, config.eoi_token_index, config.image_token_index
    across, down, whole = 100, 101, 102

    def grids(*separators):
        tiles = [token for one in separators for token in (patch, patch, one)]
        return _tile_grids(config, [1, start, *tiles, whole, patch, patch, end, 3])

    assert grids() == [(1, 1)]
    assert grids(across, across, down, across, across, down) == [(2, 3)]
    assert grids(down, down) == [(2, 1)]
    with pytest.raises(UnsupportedError, match="3 tiles of an image in rows of 2"):
        grids(across, down, down)
