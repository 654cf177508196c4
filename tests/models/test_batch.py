"""A batch made into another: each row rebuilt by hand and compared token by token."""

import pytest
import torch

from slitlamp.errors import InputError


def rows_of(batch):
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def is_left_padded(batch):
    return all(
        batch.input_ids[row].tolist()[: batch.length - n] == [0] * (batch.length - n)
        and batch.attention_mask[row].tolist() == [0] * (batch.length - n) + [1] * n
        for row, n in enumerate(batch.lengths)
    )


@pytest.fixture
def batch(any_vlm, image):
    return any_vlm.encode(
        [[image(0), image(1, 9, 30)], image(2), None], ["<image> is <image> it ?", "a <image>", "what ?"]
    )


def test_without_images_deletes_every_image_token_and_nothing_else(any_vlm, batch):
    bare = batch.without_images()
    assert rows_of(bare) == [[token for token in row if token != 4] for row in rows_of(batch)]
    assert is_left_padded(bare)
    assert not bare.image_mask.any()
    assert bare.extra == {}
    assert bare.ids == batch.ids
    assert [len(patches) for patches in bare.patches] == [0, 0, 0]
    assert any_vlm.forward(bare).logits.shape[:2] == (3, bare.length)


def test_with_continuation_puts_tokens_after_each_prompt(any_vlm, batch):
    more = [[5, 6, 7], [], [8]]
    longer = batch.with_continuation(more)
    prompts = rows_of(batch)
    assert rows_of(longer) == [prompt + added for prompt, added in zip(prompts, more, strict=True)]
    assert is_left_padded(longer)
    assert longer.n_generated == (3, 0, 1)
    assert longer.prompt_lengths == batch.lengths
    assert torch.equal(longer.image_mask, longer.input_ids == 4)
    assert longer.patches == batch.patches
    for row, added in enumerate(more):
        end = longer.length
        assert longer.generated_mask[row].nonzero().flatten().tolist() == list(range(end - len(added), end))
        before = list(range(end - len(added) - 1, end - 1)) or [end - 1]  # no continuation: the first token to come
        assert longer.before_generated_mask[row].nonzero().flatten().tolist() == before
        assert longer.last_prompt_position[row] == end - len(added) - 1
    assert any_vlm.forward(longer).logits.shape[:2] == (3, longer.length)


def test_prompt_only_takes_the_continuation_back(batch):
    longer = batch.with_continuation([[5, 6, 7], [], [8]])
    again = longer.prompt_only()
    assert torch.equal(again.input_ids, batch.input_ids)
    assert torch.equal(again.attention_mask, batch.attention_mask)
    assert torch.equal(again.image_mask, batch.image_mask)
    assert again.n_generated == (0, 0, 0)


def test_a_second_continuation_takes_the_place_of_the_first(batch):
    once, twice = batch.with_continuation([[7], [8], [9]]), batch.with_continuation([[5, 6], [], [8]])
    assert rows_of(twice.with_continuation([[7], [8], [9]])) == rows_of(once)


def test_without_images_keeps_the_continuation(batch):
    bare = batch.with_continuation([[5, 6, 7], [], [8]]).without_images()
    assert rows_of(bare)[0][-3:] == [5, 6, 7]
    assert bare.n_generated == (3, 0, 1)
    assert rows_of(bare.prompt_only()) == rows_of(batch.without_images())


def test_continuation_of_the_wrong_number_of_rows_or_with_an_image_token(batch):
    with pytest.raises(InputError, match="3 rows, 2 lists"):
        batch.with_continuation([[5], [6]])
    with pytest.raises(InputError, match=r"image token \(id 4\)"):
        batch.with_continuation([[5], [4], [6]])


def test_with_pixels_takes_pixels_of_the_same_shape_only(batch):
    pixels = batch.extra["pixel_values"]
    assert torch.equal(batch.with_pixels(pixels + 1).extra["pixel_values"], pixels + 1)
    with pytest.raises(InputError, match="batch with pixels of shape"):
        batch.with_pixels(pixels[:1])
    with pytest.raises(InputError, match="batch with pixels of shape None"):
        batch.without_images().with_pixels(pixels)


def test_batches_compare_by_identity(batch):
    """Comparing tensors field by field has no truth value: it must not be tried."""
    assert batch == batch
    assert batch != batch.with_continuation([[5], [6], [7]])
    assert len({batch, batch}) == 1


def test_repr_says_rows_and_tokens(llava, image):
    assert repr(llava.encode([image(0), None], ["<image> what ?", "it"])) == (
        "Batch(2 rows, 19 positions, images per row [1, 0], image tokens [16, 0])"
    )


def test_moving_to_a_device_keeps_everything(batch):
    moved = batch.to("cpu")
    assert torch.equal(moved.input_ids, batch.input_ids)
    assert set(moved.extra) == set(batch.extra)
    assert moved.patches == batch.patches
