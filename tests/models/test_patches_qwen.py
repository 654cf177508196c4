"""Qwen-VL: where image tokens lie, how images of different sizes are packed, and what may be written in a prompt."""

from __future__ import annotations

import copy
import functools

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_models import qwen

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import family_of
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

NAMES = list(qwen.BUILDERS)
IMAGE = "<|image_pad|>"
WRAPPED = f"<|vision_start|>{IMAGE}<|vision_end|>"


@functools.cache
def built(name, chat=False) -> VLM:
    return {
        "qwen2_vl": qwen.build_qwen2_vl,
        "qwen2_5_vl": qwen.build_qwen2_5_vl,
        "qwen3_vl": qwen.build_qwen3_vl,
    }[name](chat=chat)


@functools.cache
def blind(name) -> VLM:
    """The model with a tower in which no patch sees another: each image token depends on its own pixels alone."""
    vlm = built(name)
    model = copy.deepcopy(vlm.model)
    for block in model.model.visual.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.attn.proj.bias)
    return VLM.wrap(model, vlm.processor, name)


def picture(rows, columns, side, at=None) -> PIL.Image.Image:
    """Black, in cells of `side` pixels; the cell at (row, column) is grey."""
    pixels = np.zeros((rows * side, columns * side, 3), dtype=np.uint8)
    if at is not None:
        row, column = at
        pixels[row * side : (row + 1) * side, column * side : (column + 1) * side] = (120, 60, 200)
    return PIL.Image.fromarray(pixels)


@pytest.mark.parametrize("name", NAMES)
def test_every_image_token_is_where_its_pixels_are(name):
    """Of two images of different sizes in a row, one square of 2 x 2 patches is painted: one token changes, that one."""
    vlm = blind(name)
    shapes = [(3, 5), (4, 2)]
    text = f"{IMAGE} and {IMAGE} ?"

    def embeddings(at=None):
        pictures = [picture(*shape, 8, cell if number == which else None) for number, shape in enumerate(shapes)]
        batch = vlm.encode([pictures], [text])
        with vlm.trace(sites.resid_pre(layers=[0], positions="image")) as trace:
            vlm.forward(batch)
        return trace["resid_pre"][0][0], batch.patches[0]

    which, cell = 0, None
    plain, patches = embeddings()
    assert patches.grids == {(0, 0): (3, 5), (1, 0): (4, 2)}
    assert len(patches) == len(plain) == 3 * 5 + 4 * 2
    assert patches.n_tiles == 2
    for which, shape in enumerate(shapes):
        for cell in np.ndindex(*shape):
            changed = (embeddings(cell)[0] != plain).any(dim=1).nonzero()[:, 0]
            assert patches.table[changed].tolist() == [[which, *cell]]


