"""Versions of a batch with other pixels, against the processors and against what a map says pixel by pixel."""

import dataclasses
import functools

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_models import BUILDERS

from slitlamp.decoding import image_free
from slitlamp.decoding.pixel_views import check_one_tile, masked, of_shade
from slitlamp.errors import InputError, UnknownNameError, UnsupportedError
from slitlamp.models import Batch
from slitlamp.models.patches import Patches
from slitlamp.vlm import VLM


@functools.cache
def built(name) -> VLM:
    return BUILDERS[name]()


def encoded(vlm, pictures):
    """One row per picture: its placeholder, and a question."""
    family = vlm.anatomy.family
    placeholder = "" if family.placeholder is None else getattr(vlm.processor, family.placeholder)
    return vlm.encode(pictures, [f"{placeholder} is this red ?"] * len(pictures))


@pytest.mark.parametrize("name", BUILDERS)
def test_shades_are_those_of_the_processor(name, image):
    """A picture of one colour goes through the processor as any; of a size that needs no filling up."""
    vlm = built(name)
    small = (32, 16) if name == "llava_next" else (16, 16)  # which makes fewer tiles
    batch = encoded(vlm, [image(0, 32, 32), image(1, *small)])
    for shade, value in (("black", 0), ("grey", 127.5), ("white", 255)):
        found = of_shade(batch, shade)
        ends = []
        for level in {int(np.floor(value)), int(np.ceil(value))}:
            pictures = [PIL.Image.new("RGB", size, (level,) * 3) for size in ((32, 32), small)]
            ends.append(encoded(vlm, pictures).extra["pixel_values"].float())
        wanted = torch.stack(ends).mean(dim=0)
        torch.testing.assert_close(found.float(), wanted, rtol=0, atol=1e-5)
        view, edits = image_free(batch, shade)
        assert edits == []
        assert torch.equal(view.extra["pixel_values"], found)


def test_channels_have_their_own_shades(build_llava, image):
    vlm = build_llava()
    vlm.processor.image_processor.image_mean = [0.4, 0.5, 0.6]
    vlm.processor.image_processor.image_std = [0.2, 0.25, 0.5]
    batch = encoded(vlm, [image(0)])
    for shade, wanted in (("black", [-2.0, -2.0, -1.2]), ("white", [3.0, 2.0, 0.8]), ("grey", [0.5, 0.0, -0.2])):
        assert of_shade(batch, shade)[0, :, 3, 5].tolist() == pytest.approx(wanted, abs=1e-5)
    vlm.processor.image_processor.do_normalize = False
    assert (*encoded(vlm, [image(0)]).black, *encoded(vlm, [image(0)]).white) == (0, 0, 0, 1, 1, 1)
    vlm.processor.image_processor.do_rescale = False
    assert encoded(vlm, [image(0)]).white == (255, 255, 255)


def test_unknown_shades_and_batches_without_any_are_refused(llava, image):
    batch = encoded(llava, [image(0)])
    with pytest.raises(UnknownNameError, match="unknown shade 'gray'; did you mean 'grey'"):
        of_shade(batch, "gray")
    with pytest.raises(InputError, match="does not say what its processor makes of black"):
        of_shade(dataclasses.replace(batch, black=()), "grey")


def planted(batch: Batch, bright: list[int]) -> list[torch.Tensor]:
    """Maps that are 1 at some tokens of each row and 0 elsewhere."""
    found = []
    for places in batch.patches:
        values = torch.zeros(len(places))
        values[bright] = 1.0
        found.append(values)
    return found


