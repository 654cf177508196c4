"""A random model of the embedded model's architecture in a folder, and a few of its scenes in COCO's formats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from slitlamp.evaluation import PopeQuestion, write_pope
from slitlamp.experiments import Dataset, captions_dataset, pope_dataset
from slitlamp.organism.build import build_config, build_processor
from slitlamp.organism.categories import CATEGORY_NAMES
from slitlamp.organism.scenes import make_scene
from slitlamp.organism.tokenizer import SPECIAL, TOKEN_ID
from slitlamp.vlm import VLM

N_SCENES = 4


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run no faster on several threads, and bytes are compared between processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose logits are far from uniform, so that answers differ between images and conditions."""
    config = build_config(width=32)
    config.text_config.initializer_range = config.vision_config.initializer_range = 0.3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
    ends = {"bos_token_id": TOKEN_ID["<s>"], "eos_token_id": TOKEN_ID["</s>"], "pad_token_id": TOKEN_ID["<pad>"]}
    for key, value in ends.items():
        setattr(model.generation_config, key, value)
    # A random model may emit tokens that no trained one does.
    model.generation_config.suppress_tokens = [TOKEN_ID[token] for token in SPECIAL if token != "</s>"]
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vlm(model_folder: Path) -> VLM:
    return VLM.from_pretrained(model_folder, dtype="float32")


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/, instances.json, captions.json, synonyms.txt and pope.jsonl of a few scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "images").mkdir()
    images, annotations, captions, questions = [], [], [], []
    for index in range(N_SCENES):
        scene, pixels = make_scene(7, index)
        name = f"{index:04d}.png"
        PIL.Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": index + 1, "file_name": name, "width": 64, "height": 64})
        present = sorted(scene.categories)
        annotations += [
            {
                "id": len(annotations) + k,
                "image_id": index + 1,
                "category_id": CATEGORY_NAMES.index(one),
                "bbox": [0, 0, 8, 8],
            }
            for k, one in enumerate(present)
        ]
        captions.append({"id": index, "image_id": index + 1, "caption": f"a picture with a {present[0]} ."})
        absent = next(one for one in CATEGORY_NAMES if one not in present)
        for asked, label in ((present[0], "yes"), (absent, "no")):
            text = f"Is there a {asked} in the image?"
            questions.append(PopeQuestion(len(questions) + 1, name, text, label, asked))  # type: ignore[arg-type]
    categories = [{"id": i, "name": name} for i, name in enumerate(CATEGORY_NAMES)]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (folder / "synonyms.txt").write_text("\n".join(CATEGORY_NAMES) + "\n")
    write_pope(folder / "pope.jsonl", questions)
    return folder


@pytest.fixture(scope="session")
def captions(data_folder: Path) -> Dataset:
    return captions_dataset(
        data_folder / "images",
        data_folder / "instances.json",
        data_folder / "synonyms.txt",
        captions=data_folder / "captions.json",
        prompt="Describe this image in detail.",
        name="scenes/captions",
    )


@pytest.fixture(scope="session")
def pope(data_folder: Path) -> Dataset:
    return pope_dataset(data_folder / "pope.jsonl", data_folder / "images", name="scenes/pope_mine")
