"""Where image tokens lie on the image, checked against the model's own packing and against its reaction to pixels."""

import copy

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.image_processing_utils import select_best_resolution

from slitlamp.models import BASE_VIEW, TILE_VIEW, Patches
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

SIDE = 4  # patches per side of a tile: 16 px of 4 px
SIZES = [(20, 16), (16, 20), (32, 32), (31, 9), (9, 31), (16, 16), (48, 16), (17, 47), (100, 30), (5, 60), (33, 31)]


def no_mixing(vlm: VLM) -> VLM:
    """A copy whose vision tower passes nothing from one patch to another: what a token says is its own patch's."""
    model = copy.deepcopy(vlm.model)
    for layer in range(vlm.anatomy.n_vision_layers):
        projection = model.get_submodule(vlm.anatomy.vision_attention_of(layer)).out_proj
        torch.nn.init.zeros_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    return VLM.wrap(model, vlm.processor)


def image_embeddings(vlm: VLM, picture):
    batch = vlm.encode([picture], ["<image> what ?"], chat=False)
    with vlm.trace(sites.resid_pre(layers=0, positions="image")) as trace:
        vlm.forward(batch)
    return batch.patches[0], trace["resid_pre"][0][0]


def test_llava_is_one_grid_in_raster_order(llava, image):
    (patches,) = llava.encode([image(0)], ["<image> what ?"]).patches
    assert patches.grids == {(0, BASE_VIEW): (4, 4)}
    assert patches.row.tolist() == [r for r in range(4) for _ in range(4)]
    assert patches.column.tolist() == [c for _ in range(4) for c in range(4)]
    assert patches.on_image.all()
    assert patches.table.tolist()[5] == [0, 1, 1]


def test_llava_that_keeps_the_cls_token_has_it_first_and_off_the_image(llava, image):
    model = copy.deepcopy(llava.model)
    model.config.vision_feature_select_strategy = "full"
    processor = copy.deepcopy(llava.processor)
    processor.vision_feature_select_strategy = "full"
    vlm = VLM.wrap(model, processor)
    batch = vlm.encode([image(0)], ["<image> what ?"])
    assert batch.patches[0].row.tolist()[:2] == [-1, 0]
    assert batch.patches[0].on_image.tolist() == [False] + [True] * 16
    vlm.forward(batch)  # the model finds as many features as there are tokens


