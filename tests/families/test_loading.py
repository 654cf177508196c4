"""Every family from disk, by the code that users call: `VLM.from_pretrained` on folders laid out as hub repositories are.

A processor of videos needs torchvision, which tests do without; where it is installed the same folders are to load too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import close, encode, pictures_of
from tiny_models import BUILDERS
from tiny_models.common import random_image
from tokenizers import processors
from transformers import AutoModelForImageTextToText, AutoTokenizer

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.inspection import inspect_model
from slitlamp.models.loading import load_processor
from slitlamp.vlm import VLM

INSTALLED = {name for name in ("torchvision", "num2words") if importlib.util.find_spec(name)}
NEEDS_TORCHVISION = {"mistral3": "PixtralProcessor", "llava pixtral": "PixtralProcessor", "llama4": "Llama4Processor"}
WITH_VIDEOS = {
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "internvl": "InternVLVideoProcessor",
    "smolvlm": "SmolVLMVideoProcessor",
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
}
FAST = ("internvl", "mistral3", "qwen3_vl", "llama4")
"""Repositories that name the image processor by its former fast class."""
OF_PROCESSOR = (  # what processor_config.json says besides the class
    *("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy", "num_image_tokens"),
    *("vision_aspect_ratio", "image_seq_len", "image_seq_length", "num_query_tokens", "spatial_merge_size", "img_size"),
    *("downsample_factor",),
)
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)


def template_of(vlm: VLM) -> str | None:
    """A chat template; None for families whose repositories have none."""
    family = vlm.anatomy.family
    if family.placeholder is None or family.images_first:
        return None
    return TEMPLATE.replace("IMAGE", str(getattr(vlm.processor, family.placeholder)).join(family.around))


def read(file: Path) -> Any:
    return json.loads(file.read_text())


@contextlib.contextmanager
def adding_start(tokenizer: Any) -> Iterator[None]:
    """The tokenizer puts its start token, if it has one, before every text, as that of a released checkpoint."""
    backend = tokenizer.backend_tokenizer
    had = backend.post_processor
    if start := tokenizer.bos_token:
        special = [(start, tokenizer.bos_token_id)]
        backend.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=special)
    yield
    backend.post_processor = had


def save_as_on_the_hub(vlm: VLM, folder: Path, name: str, *, legacy_template: bool = False) -> Path:
    """Config, weights, preprocessor_config.json, tokenizer, template and, but for Qwen-VL, processor_config.json.

    The processor's own `save_pretrained` cannot write one without its part for videos, and puts all into one file.
    """
    processor: Any = vlm.processor
    processor_class = {"smolvlm": "SmolVLMProcessor"}.get(name, type(processor).__name__)
    vlm.model.save_pretrained(folder)
    with adding_start(processor.tokenizer):
        processor.tokenizer.save_pretrained(folder)
    if hasattr(processor, "qformer_tokenizer"):
        processor.qformer_tokenizer.save_pretrained(folder / "qformer_tokenizer")
    processor.image_processor.save_pretrained(folder)
    of_images = read(folder / "preprocessor_config.json")
    image_class = "Llama4ImageProcessor" if name == "llama4" else of_images["image_processor_type"]
    of_images |= {"image_processor_type": image_class + "Fast" * (name in FAST), "processor_class": processor_class}
    (folder / "preprocessor_config.json").write_text(json.dumps(of_images))
    if name in WITH_VIDEOS:
        of_videos = {"video_processor_type": WITH_VIDEOS[name], "processor_class": processor_class}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(of_videos))
    if not name.startswith("qwen"):
        own = {one: getattr(processor, one) for one in OF_PROCESSOR if getattr(processor, one, None) is not None}
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": processor_class, **own}))
    template = template_of(vlm)
    if template is not None and legacy_template:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    elif template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


LOADABLE = [name for name in BUILDERS if name not in NEEDS_TORCHVISION or "torchvision" in INSTALLED]
LOADABLE = [name for name in LOADABLE if name != "llama4"]  # whose tiny model has a stand-in for the image processor


@dataclass
class Saved:
    """A model, the folder that holds it, and what comes of the folder."""

    name: str
    vlm: VLM
    folder: Path
    loaded: VLM


@pytest.fixture(scope="module", params=LOADABLE)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Each family in turn."""
    name = request.param
    vlm = BUILDERS[name]()
    legacy = name in ("llava_onevision", "qwen2_vl")
    folder = save_as_on_the_hub(vlm, tmp_path_factory.mktemp("model"), name, legacy_template=legacy)
    return Saved(name, vlm, folder, VLM.from_pretrained(folder))


