"""Towers that run over the patches of all images as one sequence, against the model itself with eager attention.

The order of patches is written out here by loops, apart from the rules under test.
"""

from __future__ import annotations

import copy
import functools
import sys

import pytest
import torch
from tiny_models import BUILDERS

from slitlamp.errors import InputError
from slitlamp.tracing import Edit, sites
from slitlamp.vlm import VLM

NAMES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3"]
SIZES = [(20, 16), (40, 24), (12, 44)]  # width and height; the first two are the images of one prompt


@functools.cache
def built(name) -> VLM:
    return BUILDERS[name]()


def batch_of(vlm, image):
    pictures = [image(number, *size) for number, size in enumerate(SIZES)]
    mark = vlm.processor.image_token
    return vlm.encode([pictures[:2], None, pictures[2:]], [f"{mark} and {mark} ?", "a dog ?", f"is {mark} red ?"])


def shapes_of(batch) -> list[tuple[int, int]]:
    """Rows and columns of every image, in patches."""
    if "image_grid_thw" in batch.extra:
        return [(rows, columns) for _, rows, columns in batch.extra["image_grid_thw"].tolist()]
    return [(int(height) // 4, int(width) // 4) for height, width in batch.extra["image_sizes"]]


def packed(name, shapes, merged=False) -> list[tuple[int, int, int]]:
    """Image, row and column of every position of the tower's sequence (or of what the projector makes of it)."""
    found = []
    for number, (rows, columns) in enumerate(shapes):
        if name == "mistral3":
            side = 2 if merged else 1
            found += [(number, row, column) for row in range(rows // side) for column in range(columns // side)]
            continue
        for block_row, block_column in blocks(name, rows // 2, columns // 2):
            if merged:
                found.append((number, block_row, block_column))
                continue
            for row in (0, 1):
                found += [(number, 2 * block_row + row, 2 * block_column + column) for column in (0, 1)]
    return found


def blocks(name, rows, columns) -> list[tuple[int, int]]:
    """The order of blocks of 2 x 2 patches: row by row, or window by window (2 x 2 blocks) and row by row within."""
    if name != "qwen2_5_vl":
        return [(row, column) for row in range(rows) for column in range(columns)]
    found = []
    for top in range(0, rows, 2):
        for left in range(0, columns, 2):
            inside = [(row, column) for row in (top, top + 1) for column in (left, left + 1)]
            found += [(row, column) for row, column in inside if row < rows and column < columns]
    return found


def by_image(name, shapes, values, merged=False):
    """Per image, values [sequence, ...] in raster order."""
    order = packed(name, shapes, merged)
    assert len(order) == len(values)
    found = []
    for number in range(len(shapes)):
        own = sorted((row, column, place) for place, (image, row, column) in enumerate(order) if image == number)
        found.append(values[[place for *_, place in own]])
    return found


@functools.cache
def eager(name):
    """A copy of the model with eager attention, and the name of its function in the module of the tower."""
    model = copy.deepcopy(built(name).model)
    model.set_attn_implementation("eager")
    return model, sys.modules[type(model.model.get_submodule(built(name).anatomy.family.vision_tower[6:])).__module__]


@pytest.fixture
def reference(request, image, monkeypatch):
    """The batch, its shapes, the raw outputs of the tower's modules in the eager model, and its attention matrices."""
    name = request.param
    vlm = built(name)
    model, module = eager(name)
    batch = batch_of(vlm, image)
    attentions = {}
    true_function = module.eager_attention_forward

    def watching(attention, *args, **kwargs):
        output, weights = true_function(attention, *args, **kwargs)
        attentions.setdefault(attention, []).append(weights[0])
        return output, weights

    monkeypatch.setattr(module, "eager_attention_forward", watching)
    outputs = {}
    handles = [
        part.register_forward_hook(lambda part, args, output, path=path: outputs.__setitem__(path, output))
        for path, part in model.named_modules()
        if path.startswith((vlm.anatomy.family.vision_tower, vlm.anatomy.family.projector))
    ]
    with torch.no_grad():
        model(**batch.inputs())
    for handle in handles:
        handle.remove()
    outputs = {path: value[0] if isinstance(value, tuple) else value for path, value in outputs.items()}
    shapes = shapes_of(batch)
    n_patches = sum(rows * columns for rows, columns in shapes)
    whole = []
    for layer in range(3):
        full, start = torch.zeros(2, n_patches, n_patches), 0
        for chunk in attentions[model.get_submodule(vlm.anatomy.place("vision_attention", layer).path)]:
            stop = start + chunk.shape[-1]
            full[:, start:stop, start:stop] = chunk
            start = stop
        assert start == n_patches
        whole.append(full)
    return name, vlm, batch, shapes, outputs, whole


def states_of(outputs, path, width):
    return outputs[path].reshape(-1, width)


@pytest.mark.parametrize("reference", NAMES, indirect=True)
def test_states_are_those_of_the_eager_model_image_by_image(reference):
    name, vlm, batch, shapes, outputs, _ = reference
    counts = [rows * columns for rows, columns in shapes]
    assert len(set(counts)) == 3
    wanted = [
        sites.vision_resid_post(),
        sites.vision_attn_out(),
        sites.vision_ln2(positions="patches"),
        sites.projector_out(),
    ]
    wanted += [sites.vision_q(), sites.vision_v(heads=[1]), sites.vision_mlp_pre()]
    with vlm.trace(*wanted) as trace:
        vlm.forward(batch)
    anatomy = vlm.anatomy
    for label in ("vision_resid_post", "vision_attn_out", "vision_ln2"):
        assert trace.mask(label).sum(dim=1).tolist() == counts
        for layer in range(3):
            raw = states_of(outputs, anatomy.place(label, layer).path, 16)
            for tile, own in enumerate(by_image(name, shapes, raw)):
                torch.testing.assert_close(trace[label][layer][tile, : len(own)], own, rtol=0, atol=1e-5)
                assert torch.all(trace[label][layer][tile, len(own) :] == 0)
    merged = [count // 4 for count in counts]
    assert trace.mask("projector_out").sum(dim=1).tolist() == merged
    raw = states_of(outputs, anatomy.place("projector_out", 0).path, 32)
    for tile, own in enumerate(by_image(name, shapes, raw, merged=True)):
        torch.testing.assert_close(trace["projector_out"][0][tile, : len(own)], own, rtol=0, atol=1e-5)
    for layer in range(3):
        place = anatomy.place("vision_q", layer)
        raw = outputs[place.path]
        raw = raw.reshape(-1, raw.shape[-1])
        values = outputs[anatomy.place("vision_v", layer).path].reshape(raw.shape)
        if place.third is not None:
            raw, values = raw[:, :16], values[:, 32:]
        for tile, (q, v) in enumerate(zip(by_image(name, shapes, raw), by_image(name, shapes, values), strict=True)):
            torch.testing.assert_close(trace["vision_q"][layer][tile, : len(q)].flatten(1), q, rtol=0, atol=1e-5)
            torch.testing.assert_close(trace["vision_v"][layer][tile, : len(v), 0], v[:, 8:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("reference", NAMES, indirect=True)
def test_attention_is_that_of_the_eager_model_put_together(reference):
    name, vlm, batch, shapes, _, whole = reference
    with vlm.trace(sites.vision_attention(queries="all", keys="all")) as trace:
        vlm.forward(batch)
    counts = [rows * columns for rows, columns in shapes]
    assert trace.mask("vision_attention").sum(dim=1).tolist() == counts
    assert trace["vision_attention"].key_mask.sum(dim=1).tolist() == counts
    windows = 0
    for layer, full in enumerate(whole):
        found = trace["vision_attention"][layer]
        assert found.shape == (3, 2, max(counts), max(counts))
        rows = by_image(name, shapes, full.permute(1, 2, 0))
        for tile, of_tile in enumerate(rows):
            own = by_image(name, shapes, of_tile.transpose(0, 1))[tile].permute(2, 1, 0)
            count = counts[tile]
            torch.testing.assert_close(found[tile, :, :count, :count], own, rtol=0, atol=1e-5)
            assert torch.all(found[tile, :, count:] == 0)
            assert torch.all(found[tile, :, :, count:] == 0)
            windows += int((own == 0).any())
    assert windows == (4 if name == "qwen2_5_vl" else 0)  # two layers by two images larger than a window


@pytest.mark.parametrize("name", NAMES)
def test_reductions_are_those_of_what_is_there(name, image):
    vlm = built(name)
    batch = batch_of(vlm, image)
    attention = functools.partial(sites.vision_attention, queries="patches", keys="patches", layers=[0, 1])
    with vlm.trace(
        sites.vision_resid_post(),
        sites.vision_resid_post(positions="patches", reduce="mean", label="mean"),
        sites.vision_resid_post(reduce="sum", label="sum"),
        sites.projector_out(reduce="mean"),
        sites.projector_out(label="tokens"),
        attention(label="all"),
        attention(heads=[1], label="head"),
        attention(reduce_queries="mean", label="queries"),
        attention(reduce_keys="sum", label="keys"),
        attention(reduce_heads="mean", reduce_queries="sum", label="heads and queries"),
    ) as trace:
        vlm.forward(batch)
    for tile, (rows, columns) in enumerate(shapes_of(batch)):
        count = rows * columns
        for layer in range(3):
            own = trace["vision_resid_post"][layer][tile, :count]
            torch.testing.assert_close(trace["mean"][layer][tile], own.mean(dim=0), rtol=0, atol=1e-5)
            torch.testing.assert_close(trace["sum"][layer][tile], own.sum(dim=0), rtol=0, atol=1e-4)
        tokens = trace["tokens"][0][tile, : count // 4]
        torch.testing.assert_close(trace["projector_out"][0][tile], tokens.mean(dim=0), rtol=0, atol=1e-5)
        for layer in (0, 1):
            own = trace["all"][layer][tile, :, :count, :count]
            torch.testing.assert_close(own.sum(dim=-1), torch.ones(2, count), rtol=0, atol=1e-5)
            torch.testing.assert_close(trace["head"][layer][tile, 0, :count, :count], own[1], rtol=0, atol=0)
            torch.testing.assert_close(trace["queries"][layer][tile, :, :count], own.mean(dim=1), rtol=0, atol=1e-6)
            torch.testing.assert_close(trace["keys"][layer][tile, :, :count], own.sum(dim=2), rtol=0, atol=1e-6)
            both = trace["heads and queries"][layer][tile, :count]
            torch.testing.assert_close(both, own.mean(dim=0).sum(dim=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_recorded_the_same_alone_and_in_a_batch(name, image):
    vlm = built(name)
    batch = batch_of(vlm, image)
    wanted = (sites.vision_resid_post(), sites.projector_out(), sites.vision_attention(queries="all", keys="all"))
    with vlm.trace(*wanted) as trace:
        vlm.forward(batch)
    mark = vlm.processor.image_token
    with vlm.trace(*wanted) as alone:
        vlm.generate(vlm.encode([image(2, *SIZES[2])], [f"{mark} red ?"]), max_new_tokens=3)
    for label in ("vision_resid_post", "projector_out", "vision_attention"):
        for layer in alone[label].layers:
            one = alone[label][layer][0]
            in_batch = trace[label][layer][2]
            cut = in_batch[tuple(slice(0, size) for size in one.shape)]
            torch.testing.assert_close(cut, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_edits_act_on_positions_of_a_tile_in_raster_order(name, image):
    vlm = built(name)
    batch = batch_of(vlm, image)
    plain = vlm.forward(batch).logits
    seen = {}

    def change(values, calls):
        seen["shape"] = tuple(values.shape)
        changed = values.clone()
        changed[1, 3] = 7.0
        return changed

    def run(*edits):
        return vlm._extra_pass(batch, [sites.vision_resid_post(), sites.projector_out(), sites.resid_post()], edits)

    before = run()
    same = run(Edit("vision_resid_post", 0, lambda values, calls: values.clone()))
    for label in ("vision_resid_post", "projector_out", "resid_post"):
        assert torch.equal(before[label].stack(), same[label].stack())
    after = run(Edit("vision_resid_post", 2, change))
    counts = [rows * columns for rows, columns in shapes_of(batch)]
    assert seen["shape"] == (3, max(counts), 16)
    changed = (after["vision_resid_post"][2] != before["vision_resid_post"][2]).any(dim=2).nonzero().tolist()
    assert changed == [[1, 3]]
    assert torch.all(after["vision_resid_post"][2][1, 3] == 7)
    token = (after["projector_out"][0] != before["projector_out"][0]).any(dim=2).nonzero().tolist()
    assert token == [[1, 1]]  # patch 3 of the first row belongs to the second square
    assert torch.equal(vlm.forward(batch).logits, plain)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_images_has_nothing_to_record_in_the_tower(name):
    vlm = built(name)
    with vlm.trace(sites.vision_resid_post(), sites.resid_post()) as trace:
        vlm.forward(vlm.encode(None, ["a dog ?"]))
    assert trace["resid_post"][2].shape == (1, 3 + (vlm.tokenizer.bos_token is not None), 32)
    with pytest.raises(InputError, match="recorded nothing"):
        trace["vision_resid_post"][0]
    with pytest.raises(InputError, match="no CLS token"), vlm.trace(sites.vision_attention()):
        pass
