"""LLaVA-OneVision and VipLLaVA, checked against the models' own packing."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import llava
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from slitlamp.errors import UnsupportedError
from slitlamp.models import BASE_VIEW, TILE_VIEW
from slitlamp.vlm import VLM

SIDE = 4  # patches along a side of a tile: 16 px of 4 px


@pytest.fixture(scope="module")
def onevision() -> VLM:
    return llava.build_llava_onevision()


@pytest.mark.parametrize(
    ("width", "height"),
    [(16, 16), (20, 16), (16, 20), (32, 32), (48, 16), (64, 64), (60, 64), (64, 45), (100, 30), (5, 60), (33, 31)],
)
def test_onevision_agrees_with_the_models_own_packing(width, height, onevision, image):
    """Features that say (row, column) of the whole grid go through the model's own pack_image_features. Where it shrinks the
    grid it interpolates, so that the features say where in the picture a token lies, in order.
    """
    vlm = onevision
    (patches,) = vlm.encode([image(0, width, height)], ["<image> what ?"]).patches
    rows, columns = patches.grids[0, TILE_VIEW]
    n_tiles = patches.n_tiles - 1
    model = vlm.model.model
    batch = vlm.encode([image(0, width, height)], ["<image> what ?"])
    size = batch.extra["image_sizes"]
    from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape

    tile_rows, tile_columns = get_anyres_image_grid_shape(size[0], vlm.model.config.image_grid_pinpoints, 16)
    assert n_tiles == tile_rows * tile_columns
    inside_row, inside_column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    features = [torch.stack([inside_row, inside_column], dim=-1).view(SIDE**2, 2)]
    for tile in range(n_tiles):
        first = torch.tensor([tile // tile_columns * SIDE, tile % tile_columns * SIDE])
        features.append(features[0] + first)
    packed, lengths = model.pack_image_features(
        [torch.stack(features).float()],
        size,
        image_newline=torch.full((2,), -1.0),
        vision_aspect_ratio=vlm.model.config.vision_aspect_ratio,
    )
    assert int(lengths[0]) == len(patches) == len(packed[0])
    newline = (packed[0] == -1).all(dim=1)
    assert torch.equal(patches.on_image, ~newline)
    base, grid = packed[0][: SIDE**2], packed[0][SIDE**2 :][~newline[SIDE**2 :]]
    assert torch.equal(torch.stack([patches.row, patches.column], dim=1)[: SIDE**2], base.long())
    assert patches.view.tolist() == [BASE_VIEW] * SIDE**2 + [TILE_VIEW] * (rows * (columns + 1))
    grid = grid.view(rows, columns, 2)
    for axis in (0, 1):  # each row of the grid is one row of the picture, from the top; each column one from the left
        along = grid.select(2, axis)
        assert torch.allclose(along, along.select(1 - axis, 0).unsqueeze(1 - axis).expand_as(along), atol=1e-4)
        assert (along.diff(dim=axis) > 0).all()
    on_grid = patches.on_image & (patches.view == TILE_VIEW)
    assert patches.row[on_grid].tolist() == [row for row in range(rows) for _ in range(columns)]
    assert patches.column[on_grid].tolist() == [column for _ in range(rows) for column in range(columns)]
    newline_rows = patches.row[~patches.on_image]
    assert newline_rows.tolist() == list(range(rows))
    assert (patches.column[~patches.on_image] == -1).all()


def test_onevision_shrinks_a_grid_of_many_tiles(onevision, image):
    (patches,) = onevision.encode([image(0, 64, 64)], ["<image> what ?"]).patches
    assert patches.n_tiles == 1 + 16
    assert patches.grids[0, TILE_VIEW] == (8, 8)  # of 16 x 16: at most 4 tiles' worth


def test_onevision_gives_each_of_several_images_whole(onevision, image):
    batch = onevision.encode(
        [[image(0, 32, 32), image(1, 64, 16)], image(2, 32, 32), None],
        ["is <image> in <image> ?", "<image> what ?", "what ?"],
    )
    assert batch.tiles == (2, 5, 0)
    patches = batch.patches[0]
    assert patches.grids == {(0, BASE_VIEW): (SIDE, SIDE), (1, BASE_VIEW): (SIDE, SIDE)}
    assert len(patches) == 2 * (SIDE**2 + 1)
    assert patches.on_image.tolist() == ([True] * SIDE**2 + [False]) * 2  # a newline token ends each
    features = onevision.model.get_image_features(
        batch.extra["pixel_values"],
        batch.extra["image_sizes"],
        batch_num_images=batch.extra["batch_num_images"],
        return_dict=True,
    ).pooler_output
    newline = onevision.model.model.image_newline
    assert torch.equal(features[0][~patches.on_image[: SIDE**2 + 1]][0], newline)
    assert [len(one) for one in features] == [SIDE**2 + 1, SIDE**2 + 1, len(batch.patches[1])]


def test_onevision_encodes_every_shape(onevision, image):
    """`encode` refuses a count that its processor and its patches do not share; no shape may come to that."""
    shapes = [(width, height) for width in (4, 7, 16, 29, 50, 90) for height in (4, 11, 16, 31, 64)]
    batch = onevision.encode([[image(0, *shape)] for shape in shapes], ["<image> what ?"] * len(shapes))
    onevision.forward(batch, logits_to_keep=1)


def test_vipllava_drops_the_cls_token_of_every_layer_that_it_reads(image):
    vlm = llava.build_vipllava()
    (patches,) = vlm.encode([image(0)], ["<image> what ?"]).patches
    assert patches.grids == {(0, BASE_VIEW): (SIDE, SIDE)}
    assert patches.row.tolist() == [row for row in range(SIDE) for _ in range(SIDE)]
    assert patches.on_image.all()


def test_vipllava_on_a_tower_without_cls_is_refused(image):
    vlm = llava.build_vipllava()
    config = VipLlavaConfig(
        vision_config=copy.deepcopy(llava.build_llava(siglip=True).model.config.vision_config),
        text_config=vlm.model.config.text_config,
        image_token_index=4,
        vision_feature_layer=[-1, -2],
    )
    other = VLM.wrap(VipLlavaForConditionalGeneration(config).eval(), vlm.processor)
    with pytest.raises(UnsupportedError, match="this tower's first token is a patch"):
        other.encode([image(0)], ["<image> what ?"])
