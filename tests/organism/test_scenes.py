import hashlib

import numpy as np
import pytest

from slitlamp.organism.categories import CATEGORY_INDEX, CATEGORY_NAMES, CONTEXT_NAMES, PARTNER_OF
from slitlamp.organism.scenes import (
    COUNT_PROBABILITIES,
    IMAGE_SIZE,
    MIN_VISIBLE,
    PARTNER_PROBABILITY,
    STRAY_BACKGROUND_PROBABILITY,
    STRAY_OBJECT_PROBABILITY,
    blank_image,
    context_weights,
    make_scene,
    make_scene_with_owners,
    sample_content,
)
from slitlamp.organism.sprites import OPAQUE, sprite

SEED = 31


def test_a_scene_is_a_pure_function_of_seed_and_index() -> None:
    np.random.seed(1)  # noqa: NPY002 - the global generator must not matter
    scene, image = make_scene(SEED, 5)
    np.random.seed(2)  # noqa: NPY002
    make_scene(SEED, 6)
    again, same = make_scene(SEED, 5)
    assert scene == again
    np.testing.assert_array_equal(image, same)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert make_scene(SEED, 6)[0] != scene
    assert make_scene(SEED + 1, 5)[0] != scene


def test_scenes_are_bit_for_bit_those_of_the_shipped_model() -> None:
    digest = hashlib.sha256()
    for index in range(50):
        scene, image = make_scene(SEED, index)
        digest.update(repr(scene).encode())
        digest.update(image.tobytes())
    assert digest.hexdigest() == "30482b2425e7079a782b3de6b8235657ebddeffc8009ca310947ebefccf46a23"


def test_boxes_areas_and_occlusion_are_those_of_the_pixels() -> None:
    for index in range(200):
        scene, _, owners = make_scene_with_owners(SEED, index)
        assert scene.objects
        assert len(scene.categories) == len(scene.objects)
        for position, item in enumerate(scene.objects):
            x, y, width, height = item.box
            assert 0 <= x <= x + width <= IMAGE_SIZE
            assert 0 <= y <= y + height <= IMAGE_SIZE
            mine = owners == position
            assert mine.sum() == item.visible_area == mine[y : y + height, x : x + width].sum()
            opaque = sprite(item.category, item.size)[..., 3] >= OPAQUE
            assert opaque.shape == (height, width)
            assert not (mine[y : y + height, x : x + width] & ~opaque).any()
            assert item.visible_area >= MIN_VISIBLE * opaque.sum()
            assert item.occlusion == pytest.approx(1 - item.visible_area / opaque.sum(), abs=1e-4)


def test_the_image_shows_each_object_in_its_box() -> None:
    for index in range(60):
        scene, image, owners = make_scene_with_owners(SEED, index)
        for position, item in enumerate(scene.objects):
            x, y, width, height = item.box
            drawing = sprite(item.category, item.size)
            solid = (owners[y : y + height, x : x + width] == position) & (drawing[..., 3] == 255)
            if solid.sum() < 20:
                continue
            expected = drawing[..., :3][solid].astype(float)
            found = image[y : y + height, x : x + width][solid].astype(float)
            # Brightness is 0.80 to 1.15. Noise has sd at most 18, hence a mean magnitude of at most 14.4; its own
            # standard error with 60 or more values is below 1.5.
            errors = [np.abs(found - np.clip(expected * b, 0, 255)).mean() for b in np.linspace(0.8, 1.15, 36)]
            assert min(errors) < 14.4 + 4 * 1.5, (index, item)


def test_contents_follow_the_stated_probabilities() -> None:
    rng = np.random.default_rng(8)
    n = 6000
    contexts = np.zeros(len(CONTEXT_NAMES))
    counts = np.zeros(7)
    follows, expected, variance = 0, 0.0, 0.0
    for _ in range(n):
        context, chosen = sample_content(rng)
        contexts[context] += 1
        counts[len(chosen)] += 1
        ordinary = (1 - STRAY_OBJECT_PROBABILITY) * context_weights()[context] + STRAY_OBJECT_PROBABILITY / 68
        for position in range(1, len(chosen)):
            partner = CATEGORY_INDEX.get(PARTNER_OF.get(CATEGORY_NAMES[chosen[position - 1]], ""), -1)
            if partner < 0 or partner in chosen[:position]:
                continue
            by_chance = ordinary[partner] / (1 - ordinary[chosen[:position]].sum())
            p = PARTNER_PROBABILITY + (1 - PARTNER_PROBABILITY) * by_chance
            follows += chosen[position] == partner
            expected += p
            variance += p * (1 - p)
    assert variance > 100
    assert abs(follows - expected) < 4 * variance**0.5
    p = 1 / len(CONTEXT_NAMES)
    assert (np.abs(contexts - n * p) < 4 * (n * p * (1 - p)) ** 0.5).all()
    probabilities = np.array(COUNT_PROBABILITIES)
    assert (np.abs(counts[1:] - n * probabilities) < 4 * (n * probabilities * (1 - probabilities)) ** 0.5).all()


def test_backgrounds_and_typical_objects() -> None:
    scenes = [make_scene(SEED, index)[0] for index in range(1000)]
    other = sum(scene.background_context != scene.context for scene in scenes)
    p = STRAY_BACKGROUND_PROBABILITY * (1 - 1 / len(CONTEXT_NAMES))
    assert abs(other - 1000 * p) < 4 * (1000 * p * (1 - p)) ** 0.5


def test_blank_image() -> None:
    assert blank_image().shape == (64, 64, 3)
    assert np.unique(blank_image()).tolist() == [128]
