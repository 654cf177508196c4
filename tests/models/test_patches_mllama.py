"""Mllama: its image tokens are keys of cross-attention; which of them are real, and where they lie."""

import copy

import numpy as np
import pytest
import torch
from tiny_models import mllama
from tiny_models.common import IMAGE

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import BASE_VIEW
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

SIDE = 4  # patches per side of a tile: 16 px of 4 px
PER_TILE = 1 + SIDE**2
MAX_TILES = 4
CROSS = mllama.CROSS_LAYERS


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return mllama.build()


def keys_seen(vlm: VLM, batch) -> torch.Tensor:
    """What the first cross-attention layer makes its keys of: [batch, key, d_model]."""
    seen = []
    layer = vlm.model.get_submodule(vlm.anatomy.attention(CROSS[0]))
    handle = layer.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["cross_attention_states"]), with_kwargs=True
    )
    vlm.forward(batch, logits_to_keep=1)
    handle.remove()
    return seen[0].reshape(batch.size, -1, vlm.anatomy.d_model)


@pytest.mark.parametrize(("width", "height"), [(20, 16), (16, 16), (40, 40), (64, 16), (10, 60), (100, 8)])
def test_the_grid_is_that_of_the_tiles(width, height, vlm, image):
    batch = vlm.encode([image(0, width, height)], ["<|image|> what ?"])
    (patches,) = batch.patches
    ratio = int(batch.extra["aspect_ratio_ids"])
    rows, columns = vlm.model.config.vision_config.supported_aspect_ratios[ratio - 1]
    n_tiles = int(batch.extra["aspect_ratio_mask"].sum())
    assert patches.grids == {(0, BASE_VIEW): (rows * SIDE, columns * SIDE)}
    assert patches.n_tiles == n_tiles == rows * columns
    assert len(patches) == n_tiles * PER_TILE
    first = torch.arange(n_tiles) * PER_TILE  # CLS tokens
    assert torch.equal((~patches.on_image).nonzero()[:, 0], first)
    assert (patches.table[first] == torch.tensor([0, -1, -1])).all()
    assert batch.cross_mask.shape == (1, MAX_TILES * PER_TILE)
    assert batch.cross_mask[0].tolist() == [True] * len(patches) + [False] * ((MAX_TILES - n_tiles) * PER_TILE)
    assert batch.input_ids[0].tolist().count(IMAGE) == int(batch.image_mask.sum()) == 1  # in the prompt