def test_a_folder_gives_the_model_that_was_saved(saved):
    vlm, loaded = saved.vlm, saved.loaded
    assert loaded.anatomy == vlm.anatomy
    assert loaded.weights_hash == vlm.weights_hash
    assert loaded.processor.chat_template == template_of(vlm)
    pictures = pictures_of(vlm)
    own, again = encode(vlm, pictures), encode(loaded, pictures)
    assert torch.equal(again.input_ids, own.input_ids)
    assert [patches.table.tolist() for patches in again.patches] == [patches.table.tolist() for patches in own.patches]
    assert set(again.extra) == set(own.extra)
    if "torchvision" not in INSTALLED:  # its resampling is not Pillow's
        for key, value in own.extra.items():
            assert torch.equal(again.extra[key], value), key
        assert torch.equal(loaded.forward(again).logits, vlm.forward(own).logits)
    assert torch.equal(loaded.forward(own).logits, vlm.forward(own).logits)


def test_the_chat_template_of_the_folder_is_used(saved):
    loaded, family = saved.loaded, saved.vlm.anatomy.family
    if template_of(saved.vlm) is None:
        assert family.placeholder is None or family.images_first
        return
    chat = loaded.encode([random_image(0)], "what ?")
    plain = loaded.encode(
        [random_image(0)], f"{getattr(loaded.processor, family.placeholder)} what ? ASSISTANT:", chat=False
    )
    assert torch.equal(chat.input_ids, plain.input_ids)
    assert len(chat.images[0]) == 1


def test_a_prompt_has_one_start_token_also_where_tokenizer_and_processor_add_it(saved):
    """Released checkpoints' tokenizers add it; so do the processors of PaliGemma, which stops its tokenizer, and Mllama."""
    loaded, start = saved.loaded, saved.vlm.tokenizer.bos_token_id
    if start is None:
        assert saved.name.startswith("qwen")
        return
    assert loaded.tokenizer("what ?").input_ids.count(start) == (not saved.name.startswith("paligemma"))
    batch = encode(loaded, pictures_of(loaded))
    assert ((batch.input_ids == start).sum(dim=1) == 1).all()
    written = [f"{loaded.tokenizer.bos_token} what ?"] * 2
    if loaded.anatomy.family.images_first or loaded.anatomy.family.own_tokens:
        with pytest.raises(InputError, match=r"start token '<s>'.* leave it out"):
            loaded.encode(None, written)
    else:
        assert ((loaded.encode(None, written, chat=False).input_ids == start).sum(dim=1) == 1).all()