@pytest.mark.parametrize("name", ["llava", "llava siglip", "vipllava", "paligemma", "gemma3"])
def test_what_a_planted_map_says_little_of_is_black(name, image):
    """A map of one bright token keeps the pixels around it, and blackens those far away; all others stay bit for bit."""
    vlm = built(name)
    batch = encoded(vlm, [image(0), image(1)])
    check_one_tile(vlm.anatomy, "a test")
    pixels = batch.extra["pixel_values"]
    black = torch.tensor(batch.black)[:, None, None]
    for token in (0, len(batch.patches[0]) - 1):
        view = masked(batch, planted(batch, [token]), 0.1).extra["pixel_values"]
        for row in range(2):
            kept = (view[row] == pixels[row]).all(dim=0)
            assert torch.equal(torch.where(kept, pixels[row], black), view[row])
            places, (rows, columns) = batch.patches[row], batch.patches[row].grids[0, 0]
            height, width = kept.shape
            y = int((places.row[token] + 0.5) * height / rows)
            x = int((places.column[token] + 0.5) * width / columns)
            assert kept[y, x]
            assert not kept[height - 1 - y, width - 1 - x]
            assert 0.1 <= kept.float().mean() < 0.3


def test_the_share_of_pixels_is_the_one_asked_for(llava, image):
    """Against numpy's interpolation by hand, at the middles of pixels and tokens; each row by its own map."""
    batch = encoded(llava, [image(0), image(1)])
    maps = [torch.rand(16, generator=torch.Generator().manual_seed(row)) for row in range(2)]
    places = (np.arange(16) + 0.5) * 4 / 16 - 0.5
    low = np.clip(np.floor(places), 0, 3).astype(int)
    high, share = np.clip(low + 1, 0, 3), np.clip(places, 0, None) - low
    for keep in (0.25, 0.5, 0.8):
        view = masked(batch, maps, keep).extra["pixel_values"]
        for row in range(2):
            grid = maps[row].view(4, 4).double().numpy()
            across = grid[:, low] * (1 - share) + grid[:, high] * share
            large = across[low] * (1 - share)[:, None] + across[high] * share[:, None]
            kept = (view[row] == batch.extra["pixel_values"][row]).all(dim=0)
            assert kept.numpy().tolist() == (large >= np.quantile(large, 1 - keep) - 1e-6).tolist()
            assert kept.float().mean() == pytest.approx(keep, abs=1 / 256)
    assert torch.equal(masked(batch, maps, 1.0).extra["pixel_values"], batch.extra["pixel_values"])


def test_several_images_each_go_by_their_own_part_of_the_map(llava, image):
    batch = llava.encode([[image(0), image(1)]], ["is <image> in <image> ?"])
    maps = torch.rand(32, generator=torch.Generator().manual_seed(3))
    both = masked(batch, [maps], 0.5).extra["pixel_values"]
    for number in range(2):
        alone = encoded(llava, [image(number)])
        one = masked(alone, [maps[16 * number : 16 * number + 16]], 0.5).extra["pixel_values"]
        assert torch.equal(both[number], one[0])


def test_what_cannot_be_masked_is_refused(llava, llava_next, image):
    batch = encoded(llava, [image(0)])
    for keep in (0.0, 1.5):
        with pytest.raises(InputError, match=f"keep must be above 0 and at most 1, found {keep}"):
            masked(batch, planted(batch, [0]), keep)
    with pytest.raises(InputError, match=r"a map of shape \[4\] for 16 image tokens"):
        masked(batch, [torch.zeros(4)], 0.5)
    with pytest.raises(InputError, match="needs an image in every row"):
        masked(llava.encode(prompts=["is it red ?"]), [torch.zeros(0)], 0.5)
    tiles = encoded(llava_next, [image(0)])
    with pytest.raises(UnsupportedError, match="images that are one picture each"):
        masked(tiles, [torch.zeros(len(tiles.patches[0]))], 0.5)
    assert isinstance(tiles.patches[0], Patches)


@pytest.mark.parametrize("name", BUILDERS)
def test_families_that_cannot_be_masked_are_refused_by_name(name):
    anatomy = built(name).anatomy
    if name in ("llava", "llava siglip", "vipllava", "gemma3") or name.startswith("paligemma"):
        check_one_tile(anatomy, "AGLA")
        return
    with pytest.raises(
        UnsupportedError, match=f"AGLA: {anatomy.family.name.replace('(', '.').replace(')', '.')} does not give"
    ):
        check_one_tile(anatomy, "AGLA")