def test_pixels_of_a_patch_reach_the_key_of_its_row_and_column(vlm):
    """32 x 32 pixels are 2 x 2 tiles, not resized; a tower without attention passes nothing from patch to patch."""
    model = copy.deepcopy(vlm.model)
    for path in vlm.anatomy.vision_blocks:
        torch.nn.init.zeros_(model.get_submodule(path).self_attn.o_proj.weight)
    alone = VLM.wrap(model, vlm.processor)

    def keys(pixels):
        batch = alone.encode([pixels], ["<|image|> what ?"])
        return batch.patches[0], keys_seen(alone, batch)[batch.cross_mask]

    pixels = np.random.default_rng(0).integers(0, 200, (32, 32, 3), dtype=np.uint8)
    patches, before = keys(pixels)
    assert patches.grids == {(0, BASE_VIEW): (8, 8)}
    for row, column in [(0, 0), (0, 7), (5, 2), (3, 4), (7, 7)]:
        changed = pixels.copy()
        changed[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 255
        _, after = keys(changed)
        moved = (after - before).abs().amax(dim=-1) > 1e-4
        assert torch.equal(moved, (patches.row == row) & (patches.column == column))


def test_keys_of_several_images_are_what_the_projector_gives(vlm, image):
    """Two images of 1 and 4 tiles in a row, one image in the other; nothing stands before the first image."""
    batch = vlm.encode(
        [[image(0, 16, 16), image(1, 40, 40)], [image(2, 64, 16)]],
        ["<|image|> <|image|> is there ?", "<|image|> what ?"],
    )
    assert batch.tiles == (5, 4)
    assert batch.patches[0].image.tolist() == [0] * PER_TILE + [1] * 4 * PER_TILE
    assert batch.cross_mask.sum(dim=1).tolist() == [len(one) for one in batch.patches]
    assert batch.cross_mask.shape == (2, 2 * MAX_TILES * PER_TILE)
    with vlm.trace(sites.projector_out()) as trace:
        keys = keys_seen(vlm, batch)
    tiles = trace["projector_out"][0]  # [tile, position, d_model]: five of row 0, four of row 1
    assert tiles.shape == (9, PER_TILE, vlm.anatomy.d_model)
    torch.testing.assert_close(tiles.flatten(0, 1), keys[batch.cross_mask], rtol=0, atol=0)


def test_vision_sites_come_tile_by_tile(vlm, image):
    """Both stacks of blocks, without padded patches and tiles; a gated block adds what it multiplied by its gate."""
    batch = vlm.encode([image(0, 40, 40), image(1, 16, 16)], ["<|image|> is there ?", "<|image|> what ?"])
    asked = (
        "vision_resid_pre",
        "vision_resid_mid",
        "vision_resid_post",
        "vision_attn_out",
        "vision_mlp_out",
        "vision_z",
    )
    with vlm.trace(
        *(getattr(sites, name)() for name in asked), sites.vision_attention(queries="all", keys="all")
    ) as trace:
        vlm.forward(batch)
    tower = copy.deepcopy(vlm.model).model.vision_model
    tower.set_attn_implementation("eager")
    states, weights = [], []
    for block in (*tower.transformer.layers, *tower.global_transformer.layers):
        block.register_forward_hook(lambda module, args, out: states.append(out))
        block.self_attn.register_forward_hook(lambda module, args, out: weights.append(out[1]))
    with torch.no_grad():
        tower(*(batch.extra[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")))
    padded = 24  # 17 positions of a tile, padded to a multiple of 8
    assert vlm.anatomy.n_vision_layers == len(states) == 5
    places = [(0, tile) for tile in range(4)] + [(1, 0)]
    for layer in range(5):
        found = trace["vision_resid_post"][layer]
        assert found.shape == (5, PER_TILE, vlm.anatomy.d_vision)
        for number, (row, tile) in enumerate(places):
            own = slice(tile * padded, tile * padded + PER_TILE)
            torch.testing.assert_close(found[number], states[layer][row, own], rtol=0, atol=1e-5)
            torch.testing.assert_close(
                trace["vision_attention"][layer][number], weights[layer][row, :, own, own], rtol=0, atol=1e-5
            )
        pre, mid = trace["vision_resid_pre"][layer], trace["vision_resid_mid"][layer]
        torch.testing.assert_close(mid, pre + trace["vision_attn_out"][layer], rtol=0, atol=1e-5)
        torch.testing.assert_close(found, mid + trace["vision_mlp_out"][layer], rtol=0, atol=1e-5)


def test_prompts_whose_answers_would_depend_on_each_other_are_refused(vlm, image):
    """Text before the first image reads the padding of images that only another prompt has."""
    one, two = "is <|image|> there ?", "is <|image|> in <|image|> ?"
    pictures = [[image(0)], [image(1), image(2)]]
    with pytest.raises(InputError, match="equal numbers of images"):
        vlm.encode(pictures, [one, two])
    with pytest.raises(InputError, match="equal numbers of images"):
        vlm.encode([[image(0)], None], ["<|image|> what ?", "what ?"])  # text without an image is before any image
    vlm.encode([[image(0)], [image(1)]], [one, "is there a <|image|> ?"])
    vlm.encode(pictures, ["<|image|> is there ?", "<|image|> is in <|image|> ?"])
    vlm.encode([None, None], ["what ?", "is there ?"])


@pytest.mark.parametrize("text", ["<|image|> is there a dog ?", "is there a <|image|> dog ?"])
def test_a_batch_gives_what_its_rows_give_alone(text, vlm, image):
    pictures, texts = [image(0, 40, 40), image(1), image(2, 16, 60)], [text, "describe <|image|>", "<|image|> what ?"]
    logits = vlm.forward(vlm.encode(pictures, texts)).logits[:, -1]
    for row in range(3):
        alone = vlm.forward(vlm.encode(pictures[row : row + 1], texts[row : row + 1])).logits[0, -1]
        torch.testing.assert_close(logits[row], alone, rtol=0, atol=1e-4)


def test_rows_with_fewer_images_give_what_they_give_alone_after_the_image(vlm, image):
    pictures = [[image(0)], [image(1), image(2, 40, 40)]]
    texts = ["<|image|> is there a dog ?", "<|image|> is in <|image|> ?"]
    logits = vlm.forward(vlm.encode(pictures, texts)).logits[:, -1]
    for row in range(2):
        alone = vlm.forward(vlm.encode(pictures[row : row + 1], texts[row : row + 1])).logits[0, -1]
        torch.testing.assert_close(logits[row], alone, rtol=0, atol=1e-4)


def test_without_images_the_cross_attention_layers_are_skipped(vlm, image):
    deleted = vlm.encode([image(0)], ["<|image|> what ?"]).without_images()
    alone = vlm.encode(None, ["what ?"])
    assert deleted.cross_mask is None
    assert alone.cross_mask is None
    assert torch.equal(deleted.input_ids, alone.input_ids)
    torch.testing.assert_close(vlm.forward(deleted).logits, vlm.forward(alone).logits, rtol=0, atol=1e-5)


def test_sites_that_a_cross_attention_layer_does_not_have(vlm):
    anatomy = vlm.anatomy
    assert anatomy.layers("cross_attention") == tuple(CROSS)
    assert anatomy.layers("attention") == (0, 2)
    for site in ("k", "v", "mlp_out"):
        assert anatomy.layers(site) == (0, 2)
    assert anatomy.layers("q") == anatomy.layers("attn_out") == (0, 1, 2, 3)
    assert [kind == "cross_attention" for kind in anatomy.attention_types] == [layer in CROSS for layer in range(4)]
    with pytest.raises(UnsupportedError, match=r"layer 0 .*no 'cross_attention'.*\[1, 3\]"):
        anatomy.place("cross_attention", 0)