@pytest.mark.parametrize("siglip", [False, True])
def test_pixels_of_a_patch_reach_the_token_of_its_row_and_column(siglip, llava, llava_siglip):
    """16 x 16 pixels are not resized, so that a patch of the tower is 4 x 4 pixels of the picture."""
    vlm = no_mixing(llava_siglip if siglip else llava)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    patches, before = image_embeddings(vlm, pixels)
    for row, column in [(0, 0), (0, 3), (2, 1), (3, 0)]:
        changed = pixels.copy()
        changed[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 255
        _, after = image_embeddings(vlm, changed)
        moved = (after - before).abs().amax(dim=-1) > 1e-4
        assert torch.equal(moved, (patches.row == row) & (patches.column == column))


@pytest.mark.parametrize(("width", "height"), [(32, 32), (48, 16), (16, 32)])
def test_pixels_of_a_patch_reach_the_tile_token_of_its_row_and_column(width, height, llava_next):
    """A picture as large as one of the grids is not resized for its tiles."""
    vlm = no_mixing(llava_next)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    patches, before = image_embeddings(vlm, pixels)
    assert patches.grids[0, TILE_VIEW] == (height // 4, width // 4)
    for row, column in [(0, 0), (height // 4 - 1, 0), (1, width // 4 - 1), (height // 8, width // 8)]:
        changed = pixels.copy()
        changed[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 255
        _, after = image_embeddings(vlm, changed)
        moved = (after - before).abs().amax(dim=-1) > 1e-4
        tiles = patches.view == TILE_VIEW
        assert torch.equal(moved[tiles], ((patches.row == row) & (patches.column == column))[tiles])


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_llava_next_agrees_with_the_models_own_packing(width, height, llava_next, image):
    """Features that say (tile, row, column) go through the model's own pack_image_features, and come out token by token."""
    batch = llava_next.encode([image(0, width, height)], ["<image> what ?"])
    (patches,) = batch.patches
    pinpoints = llava_next.model.config.image_grid_pinpoints
    best_height, best_width = select_best_resolution((height, width), pinpoints)
    tile_rows, tile_columns = best_height // 16, best_width // 16
    n_tiles = 1 + tile_rows * tile_columns
    features = torch.cartesian_prod(torch.arange(n_tiles), torch.arange(SIDE), torch.arange(SIDE)).float()
    packed, lengths = llava_next.model.model.pack_image_features(
        [features.view(n_tiles, SIDE * SIDE, 3)],
        batch.extra["image_sizes"],
        "default",
        image_newline=torch.full((3,), -1.0),
    )
    assert int(lengths[0]) == len(patches)
    tile, row, column = packed[0].long().unbind(dim=1)
    newline = tile == -1
    base = tile == 0
    on_tiles = ~newline & ~base
    row = torch.where(on_tiles, (tile - 1) // tile_columns * SIDE + row, row)
    column = torch.where(on_tiles, (tile - 1) % tile_columns * SIDE + column, column)
    row[on_tiles] -= row[on_tiles].min()  # the padding cut off at the top and the left
    column[on_tiles] -= column[on_tiles].min()
    row[newline] = torch.arange(int(newline.sum()))  # the k-th newline closes row k
    column[newline] = -1
    assert torch.equal(patches.row, row)
    assert torch.equal(patches.column, column)
    assert torch.equal(patches.view, torch.where(base, BASE_VIEW, TILE_VIEW))
    assert torch.equal(patches.on_image, ~newline)
    assert patches.grids == {
        (0, BASE_VIEW): (SIDE, SIDE),
        (0, TILE_VIEW): (int(row[on_tiles].max()) + 1, int(column[on_tiles].max()) + 1),
    }


def test_llava_next_encodes_every_shape(llava_next, image):
    """`encode` refuses a count that its processor and its patches do not share; no shape may come to that."""
    shapes = [(width, height) for width in (4, 7, 16, 29, 50) for height in (4, 11, 16, 31, 64)]
    batch = llava_next.encode([[image(0, *shape)] for shape in shapes], ["<image> what ?"] * len(shapes))
    llava_next.forward(batch, logits_to_keep=1)
    assert batch.image_mask.sum(dim=1).tolist() == [len(patches) for patches in batch.patches]


def test_the_image_tokens_are_where_the_model_puts_its_features(llava_next, image):
    """Rows with two images, none and one: the language model's input at image positions is the model's own features."""
    batch = llava_next.encode(
        [[image(0), image(1, 31, 9)], None, [image(2, 48, 16)]],
        ["<image> is <image> there ?", "what ?", "describe <image>"],
    )
    with torch.no_grad():
        features = llava_next.model.get_image_features(
            batch.extra["pixel_values"], batch.extra["image_sizes"], return_dict=True
        ).pooler_output
    with llava_next.trace(sites.resid_pre(layers=0)) as trace:
        llava_next.forward(batch)
    embedded = torch.zeros(batch.size, batch.length, llava_next.anatomy.d_model)
    embedded[batch.real_mask] = trace["resid_pre"][0][trace.mask("resid_pre")]
    torch.testing.assert_close(embedded[batch.image_mask], torch.cat(list(features)), rtol=0, atol=1e-5)


def test_to_grid_lays_values_out_by_image_and_view(llava_next, image):
    (patches,) = llava_next.encode([[image(0, 31, 9), image(1)]], ["<image> <image> what ?"]).patches
    assert {number for number, _ in patches.grids} == {0, 1}
    for (number, view), (rows, columns) in patches.grids.items():
        code = patches.image * 10000 + patches.view * 1000 + patches.row * 100 + patches.column
        grid = patches.to_grid(torch.stack([code, code + 5]), image=number, view=view)
        assert grid.shape == (2, rows, columns)
        wanted = torch.arange(rows)[:, None] * 100 + torch.arange(columns) + number * 10000 + view * 1000
        assert torch.equal(grid[0], wanted)
        assert torch.equal(grid[1], wanted + 5)


def test_to_grid_refuses_what_does_not_fit(llava, image):
    (patches,) = llava.encode([image(0)], ["<image> what ?"]).patches
    with pytest.raises(KeyError, match=r"no view 1 of image 0.*\[\(0, 0\)\]"):
        patches.to_grid(torch.zeros(16), view=TILE_VIEW)
    with pytest.raises(ValueError, match="values of 15 tokens for a prompt with 16"):
        patches.to_grid(torch.zeros(15))


def test_a_prompt_without_images_has_no_patches():
    none = Patches.join([])
    assert len(none) == 0
    assert none.grids == {}
    assert none.table.shape == (0, 3)


def test_patches_number_the_images_of_a_prompt(llava):
    picture = PIL.Image.new("RGB", (16, 16))
    (patches,) = llava.encode([[picture, picture]], ["<image> what <image>"]).patches
    assert patches.image.tolist() == [0] * 16 + [1] * 16