@pytest.mark.parametrize("name", NAMES)
def test_positions_of_the_tower_are_in_raster_order(name):
    """One patch is painted: the tower's sequence changes at its row and column, the projector's at its square's."""
    vlm = blind(name)
    shapes = [(6, 10), (8, 4)]  # patches of 4 px

    def states(at=None):
        pictures = [picture(*shape, 4, cell if number == which else None) for number, shape in enumerate(shapes)]
        wanted = (sites.vision_resid_pre(layers=[0]), sites.vision_resid_post(layers=[2]), sites.projector_out())
        with vlm.trace(*wanted) as trace:
            vlm.forward(vlm.encode([pictures[:1], pictures[1:]], [f"{IMAGE} ?"] * 2))
        return [trace["vision_resid_pre"][0], trace["vision_resid_post"][2], trace["projector_out"][0]]

    which, cell = 0, None
    plain = states()
    assert [tuple(one.shape[:2]) for one in plain] == [(2, 60), (2, 60), (2, 15)]
    for which, (rows, columns) in enumerate(shapes):
        for cell in [(0, 0), (0, 1), (1, 0), (rows // 2, columns // 2 - 1), (rows - 1, columns - 1), (2, 3), (5, 2)]:
            row, column = cell
            found = [(one != two).any(dim=2).nonzero().tolist() for one, two in zip(states(cell), plain, strict=True)]
            place = [[which, row * columns + column]]
            assert found == [place, place, [[which, row // 2 * (columns // 2) + column // 2]]]


@pytest.mark.parametrize("name", NAMES)
def test_rows_and_columns_are_those_of_the_models_own_positions(name, image):
    """The model's position ids of image tokens are (time, row, column) counted from the image's first."""
    vlm = built(name)
    batch = vlm.encode(
        [[image(0, 40, 24)], None, [image(1, 24, 40), image(2)]],
        [f"a dog {IMAGE} ?", "a dog ?", f"{IMAGE} and {IMAGE}"],
    )
    positions, _ = vlm.model.model.get_rope_index(
        batch.input_ids,
        batch.aligned["mm_token_type_ids"],
        batch.extra["image_grid_thw"],
        attention_mask=batch.attention_mask,
    )
    for row, patches in enumerate(batch.patches):
        of_image = positions[:, row, batch.image_mask[row]]
        for number in patches.image.unique():
            own = of_image[:, patches.image == number]
            assert (own - own[0]).T.tolist() == [
                [0, r, c] for _, r, c in patches.table[patches.image == number].tolist()
            ]
    assert batch.tiles == (1, 0, 2)
    assert [len(one) for one in batch.patches] == batch.image_mask.sum(dim=1).tolist() == [15, 0, 19]


def test_the_image_mask_leaves_the_tokens_around_an_image_out(image):
    vlm = built("qwen2_vl")
    batch = vlm.encode([image(0)], [f"{IMAGE} ?"])
    words = vlm.tokenizer.convert_ids_to_tokens(batch.input_ids[0])
    assert words == ["<|vision_start|>", *[IMAGE] * 4, "<|vision_end|>", "?"]
    assert batch.image_mask[0].tolist() == [False, *[True] * 4, False, False]


@pytest.mark.parametrize("chat", [False, True])
def test_a_placeholder_may_be_written_with_or_without_the_tokens_around_it(chat, image):
    vlm = built("qwen2_vl", chat)
    pictures = [[image(0), image(1)]]
    bare = vlm.encode(pictures, [f"is {IMAGE} {IMAGE} red ?"])
    wrapped = vlm.encode(pictures, [f"is {WRAPPED} {WRAPPED} red ?"])
    assert torch.equal(bare.input_ids, wrapped.input_ids)
    around = bare.input_ids[0].tolist().count(vlm.tokenizer.convert_tokens_to_ids("<|vision_start|>"))
    assert around == 2
    vlm.forward(bare)  # the model needs the two images apart to count positions


def test_with_a_chat_template_placeholders_may_be_left_out(image):
    vlm = built("qwen3_vl", chat=True)
    left_out = vlm.encode([image(0), None], ["red ?", "red ?"])
    written = vlm.encode([image(0), None], [f"{WRAPPED} red ?", "red ?"])
    assert torch.equal(left_out.input_ids, written.input_ids)
    assert vlm.tokenizer.decode(left_out.input_ids[1]).endswith("USER: red ? ASSISTANT:")
    with pytest.raises(InputError, match=r"1 images for 0 placeholders '<\|image_pad\|>'"):
        built("qwen3_vl").encode([image(0)], ["red ?"])
    with pytest.raises(InputError, match="2 placeholders"):
        vlm.encode([image(0)], [f"{WRAPPED} {IMAGE} red ?"])


def test_videos_are_refused_by_name(image):
    with pytest.raises(UnsupportedError, match=r"prompt 1: found the placeholder of a video, '<\|video_pad\|>'"):
        built("qwen2_5_vl").encode([image(0), None], [f"{IMAGE} ?", "<|video_pad|> ?"])


@pytest.mark.parametrize(("name", "widths"), [("qwen2_vl", 32), ("qwen2_5_vl", 24), ("qwen3_vl", 24)])
def test_anatomy(name, widths):
    vlm = built(name)
    one = vlm.anatomy
    assert family_of(vlm.model.config) is one.family
    assert (one.n_layers, one.n_heads, one.n_kv_heads, one.d_model, one.d_head) == (3, 4, 2, 32, 8)
    assert (one.n_vision_layers, one.n_vision_heads, one.d_vision, one.has_cls) == (3, 2, 16, False)
    assert one.deepstack_layers == ((0, 1) if name == "qwen3_vl" else ())
    assert vlm.model.get_submodule(one.place("vision_mlp_pre", 0).path).out_features == widths
    assert vlm.end_tokens == (2,)
