"""A processor that cuts out the middle of a picture: which part the model sees, and where boxes are on it."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from slitlamp.models.images import WHOLE, CenterCrop
from slitlamp.tracing.probe import labels_as_seen
from slitlamp.vlm import VLM

CROPPING = {
    "shortest edge": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "narrower": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 24}},
    "both sides": {"size": {"height": 48, "width": 64}, "crop_size": {"height": 32, "width": 32}},
    "bars": {"size": {"shortest_edge": 24}, "crop_size": {"height": 32, "width": 32}},
}


def pixels(processor: CLIPImageProcessorPil, picture: np.ndarray) -> np.ndarray:
    return np.asarray(processor(Image.fromarray(picture), return_tensors="np")["pixel_values"])[0]


@pytest.mark.parametrize("name", CROPPING)
@pytest.mark.parametrize("size", [(200, 100), (100, 200), (160, 150), (96, 96)])
def test_the_window_is_what_changes_the_pixels(name: str, size: tuple[int, int]) -> None:
    processor = CLIPImageProcessorPil(**CROPPING[name])
    crop = CenterCrop.of(processor)
    assert crop is not None
    left, top, right, bottom = crop.window(size)
    width, height = size
    plain = np.full((height, width, 3), 128, dtype=np.uint8)
    before = pixels(processor, plain)
    for axis, low, high in ((1, left, right), (0, top, bottom)):
        length = plain.shape[axis]
        at = (np.arange(length) + 0.5) / length
        reach = (2 * max(1, length / 24) + 1) / length  # of the filter that resizes: two pixels of the smallest result
        outside = (at < low - reach) | (at > high + reach)
        for chosen, expected in ((outside, False), (~outside, True)):
            if chosen.any():
                painted = plain.copy()
                np.moveaxis(painted, axis, 0)[chosen] = 255
                assert (np.abs(pixels(processor, painted) - before).max() > 1e-3) == expected


def test_without_cropping_the_model_sees_the_whole(llava: VLM) -> None:
    assert CenterCrop.of(CLIPImageProcessorPil(do_center_crop=False)) is None
    batch = llava.encode([Image.new("RGB", (60, 30))], ["<image> a picture"])
    assert batch.window(0) == WHOLE
    assert batch.seen(0) is batch.images[0][0]


@pytest.fixture
def cropping(llava: VLM) -> VLM:
    processor = copy.deepcopy(llava.processor)
    side = int(processor.image_processor.size["height"] or processor.image_processor.size["shortest_edge"])
    processor.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return VLM.wrap(llava.model, processor, name="cropping")


def test_pictures_and_boxes_are_as_the_model_sees_them(cropping: VLM) -> None:
    picture = Image.new("RGB", (64, 32), "white")
    picture.paste("black", (24, 0, 40, 32))  # the middle half of what is seen
    batch = cropping.encode([picture, picture.resize((32, 32))], ["<image> a picture"] * 2)
    assert batch.window(0) == (0.25, 0.0, 0.75, 1.0)
    seen = np.asarray(batch.seen(0))
    assert seen.shape == (32, 32, 3)
    assert (seen[:, 8:24] == 0).all()
    assert (seen[:, :8] == 255).all()
    assert batch.window(1) == WHOLE
    boxes = [[(0.375, 0.0, 0.625, 1.0), (0.0, 0.0, 0.2, 1.0), (0.2, 0.5, 0.5, 1.0)], None, []]
    table = pd.DataFrame({"token": [0, 1, 2], "boxes": boxes})
    first, second = labels_as_seen(batch, [table, table]) or ()
    assert first is not None
    assert second is not None
    assert first["boxes"].tolist() == [((0.25, 0.0, 0.75, 1.0), (0.0, 0.5, 0.5, 1.0)), None, ()]
    assert [list(one or []) for one in second["boxes"]] == [list(one or []) for one in boxes]
    assert table["boxes"].tolist() == boxes


def test_a_probe_is_given_boxes_as_the_model_sees_them(cropping: VLM) -> None:
    from probes import ClsOutliers

    batch = cropping.encode([Image.new("RGB", (64, 32), "white")], ["<image> a picture"]).with_continuation([[5, 6]])
    table = pd.DataFrame(
        {"token": [0, 1], "word": ["a", "b"], "label": ["object", "other"], "boxes": [[(0.25, 0.0, 0.5, 1.0)], []]}
    )
    taken: list[object] = []
    probe = ClsOutliers(top_k=1)
    probe.update = lambda batch, trace, labels=None: taken.append(labels)  # type: ignore[method-assign]
    cropping.measure(probe, batch, [table])
    assert taken[0][0]["boxes"].tolist() == [((0.0, 0.0, 0.5, 1.0),), ()]  # type: ignore[index]
