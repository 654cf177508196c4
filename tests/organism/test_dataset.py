"""The shipped data set is what its generator makes, and says what is in its images."""

import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from slitlamp.evaluation import GroundTruth, Synonyms, chair_rows, chair_scores, read_pope
from slitlamp.evaluation.pope import SPLITS
from slitlamp.organism.categories import CATEGORY_NAMES, CONTEXT_NAMES
from slitlamp.organism.dataset import N_IMAGES, SEED, build_emoji_scenes, encode_png, question_text
from slitlamp.organism.scenes import SIZE_RANGES, context_weights, make_scene
from slitlamp.organism.tokenizer import build_tokenizer

SHIPPED = Path(__file__).parents[2] / "datasets" / "emoji_scenes"
BY_HAND = {"README.md", "OFL.txt"}


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rebuilt")
    build_emoji_scenes(folder)
    return folder


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(SEED, index)[0] for index in range(N_IMAGES)]


@pytest.fixture(scope="module")
def synonyms():
    return Synonyms.read(SHIPPED / "synonyms.txt")


def load(name):
    return json.loads((SHIPPED / name).read_text())


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def test_the_folder_holds_what_the_builder_writes_and_no_code(rebuilt):
    shipped = {str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*") if path.is_file()}
    made = {str(path.relative_to(rebuilt)) for path in rebuilt.rglob("*") if path.is_file()}
    assert shipped == made | BY_HAND
    assert not list(SHIPPED.parent.rglob("*.py"))
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 3.5e6


def test_text_files_are_rebuilt_byte_for_byte(rebuilt):
    names = [path.name for path in rebuilt.iterdir() if path.is_file()]
    assert len(names) == 6
    for name in names:
        assert (rebuilt / name).read_bytes() == (SHIPPED / name).read_bytes(), name


def test_images_are_rebuilt_pixel_for_pixel(rebuilt):
    for path in sorted((rebuilt / "images").iterdir()):
        shipped = pixels((SHIPPED / "images" / path.name).read_bytes())
        assert shipped.shape == (64, 64, 3)
        np.testing.assert_array_equal(pixels(path.read_bytes()), shipped, err_msg=path.name)


def test_images_are_rebuilt_byte_for_byte_where_the_compression_is_the_same(rebuilt):
    # How a PNG is compressed is the choice of the zlib that Pillow was built with; what it shows is not. The pixels are
    # therefore compared above, everywhere, and the bytes only where one file that is encoded again shows that this
    # Pillow compresses as that of the shipped files did.
    first = (SHIPPED / "images" / "000000.png").read_bytes()
    if encode_png(pixels(first)) != first:
        pytest.skip("this Pillow compresses PNG files differently from the one that made the shipped files")
    for path in (rebuilt / "images").iterdir():
        assert path.read_bytes() == (SHIPPED / "images" / path.name).read_bytes(), path.name


def test_a_part_of_the_set_has_the_same_first_images(tmp_path):
    written = build_emoji_scenes(tmp_path, n_images=40)
    assert len(written) == 40 + 6
    assert all(path.is_file() for path in written)
    for index in (0, 7, 39):
        name = f"images/{index:06d}.png"
        np.testing.assert_array_equal(pixels((tmp_path / name).read_bytes()), pixels((SHIPPED / name).read_bytes()))


def test_instances_are_valid_coco_and_say_what_the_scenes_say(scenes):
    data = load("instances.json")
    assert [category["name"] for category in data["categories"]] == list(CATEGORY_NAMES)
    assert [image["id"] for image in data["images"]] == list(range(N_IMAGES))
    assert [item["id"] for item in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))
    names = {category["id"]: category["name"] for category in data["categories"]}
    found = [Counter() for _ in scenes]
    for item in data["annotations"]:
        found[item["image_id"]][names[item["category_id"]]] += 1
        x, y, width, height = item["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + width <= 64
        assert y + height <= 64
        assert 0 < item["area"] <= width * height
        assert 0 <= item["occlusion"] <= 0.55  # at least 45 % stay visible
    assert found == [Counter(item.category for item in scene.objects) for scene in scenes]
    assert [(image["context"], image["background_context"]) for image in data["images"]] == [
        (scene.context, scene.background_context) for scene in scenes
    ]


def test_reference_captions_name_every_object_and_nothing_else(scenes, synonyms):
    instances = GroundTruth.from_coco(SHIPPED / "instances.json", synonyms=synonyms)
    joined = GroundTruth.from_coco(SHIPPED / "instances.json", SHIPPED / "captions.json", synonyms=synonyms)
    assert joined == instances
    assert dict(joined.objects) == {scene.index: scene.categories for scene in scenes}
    references = pd.DataFrame(load("captions.json")["annotations"])
    assert Counter(references["image_id"]) == dict.fromkeys(range(N_IMAGES), 5)
    for _, captions in references.groupby(references.groupby("image_id").cumcount()):
        scores = chair_scores(chair_rows(captions, joined, synonyms), n_resamples=2).set_index("metric")["value"]
        assert scores[["chair_i", "chair_s", "recall", "precision", "f1"]].tolist() == [0, 0, 1, 1, 1]


def test_synonyms_cover_the_categories(synonyms):
    assert synonyms.categories == CATEGORY_NAMES
    for name in CATEGORY_NAMES:
        assert [mention.category for mention in synonyms.mentions(f"There is a {name}.")] == [name]


@pytest.mark.parametrize("split", SPLITS)
def test_pope_files_are_sound(split, scenes):
    questions = read_pope(SHIPPED / f"pope_{split}.jsonl")
    present = {f"{scene.index:06d}.png": scene.categories for scene in scenes}
    asked = {}
    for question in questions:
        assert question.object is not None
        assert question.text == question_text(question.object)
        assert (question.object in present[question.image]) == (question.label == "yes")
        asked.setdefault(question.image, []).append(question)
    assert set(asked) == {image for image, categories in present.items() if len(categories) >= 3}
    for pair in asked.values():
        assert [question.label for question in pair] == ["yes", "no"] * 3
        assert len({question.object for question in pair}) == 6
    assert [question.question_id for question in questions] == list(range(1, len(questions) + 1))


def test_positives_are_the_same_in_all_splits_and_of_all_sizes(scenes):
    positives = [
        [(q.image, q.object) for q in read_pope(SHIPPED / f"pope_{split}.jsonl") if q.label == "yes"]
        for split in SPLITS
    ]
    assert positives[0] == positives[1] == positives[2]
    size = {(f"{scene.index:06d}.png", item.category): item.size for scene in scenes for item in scene.objects}
    shares = [np.mean([low <= size[key] <= high for key in positives[0]]) for low, high in SIZE_RANGES]
    # Of the objects .30, .35 and .35; three binomial errors of sqrt(.35 x .65 / 663) = .019.
    assert shares == pytest.approx([0.30, 0.35, 0.35], abs=0.056)


def test_the_models_tokenizer_knows_every_word():
    tokenizer = build_tokenizer()
    texts = [item["caption"] for item in load("captions.json")["annotations"]]
    texts += [question.text for split in SPLITS for question in read_pope(SHIPPED / f"pope_{split}.jsonl")]
    for text in sorted(set(texts)):
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text


def test_the_card_gives_the_numbers_of_the_files(scenes):
    card = " ".join((SHIPPED / "README.md").read_text().split())
    annotations, captions = load("instances.json")["annotations"], load("captions.json")["annotations"]
    questions = {split: read_pope(SHIPPED / f"pope_{split}.jsonl") for split in SPLITS}
    n_images = len({question.image for question in questions["random"]})
    assert f"{len(annotations)} objects of {len(CATEGORY_NAMES)} categories" in card
    assert f"{len(captions)} reference captions" in card
    assert f"{len(questions['random'])} questions each on {n_images} images" in card
    assert f"{sum(scene.context != scene.background_context for scene in scenes)} backgrounds show another" in card
    size = {(f"{scene.index:06d}.png", item.category): item.size for scene in scenes for item in scene.objects}
    sizes = [size[q.image, q.object] for q in questions["random"] if q.label == "yes"]
    small, middle, large = (sum(low <= value <= high for value in sizes) for low, high in SIZE_RANGES)
    assert (
        f"{len(sizes)} objects asked about {small} are small (6 to 8 pixels), {middle} middle-sized and {large}" in card
    )

    def percent(value):
        return f"{100 * value:.0f} %"

    typical = {f"{s.index:06d}.png": s.context for s in scenes}
    weights = pd.DataFrame(context_weights() > 0, index=[*CONTEXT_NAMES], columns=[*CATEGORY_NAMES])
    by_name, absent = [], []
    for split in SPLITS:
        table = pd.DataFrame([(q.object, q.label, weights.loc[typical[q.image], q.object]) for q in questions[split]])
        table.columns = pd.Index(["object", "label", "typical"])
        counts = table.groupby("object")["label"].value_counts().unstack(fill_value=0)
        by_name.append(percent(counts.max(axis=1).sum() / len(table)))
        absent.append(percent(table.loc[table["label"] == "no", "typical"].mean()))
        present = percent(table.loc[table["label"] == "yes", "typical"].mean())
    assert f"{by_name[0]} of the random, {by_name[1]} of the popular and {by_name[2]} of the adversarial" in card
    assert f"{present} of the objects asked about as present are typical" in card
    assert f"absent ones {absent[0]} (random), {absent[1]} (popular) and {absent[2]} (adversarial)" in card


def test_the_licence_of_the_drawings_is_whole():
    text = (SHIPPED / "OFL.txt").read_text()
    assert text.startswith("Noto Color Emoji\nCopyright")
    for part in ("PREAMBLE", "DEFINITIONS", "PERMISSION & CONDITIONS", "TERMINATION", "DISCLAIMER"):
        assert re.search(f"^{part}$", text, re.MULTILINE), part
    assert text.rstrip().endswith("OTHER DEALINGS IN THE FONT SOFTWARE.")
