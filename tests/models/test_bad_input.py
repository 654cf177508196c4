"""What cannot be encoded is refused before the model runs, with what was found in the message."""

import numpy as np
import PIL.Image
import pytest

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models.images import load_image


def refused(vlm, images, prompts, match, **options):
    with pytest.raises(InputError, match=match):
        vlm.encode(images, prompts, **options)


def test_missing_file(llava, tmp_path):
    refused(llava, [tmp_path / "none.png"], ["<image>"], r"image 0 of prompt 0: no such file: .*none\.png")
    refused(llava, [tmp_path], ["<image>"], "no such file")  # a folder


def test_corrupt_files(llava, image, tmp_path):
    (tmp_path / "text.png").write_bytes(b"this is no image")
    refused(llava, [tmp_path / "text.png"], ["<image>"], r"text\.png cannot be read as an image")
    image(0, 64, 64).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    refused(llava, [tmp_path / "half.png"], ["<image>"], r"half\.png cannot be read as an image")


@pytest.mark.filterwarnings("ignore")  # decoders warn of what they skip
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tiff"])
def test_damaged_bytes_give_a_picture_or_our_error_never_another(suffix, image, tmp_path):
    """Decoders raise many kinds of errors on broken files; each must become ours."""
    image(0, 32, 32).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    random = np.random.default_rng(0)
    broken = tmp_path / f"broken.{suffix}"
    for _ in range(40):
        damaged = bytearray(whole)
        for place in random.integers(0, min(len(whole), 200), 4):
            damaged[place] = int(random.integers(256))
        broken.write_bytes(damaged[: int(random.integers(1, len(whole)))])
        try:
            load_image(broken)
        except InputError:
            continue


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "LA", "1", "I;16", "F"])
def test_modes_that_need_a_choice_of_the_user(mode, llava):
    refused(
        llava, [PIL.Image.new(mode, (16, 16))], ["<image>"], rf"image 0 of prompt 0: mode '{mode}'.*convert\('RGB'\)"
    )


def test_sizes(llava):
    refused(llava, [PIL.Image.new("RGB", (1, 1))], ["<image>"], "1 x 1 pixels; each side must have at least 4")
    refused(llava, [PIL.Image.new("RGB", (3, 90))], ["<image>"], "3 x 90 pixels")
    refused(
        llava,
        [PIL.Image.new("RGB", (1000, 4))],
        ["<image>"],
        "1000 x 4 pixels; the sides may differ by a factor of 200",
    )


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((16, 16, 3)), r"float64 \[16, 16, 3\]"),
        (np.zeros((16, 16), dtype=np.uint8), r"uint8 \[16, 16\]"),
        (np.zeros((3, 16, 16), dtype=np.uint8), r"uint8 \[3, 16, 16\]"),
    ],
)
def test_arrays_of_another_kind(array, found, llava):
    refused(llava, [array], ["<image>"], f"array must be uint8.*{found}")


def test_something_that_is_no_image(llava):
    refused(llava, [3], ["<image>"], "expected a path, a PIL image or a uint8 array, found int")


def test_the_message_says_which_image_of_which_prompt(llava, image):
    bad = PIL.Image.new("RGBA", (16, 16))
    refused(llava, [image(0), [image(1), bad]], ["<image>", "<image> <image>"], "image 1 of prompt 1: mode 'RGBA'")


def test_placeholders_and_images_do_not_match(llava, llava_chat, image):
    refused(llava, [image(0)], ["what ?"], "prompt 0: 1 images for 0 placeholders '<image>'; put '<image>' in the text")
    refused(llava, [[image(0), image(1)]], ["<image> what ?"], "prompt 0: 2 images for 1 placeholders")
    refused(
        llava, [image(0), image(1)], ["<image>", "<image> <image>"], "prompt 1: 2 placeholders '<image>' for 1 images"
    )
    refused(llava, None, ["<image> what ?"], "1 placeholders '<image>' for 0 images")
    refused(llava_chat, [[image(0), image(1)]], ["<image> what ?"], "2 images for 1 placeholders")
    refused(llava_chat, [image(0)], ["what ?"], "1 images for 0 placeholders", chat=False)


def test_prompts(llava, image):
    refused(llava, [], [], "the batch is empty")
    refused(llava, None, [], "the batch is empty")
    refused(llava, None, ["what ?", "  "], "prompt 1: expected a text, found '  '")
    refused(llava, None, ["what ?", None], "prompt 1: expected a text, found None")
    refused(llava, None, ["what ?"], "2 ids for 1 prompts", ids=["a", "b"])
    refused(llava, None, ["what ?"], "no chat template", chat=True)


def test_entries_of_images(llava, image):
    refused(llava, [image(0)], ["<image>", "<image>"], "1 image entries for 2 prompts")
    refused(llava, image(0), ["<image>"], r"one entry per prompt; for one prompt, write images=\[image\]")
    refused(llava, "dog.png", ["<image>"], "one entry per prompt")
    refused(llava, np.zeros((16, 16, 3), dtype=np.uint8), ["<image>"], "one entry per prompt")


def test_start_tokens_in_some_prompts_only(llava):
    """The tokenizer puts a start token before all prompts or before none; a mixture would double or drop one silently."""
    refused(llava, None, ["<s> what ?", "where ?"], "prompt 1 .*start token '<s>'")


def test_a_processor_that_disagrees_with_the_model(llava, image):
    import copy

    from slitlamp.vlm import VLM

    processor = copy.deepcopy(llava.processor)
    processor.patch_size = 8
    with pytest.raises(UnsupportedError, match=r"processor made 4 image tokens, but the LLaVA-1\.5 entry expects 16"):
        VLM.wrap(llava.model, processor).encode([image(0)], ["<image>"])
