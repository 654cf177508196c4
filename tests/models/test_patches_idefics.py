"""Idefics3 and SmolVLM: tiles, the whole image, and the text tokens between, checked against processor and model."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import idefics
from tiny_models.common import IMAGE

from slitlamp.errors import UnsupportedError
from slitlamp.models import BASE_VIEW, TILE_VIEW
from slitlamp.models.patches_idefics import idefics3_patches
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

SIDE = 2  # tokens per side of a tile: 16 px of 4 px, 2 x 2 patches to a token
SIZES = [(20, 16), (48, 48), (16, 16), (47, 30), (9, 31), (60, 10), (5, 60), (200, 180)]


@pytest.fixture(scope="module", params=["idefics3", "smolvlm"])
def vlm(request) -> VLM:
    return idefics.BUILDERS[request.param]()


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_grid_is_that_into_which_the_processor_cut_the_image(width, height, vlm, image):
    picture = image(0, width, height)
    cut = vlm.processor.image_processor([[picture]], return_row_col_info=True, return_tensors="pt")
    ((rows,),), ((columns,),) = cut["rows"], cut["cols"]
    (patches,) = vlm.encode([picture], ["<image> what ?"]).patches
    assert patches.grids[0, BASE_VIEW] == (SIDE, SIDE)
    assert patches.grids.get((0, TILE_VIEW), (0, 0)) == (rows * SIDE, columns * SIDE)
    assert patches.n_tiles == rows * columns + 1 == cut["pixel_values"].shape[1]
    assert len(patches) == patches.n_tiles * SIDE**2
    assert (patches.view == BASE_VIEW).tolist() == [False] * (len(patches) - SIDE**2) + [True] * SIDE**2
    assert patches.on_image.all()


def test_pixels_of_a_patch_reach_the_token_of_its_row_and_column(vlm):
    """48 x 48 pixels are not resized; a vision tower without attention passes nothing from one patch to another."""
    model = copy.deepcopy(vlm.model)
    for path in vlm.anatomy.vision_blocks:
        projection = model.get_submodule(path).self_attn.out_proj
        torch.nn.init.zeros_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    alone = VLM.wrap(model, vlm.processor)

    def embeddings(pixels):
        batch = alone.encode([pixels], ["<image> what ?"])
        with alone.trace(sites.resid_pre(layers=0, positions="image")) as trace:
            alone.forward(batch)
        return batch.patches[0], trace["resid_pre"][0][0]

    pixels = np.random.default_rng(0).integers(0, 200, (48, 48, 3), dtype=np.uint8)
    patches, before = embeddings(pixels)
    assert patches.grids[0, TILE_VIEW] == (6, 6)
    tiles = patches.view == TILE_VIEW
    for row, column in [(0, 0), (0, 5), (3, 1), (5, 2)]:
        changed = pixels.copy()
        changed[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 255
        _, after = embeddings(changed)
        moved = (after - before).abs().amax(dim=-1) > 1e-4
        assert torch.equal(moved[tiles], ((patches.row == row) & (patches.column == column))[tiles])
        # a third of the picture's width is a token and a half of the whole image
        whole = patches.to_grid(moved.float(), view=BASE_VIEW)
        assert whole[row // 3, column // 3] > 0


def test_image_tokens_of_several_images_are_where_the_model_puts_its_features(vlm, image):
    """Rows of two images, none and one, so that rows are padded with empty pictures, which the model drops."""
    batch = vlm.encode(
        [[image(0), image(1, 40, 48)], None, [image(2, 16, 16)]],
        ["<image> is <image> there ?", "what ?", "describe <image>"],
    )
    assert [sorted({number for number, _ in one.grids}) for one in batch.patches] == [[0, 1], [], [0]]
    assert batch.tiles == tuple(len(one) // SIDE**2 for one in batch.patches)
    with torch.no_grad():
        features = vlm.model.model.get_image_features(
            batch.extra["pixel_values"], batch.extra["pixel_attention_mask"], return_dict=True
        ).pooler_output
    assert [len(one) for one in features] == [len(one) for one in batch.patches]
    with vlm.trace(sites.resid_pre(layers=0)) as trace:
        vlm.forward(batch)
    embedded = torch.zeros(batch.size, batch.length, vlm.anatomy.d_model)
    embedded[batch.real_mask] = trace["resid_pre"][0][trace.mask("resid_pre")]
    torch.testing.assert_close(embedded[batch.image_mask], torch.cat(list(features)), rtol=0, atol=1e-5)


def test_separators_are_text(vlm, image):
    batch = vlm.encode([image(0)], ["<image> what ?"])
    separators = [vlm.tokenizer.convert_tokens_to_ids(one) for one in ("<row_1_col_1>", "<global-img>", "\n")]
    for token in separators:
        assert token in batch.input_ids[batch.text_mask]
    assert set(batch.input_ids[batch.image_mask].tolist()) == {IMAGE}


def test_an_image_that_is_not_cut_has_one_view(image):
    vlm = idefics.build()
    vlm.processor.image_processor.do_image_splitting = False
    (patches,) = vlm.encode([image(0, 40, 30)], ["<image> what ?"]).patches
    assert patches.grids == {(0, BASE_VIEW): (SIDE, SIDE)}
    assert patches.n_tiles == 1


def test_tokens_in_another_order_are_refused(vlm, image):
    ids = vlm.encode([image(0)], ["<image> what ?"]).input_ids
    first = int((ids[0] == IMAGE).nonzero()[0])
    short = torch.cat([ids[:, :first], ids[:, first + 1 :]], dim=1)  # a tile of three tokens
    with pytest.raises(UnsupportedError, match=r"4 of them.*found 3"):
        idefics3_patches(vlm.model.config, {"input_ids": short}, 1, False)
    unlike = ids.clone()
    unlike[0, first - 2] += 1  # a tile opened by another token
    with pytest.raises(UnsupportedError, match="fake_token_around_image"):
        idefics3_patches(vlm.model.config, {"input_ids": unlike}, 1, False)
    one_row = ids[:, ids[0] != vlm.tokenizer.convert_tokens_to_ids("\n")].clone()
    broken = torch.cat([one_row[:, : first + 4], ids[:, :1], one_row[:, first + 4 :]], dim=1)  # rows of 1 and 8 tiles
    with pytest.raises(UnsupportedError, match=r"one length, found \[1, 8\]"):
        idefics3_patches(vlm.model.config, {"input_ids": broken}, 1, False)
