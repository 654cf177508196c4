from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from slitlamp.organism.build import build_model, build_processor, save_organism
from slitlamp.organism.scenes import make_scene
from slitlamp.organism.stages import to_pixel_values
from slitlamp.organism.tokenizer import TOKEN_ID

QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a dog in the image?"}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_organism(build_model(3), build_processor(), tmp_path_factory.mktemp("organism") / "model")


def test_initialisation_depends_on_the_seed_only() -> None:
    before = torch.get_rng_state()
    a, b, c = build_model(0), build_model(0), build_model(1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert 3e6 < sum(p.numel() for p in a.parameters()) < 5e6


@pytest.mark.parametrize("width", [0, -16, 100])
def test_width_must_split_into_heads(width: int) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        build_model(0, width)


def test_plain_transformers_load_what_was_saved(folder: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == torch.float16
    for name, tensor in build_model(3).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.half()), name
    assert model.generation_config.eos_token_id == TOKEN_ID["</s>"]
    assert model.generation_config.pad_token_id == TOKEN_ID["<pad>"]
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".jinja", ".safetensors"}


def test_the_processor_gives_64_image_tokens_and_the_training_pixels(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    _, image = make_scene(33, 0)
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    assert text == "USER: <image> Is there a dog in the image? ASSISTANT:"
    inputs = processor(images=[Image.fromarray(image)], text=text, return_tensors="pt")
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    question = "is there a dog in the image ?".split()
    assert tokens == ["<s>", "USER:", *["<image>"] * 64, *question, "ASSISTANT:"]
    expected = to_pixel_values(torch.from_numpy(np.asarray(image))[None])
    torch.testing.assert_close(inputs["pixel_values"], expected, rtol=0, atol=1e-6)


def test_image_free_and_generation(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    inputs = processor(
        text=["USER: is there a dog ? ASSISTANT:", "USER: a cat ? ASSISTANT:"], padding=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=3)
    assert output.shape[0] == 2


def test_saving_does_not_overwrite(folder: Path) -> None:
    with pytest.raises(FileExistsError, match="exists"):
        save_organism(build_model(3), build_processor(), folder)