def test_a_folder_loads_in_bfloat16(saved):
    vlm = saved.vlm
    loaded = VLM.from_pretrained(saved.folder, dtype="bfloat16")
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}
    own, batch = encode(vlm, pictures_of(vlm)), encode(loaded, pictures_of(vlm))
    real = own.real_mask
    logits = loaded.forward(batch).logits[real].float()
    assert logits.isfinite().all()
    # bfloat16 keeps 8 bits: each of some ten roundings on the way errs by up to 0.4 % of what it rounds
    wanted = vlm.forward(own).logits[real]
    assert float((logits - wanted).norm() / wanted.norm()) < 0.15
    assert torch.cosine_similarity(logits.flatten(), wanted.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("name", list(NEEDS_TORCHVISION))
def test_a_processor_that_needs_torchvision_says_so_before_the_weights_are_loaded(name, tmp_path, monkeypatch):
    vlm = BUILDERS[name]()
    folder = save_as_on_the_hub(vlm, tmp_path, name)
    if "torchvision" in INSTALLED:
        assert VLM.from_pretrained(folder).weights_hash == vlm.weights_hash
        return
    monkeypatch.setattr(
        AutoModelForImageTextToText, "from_pretrained", lambda *given, **options: pytest.fail("weights")
    )
    wanted = rf"\({NEEDS_TORCHVISION[name]}\) needs torchvision, .* pip install torchvision$"
    with pytest.raises(UnsupportedError, match=wanted):
        VLM.from_pretrained(folder)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_what_a_model_is_can_be_read_from_its_configuration_alone(name, tmp_path):
    vlm = BUILDERS[name]()
    vlm.model.config.save_pretrained(tmp_path)
    found = inspect_model(str(tmp_path))
    assert found.anatomy == vlm.anatomy
    assert found.n_parameters == sum(weight.numel() for weight in vlm.model.parameters())
    assert found.sections()


@pytest.mark.parametrize("name", list(WITH_VIDEOS))
def test_the_part_for_videos_is_left_out_with_a_word_and_the_rest_is_saved(name, tmp_path, caplog):
    vlm = BUILDERS[name]()
    folder = save_as_on_the_hub(vlm, tmp_path / "first", name)
    with caplog.at_level(logging.INFO, logger="slitlamp"):
        processor = load_processor(folder)
    if {"torchvision", *(["num2words"] if name == "smolvlm" else [])} <= INSTALLED:
        assert processor.video_processor is not None
        return
    assert "is loaded without the part for videos" in caplog.text
    assert processor.video_processor is None
    processor.save_pretrained(tmp_path / "second")
    picture, text = random_image(0), f"{processor.image_token} what ?"
    again = load_processor(tmp_path / "second")
    assert again.chat_template == processor.chat_template == template_of(vlm)
    for key, value in processor(text=[text], images=[picture], return_tensors="pt").items():
        assert torch.equal(again(text=[text], images=[picture], return_tensors="pt")[key], value), key
    wrapped = VLM.wrap(vlm.model, processor)
    with pytest.raises(UnsupportedError, match="placeholder of a video"):
        wrapped.encode(None, [f"{processor.video_token} what ?"], chat=False)


@pytest.mark.parametrize("size", [(16, 16), (20, 16), (48, 16), (16, 48), (48, 48), (100, 30)])
def test_smolvlm_is_encoded_as_by_its_own_processor(size, tmp_path):
    vlm = BUILDERS["smolvlm"]()
    loaded = VLM.from_pretrained(save_as_on_the_hub(vlm, tmp_path, "smolvlm"))
    rows: Any = (
        [[random_image(0, *size), random_image(1)], [random_image(2)]],
        ["is <image> a <image> dog", "<image> what ?"],
    )
    own, again = (one.encode(*rows, chat=False) for one in (vlm, loaded))
    assert torch.equal(again.input_ids, own.input_ids)
    for key, value in own.extra.items():
        close(again.extra[key].float(), value.float(), 0.0 if "torchvision" not in INSTALLED else 0.1)


@pytest.mark.parametrize("name", ["llava", "llava siglip", "llava_next", "vipllava", "blip-2", "instructblip"])
def test_files_that_do_not_say_how_many_tokens_an_image_becomes_are_completed(name, tmp_path, caplog):
    """As saved before transformers 4.46: no processor_config.json."""
    vlm = BUILDERS[name]()
    folder = save_as_on_the_hub(vlm, tmp_path, name)
    (folder / "processor_config.json").unlink()
    with caplog.at_level(logging.INFO, logger="slitlamp"):
        loaded = VLM.from_pretrained(folder)
    assert "taken from the model's configuration" in caplog.text
    own, again = encode(vlm, pictures_of(vlm)), encode(loaded, pictures_of(vlm))
    assert torch.equal(again.input_ids, own.input_ids)
    assert loaded.forward(again).logits.isfinite().all()


def test_a_folder_without_a_processor_is_an_error_that_says_so(llava, tmp_path):
    llava.model.config.save_pretrained(tmp_path)
    llava.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "NoSuchProcessor"}))
    with pytest.raises(InputError, match=r"found .*Tokenizer.* must name a `processor_class` of transformers"):
        load_processor(tmp_path)


def test_an_error_that_no_library_would_mend_is_not_blamed_on_one(tmp_path, monkeypatch):
    """A folder with a library's name, whose files are broken."""
    folder = save_as_on_the_hub(BUILDERS["qwen2_vl"](), tmp_path / "torchvision", "qwen2_vl")

    def broken(*given: Any, **options: Any) -> None:
        raise ValueError(f"cannot read {folder}")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", broken)
    with pytest.raises(ValueError, match="cannot read") as caught:
        load_processor(folder)
    assert not isinstance(caught.value, UnsupportedError)
