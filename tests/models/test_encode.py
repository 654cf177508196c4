"""Prompts and images to tensors: what stands where, token by token."""

import pytest
import torch

BOS, IMAGE, PAD = 1, 4, 0


def ids_of(vlm, text):
    return vlm.tokenizer.convert_tokens_to_ids(text.split())


def expected_row(vlm, text, n_image_tokens=16):
    """Ids by hand: a start token, words, and `n_image_tokens` ids for every placeholder."""
    row = [BOS]
    for token in ids_of(vlm, text):
        row += [token] * (n_image_tokens if token == IMAGE else 1)
    return row


def check_rows(batch, rows):
    length = max(len(row) for row in rows)
    assert batch.length == length
    for number, row in enumerate(rows):
        n_pad = length - len(row)
        assert batch.input_ids[number].tolist() == [PAD] * n_pad + row
        assert batch.attention_mask[number].tolist() == [0] * n_pad + [1] * len(row)
        assert batch.image_mask[number].tolist() == [False] * n_pad + [token == IMAGE for token in row]
    assert batch.lengths == [len(row) for row in rows]


@pytest.mark.parametrize("name", ["llava", "llava_siglip"])
def test_raw_prompts_are_padded_on_the_left(name, image, request):
    vlm = request.getfixturevalue(name)
    texts = ["is there a dog <image> in the image ?", "<image> what ?", "where is it ?", "<image> <image> cat <image>"]
    pictures = [image(0), [image(1)], None, [image(2), image(3), image(4)]]
    batch = vlm.encode(pictures, texts)
    check_rows(batch, [expected_row(vlm, text) for text in texts])
    assert [len(patches) for patches in batch.patches] == [16, 16, 0, 48]
    assert [len(row) for row in batch.images] == [1, 1, 0, 3]
    assert batch.extra["pixel_values"].shape == (5, 3, 16, 16)
    assert batch.ids == ("0", "1", "2", "3")
    assert batch.n_generated == (0, 0, 0, 0)


def test_llava_next_makes_as_many_tokens_as_the_shape_of_each_image_asks_for(llava_next, image):
    """32 x 32: 16 tokens of the whole image, then 8 rows of 8 and a newline; 32 x 8: a 4 x 8 grid cut to 2 rows."""
    batch = llava_next.encode([[image(0, 32, 32), image(1, 32, 8)], None], ["<image> is <image> there", "a dog ?"])
    square, wide = 16 + 8 * 9, 16 + 2 * 9
    row = [BOS, *[IMAGE] * square, *ids_of(llava_next, "is"), *[IMAGE] * wide, *ids_of(llava_next, "there")]
    check_rows(batch, [row, [BOS, *ids_of(llava_next, "a dog ?")]])
    assert batch.patches[0].image.tolist() == [0] * square + [1] * wide


def test_images_belong_to_their_prompts_in_order(llava, image):
    """Pixels are given to the model in the order of the placeholders, over all rows."""
    pictures = [image(seed, 16, 16) for seed in range(3)]
    batch = llava.encode([[pictures[0], pictures[1]], None, pictures[2]], ["<image> <image>", "what ?", "a <image>"])
    for number, picture in enumerate(pictures):
        alone = llava.encode([picture], ["<image>"]).extra["pixel_values"][0]
        assert torch.equal(batch.extra["pixel_values"][number], alone)


def test_chat_template_puts_images_before_the_text_unless_placeholders_say_where(llava_chat, image):
    batch = llava_chat.encode([image(0), image(1), None], ["what ?", "is <image> there ?", "where ?"])
    check_rows(
        batch,
        [
            expected_row(llava_chat, "USER: <image> what ? ASSISTANT:"),
            expected_row(llava_chat, "USER: is <image> there ? ASSISTANT:"),
            expected_row(llava_chat, "USER: where ? ASSISTANT:"),
        ],
    )


def test_chat_false_leaves_the_prompt_alone(llava_chat, image):
    batch = llava_chat.encode([image(0)], ["<image> what ?"], chat=False)
    check_rows(batch, [expected_row(llava_chat, "<image> what ?")])


def test_a_start_token_in_the_text_is_not_doubled(llava, image):
    batch = llava.encode([image(0), image(1)], ["<s> <image> what ?", "<s> <image> is it a dog ?"])
    check_rows(batch, [expected_row(llava, "<image> what ?"), expected_row(llava, "<image> is it a dog ?")])


def test_one_prompt_may_be_a_string_and_ids_are_kept(llava, image):
    batch = llava.encode([image(0)], "<image> what ?", ids=["scene 7"])
    assert batch.size == 1
    assert batch.ids == ("scene 7",)


def test_pictures_may_be_paths_arrays_and_grey(llava, image, tmp_path):
    import numpy as np

    picture = image(0)
    picture.save(tmp_path / "picture.png")
    grey = picture.convert("L")
    batch = llava.encode(
        [tmp_path / "picture.png", str(tmp_path / "picture.png"), np.asarray(picture), grey, grey.convert("RGB")],
        ["<image>"] * 5,
    )
    alone = llava.encode([picture], ["<image>"]).extra["pixel_values"][0]
    for number in range(3):
        assert torch.equal(batch.extra["pixel_values"][number], alone)
    assert torch.equal(batch.extra["pixel_values"][3], batch.extra["pixel_values"][4])


def test_tensors_take_the_dtype_and_device_of_the_model(llava, image):
    import copy

    from slitlamp.vlm import VLM

    vlm = VLM.wrap(copy.deepcopy(llava.model).to(torch.bfloat16), llava.processor)
    batch = vlm.encode([image(0)], ["<image> what ?"])
    assert batch.extra["pixel_values"].dtype == torch.bfloat16
    assert batch.input_ids.dtype == torch.int64
    assert vlm.forward(batch).logits.dtype == torch.bfloat16


def test_the_tokenizers_own_padding_side_does_not_matter(llava, image):
    texts = ["<image> what ?", "<image> is there a dog in the image ?"]
    left = llava.encode([image(0), image(1)], texts)
    before = llava.tokenizer.padding_side
    llava.tokenizer.padding_side = "right"
    try:
        right = llava.encode([image(0), image(1)], texts)
        assert llava.tokenizer.padding_side == "right"
    finally:
        llava.tokenizer.padding_side = before
    assert torch.equal(left.input_ids, right.input_ids)


def test_masks_of_positions_by_hand(llava, image):
    batch = llava.encode([[image(0), image(1)], None], ["is <image> a <image> what ?", "where is it ?"])
    # row 0: <s> is 16 a 16 what ?     row 1: padding, <s> where is it ?
    two, none = 2 + 16 + 1 + 16 + 2, 5
    assert batch.lengths == [two, none]
    text = [True, True, *[False] * 16, True, *[False] * 16, True, True]
    assert batch.text_mask[0].tolist() == text
    assert batch.text_after_image_mask[0].tolist() == [False] * (two - 2) + [True, True]
    assert batch.text_mask[1].tolist() == [False] * (two - none) + [True] * none
    assert not batch.text_after_image_mask[1].any()
    assert batch.last_prompt_position.tolist() == [two - 1, two - 1]
    assert not batch.has_images
