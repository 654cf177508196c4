"""InternVL and Aya Vision: tiles and the whole image, in separate runs of tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import cohere, internvl

from slitlamp.errors import UnsupportedError
from slitlamp.models import BASE_VIEW, TILE_VIEW
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

PLACEHOLDERS = {"internvl": "<IMG_CONTEXT>", "aya_vision": "<image>"}
SIDE = 2  # tokens along a side of a tile: 16 px of 4 px, 2 x 2 to a token


@pytest.fixture(scope="module", params=list(PLACEHOLDERS))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def vlm(name) -> VLM:
    return {**internvl.BUILDERS, **cohere.BUILDERS}[name]()


SHAPES = [(16, 16), (32, 16), (16, 32), (64, 16), (16, 64), (50, 50), (33, 20), (9, 40), (100, 30), (31, 33)]


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_the_grid_is_that_of_the_processors_tiles(width, height, name, vlm, image):
    """The processor's own count of tiles, and its own tiles: the whole picture, scaled to the grid, cut row by row."""
    one = image(0, width, height)
    batch = vlm.encode([one], [f"what {PLACEHOLDERS[name]} ?"])
    (patches,) = batch.patches
    options = {"crop_to_patches": True}
    assert patches.n_tiles == vlm.processor.image_processor.get_number_of_image_patches(height, width, options)
    assert len(batch.extra["pixel_values"]) == patches.n_tiles
    assert patches.grids[0, BASE_VIEW] == (SIDE, SIDE)
    assert len(patches) == patches.n_tiles * SIDE**2
    if patches.n_tiles == 1:
        assert set(patches.grids) == {(0, BASE_VIEW)}
        return
    rows, columns = patches.grids[0, TILE_VIEW]
    assert rows * columns == (patches.n_tiles - 1) * SIDE**2
    assert patches.view.tolist() == [TILE_VIEW] * (len(patches) - SIDE**2) + [BASE_VIEW] * SIDE**2
    scaled = one.resize((columns // SIDE * 16, rows // SIDE * 16), resample=vlm.processor.image_processor.resample)
    whole = vlm.processor.image_processor(scaled, crop_to_patches=False, do_resize=False, return_tensors="pt")
    whole = whole["pixel_values"][0]
    for tile, pixels in enumerate(batch.extra["pixel_values"][:-1]):
        first = tile * SIDE**2
        top, left = int(patches.row[first]) // SIDE * 16, int(patches.column[first]) // SIDE * 16
        torch.testing.assert_close(pixels, whole[:, top : top + 16, left : left + 16], rtol=0, atol=1e-3)


def test_text_tokens_between_tiles_are_no_image_tokens(vlm, name, image):
    batch = vlm.encode([image(0, 32, 32)], [f"{PLACEHOLDERS[name]} what ?"])
    places = batch.image_mask[0].nonzero()[:, 0]
    gaps = int((places.diff() > 1).sum())
    assert gaps == (4 if name == "aya_vision" else 0)  # Aya Vision names each of the 4 tiles and the whole image


def test_several_images_and_none(vlm, name, image):
    one = PLACEHOLDERS[name]
    batch = vlm.encode(
        [[image(0, 32, 16), image(1)], None, [image(2, 16, 64)]],
        [f"is {one} in {one} ?", "what ?", f"{one} describe this"],
    )
    assert batch.tiles == (3 + 1, 0, 5)
    assert batch.patches[0].image.tolist() == [0] * 3 * SIDE**2 + [1] * SIDE**2
    vlm.forward(batch, logits_to_keep=1)


def test_a_processor_that_does_not_cut_gives_one_view(vlm, name, image):
    """What the model's processor is set to do is what counts."""
    processor = copy.deepcopy(vlm.processor)
    processor.image_processor.max_patches = 1
    whole = VLM.wrap(vlm.model, processor)
    batch = whole.encode([image(0, 64, 16)], [f"{PLACEHOLDERS[name]} what ?"])
    assert batch.tiles == (1,)
    assert set(batch.patches[0].grids) == {(0, BASE_VIEW)}


def test_tiles_that_were_made_otherwise_are_refused(vlm, name, image, monkeypatch):
    processor = copy.deepcopy(vlm.processor)
    own = type(processor.image_processor).crop_image_to_patches

    def three(self, picture, min_patches, max_patches, **options):
        return own(self, picture, 3, 3, **options)

    monkeypatch.setattr(type(processor.image_processor), "crop_image_to_patches", three)
    with pytest.raises(UnsupportedError, match=r"made 4 tiles, .* make 5"):
        VLM.wrap(vlm.model, processor).encode([image(0, 32, 32)], [f"{PLACEHOLDERS[name]} what ?"])


def test_logits_of_aya_vision_are_those_of_its_head(image):
    """Hugging Face's Aya Vision leaves Cohere's `logit_scale` out, unlike Cohere's text models; a trace holds what it gives."""
    vlm = cohere.build()
    batch = vlm.encode([image(0)], ["<image> what ?"])
    with vlm.trace(sites.logits(positions="all"), sites.resid_post(layers=[2])) as trace:
        vlm.forward(batch)
    assert vlm.model.config.text_config.logit_scale == 0.25
    with torch.no_grad():
        normed = vlm.model.get_submodule(vlm.anatomy.modules["final_norm"])(trace["resid_post"][2])
        wanted = vlm.model.lm_head(normed)
    torch.testing.assert_close(trace["logits"][0], wanted, rtol=0, atol=1e-4)


def test_layers_of_aya_vision_that_see_a_window_are_named_and_see_less(image):
    vlm = cohere.build()
    assert vlm.anatomy.attention_types == ("sliding_attention", "sliding_attention", "full_attention")
    batch = vlm.encode([image(0, 32, 32)], ["<image> is there a dog in the image ?"])
    with vlm.trace(sites.attention(queries="last", keys="all")) as trace:
        vlm.forward(batch)
    seen = [int((trace["attention"][layer][0, :, 0] > 0).any(dim=0).sum()) for layer in range(3)]
    assert seen == [8, 8, batch.length]
