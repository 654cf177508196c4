from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from slitlamp.errors import InputError, UnknownNameError
from slitlamp.experiments import (
    Config,
    Dataset,
    Experiment,
    captions_dataset,
    dataset_names,
    load_dataset,
    pope_dataset,
)
from slitlamp.experiments.datasets import make_dataset
from slitlamp.vlm import VLM


@pytest.mark.parametrize("name", dataset_names())
def test_data_sets_that_come_with_slitlamp(name: str) -> None:
    data = load_dataset(name)
    data.check()
    assert data.name == name
    assert len({item.id for item in data.items}) == len(data)
    if data.task == "pope":
        labels = [item.label for item in data.items]
        assert labels.count("yes") == labels.count("no") == len(data) / 2
        assert len(data) == 6 * len(data.images)
        assert all(item.object for item in data.items)
    else:
        assert data.truth is not None
        assert all(data.truth.objects[item.image_id] for item in data.items)


def test_take_keeps_whole_images_in_order(pope: Dataset) -> None:
    two = pope.take(2)
    assert [item.id for item in two.items] == ["1", "2", "3", "4"]
    assert pope.take(2) == two
    assert pope.take(1000).items == pope.items
    with pytest.raises(InputError, match="at least one image"):
        pope.take(0)


def test_an_entry_of_a_configuration_makes_the_same_data_set(
    data_folder: Path, pope: Dataset, captions: Dataset
) -> None:
    for data in (pope, captions):
        assert make_dataset(data.source, [data_folder]) == data
    entry = {"name": "mine", "task": "pope", "questions": "pope.jsonl", "images": "images"}
    assert make_dataset(entry, [data_folder]).items == pope.items
    with pytest.raises(InputError, match="'mine', questions: no such file or folder"):
        make_dataset({**entry, "questions": "none.jsonl"}, [data_folder])
    with pytest.raises(InputError, match=r"'mine', images: .* lies outside"):
        make_dataset({**entry, "images": "../.."}, [data_folder])


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'emoji_scenes/captions'"):
        load_dataset("emoji_scenes/caption")


def test_the_fingerprint_follows_everything_that_counts(captions: Dataset, pope: Dataset, tmp_path: Path) -> None:
    assert captions.fingerprint() == captions.fingerprint()
    assert captions.truth is not None
    first = captions.items[0]
    changed = {
        "other prompt": replace(captions, items=(replace(first, prompt="What?"), *captions.items[1:])),
        "fewer items": captions.take(2),
        "other truth": replace(
            captions, truth=replace(captions.truth, objects={**captions.truth.objects, 1: frozenset()})
        ),
        "no synonyms": replace(captions, synonyms=None),
    }
    copy = tmp_path / first.image.name
    with PIL.Image.open(first.image) as image:
        image.rotate(90).save(copy)
    changed["other pixels"] = replace(captions, items=(replace(first, image=copy), *captions.items[1:]))
    prints = {name: data.fingerprint() for name, data in changed.items()} | {"itself": captions.fingerprint()}
    assert len(set(prints.values())) == len(prints)


def test_bad_items_are_found_before_a_model_runs(pope: Dataset, tmp_path: Path) -> None:
    first = pope.items[0]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no more")
    for change, message in [
        ({"prompt": " "}, "item '1': the prompt is empty"),
        ({"label": "maybe"}, "question '1': the label is 'maybe'"),
        ({"label": None}, "question '1': the label is None"),
        ({"id": "2"}, "the id '2' appears twice"),
        ({"image": tmp_path / "none.png"}, "no such image"),
        ({"image": broken}, "cannot read the image"),
    ]:
        with pytest.raises(InputError, match=message):
            replace(pope, items=(replace(first, **change), *pope.items[1:])).check()
    with pytest.raises(InputError, match="is empty"):
        replace(pope, items=())
    with pytest.raises(InputError, match="data set 'a//b'"):
        replace(pope, name="a//b")


def test_files_cannot_lead_out_of_the_folder_of_images(data_folder: Path, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text(
        json.dumps({"question_id": 1, "image": "../../x.png", "text": "Is there a cat?", "label": "no"})
    )
    with pytest.raises(InputError, match=r"'../../x.png' lies outside"):
        pope_dataset(questions, data_folder / "images")
    with pytest.raises(InputError, match="no such folder of images"):
        pope_dataset(data_folder / "pope.jsonl", tmp_path / "none")


def test_malformed_questions_are_named_with_their_line(data_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"question_id": 1, "image": "a.png", "text": "Is there a cat in the image?", "label": "no"}\n{"question_id": \n'
    )
    with pytest.raises(InputError, match=r"q\.jsonl:2"):
        pope_dataset(path, data_folder / "images")


def test_pope_prompt(data_folder: Path) -> None:
    data = pope_dataset(
        data_folder / "pope.jsonl", data_folder / "images", prompt="{question} Please answer yes or no."
    )
    assert data.items[0].prompt.endswith("in the image? Please answer yes or no.")
    with pytest.raises(InputError, match=r"has no \{question\}"):
        pope_dataset(data_folder / "pope.jsonl", data_folder / "images", prompt="Yes or no?")


def test_captions_of_chosen_ids(data_folder: Path, tmp_path: Path) -> None:
    files = (data_folder / "images", data_folder / "instances.json", data_folder / "synonyms.txt")
    assert [item.id for item in captions_dataset(*files, ids=[3, 1]).items] == ["3", "1"]
    with pytest.raises(InputError, match="no image with id 99"):
        captions_dataset(*files, ids=[1, 99])
    shutil.copy(files[1], tmp_path / "instances.json")
    content = json.loads(files[1].read_text())
    del content["images"][0]["file_name"]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="expected 'images' with 'id' and 'file_name'"):
        captions_dataset(files[0], tmp_path / "instances.json", files[2])


def test_take_and_skip_are_a_split_and_can_be_made_again_from_the_configuration() -> None:
    data = load_dataset("emoji_scenes/captions")
    first, rest = data.take(40), data.take(16, skip=40)
    assert [item.id for item in rest.items] == [item.id for item in data.items[40:56]]
    assert not set(first.images) & set(rest.images)
    assert data.take(skip=250).items == data.items[250:]
    again = rest.take(5, skip=2)
    assert again.items == data.items[42:47]
    assert again.source == {"name": "emoji_scenes/captions", "skip": 42, "take": 5}
    config = Config.model_validate({"datasets": [dict(again.source)]})
    assert Experiment.from_config(config).dataset == [again]
    questions = load_dataset("emoji_scenes/pope_random").take(3, skip=1)
    assert len(questions) == 18
    with pytest.raises(InputError, match="skip=256: expected 0 to 255"):
        data.take(1, skip=256)


def test_a_data_set_encodes_itself_grouped_by_image(organism: VLM) -> None:
    data = load_dataset("emoji_scenes/pope_random").take(2)
    batch = data.encode(organism)
    assert batch.ids == tuple(item.id for item in data.items)
    assert len(set(batch.groups)) == 2
    assert data.encode(organism, data.items[3:5]).size == 2
