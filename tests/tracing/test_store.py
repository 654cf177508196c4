"""What a store holds, compared with a plain trace of the same runs, whose masks say what is real."""

import copy
import dataclasses

import pytest
import torch
from stored import asked, check_store, encode
from tiny_models import BUILDERS

import slitlamp as sl
from slitlamp.errors import UnsupportedError
from slitlamp.tracing import sites
from slitlamp.tracing.store.items import tiles_per_row
from slitlamp.tracing.trace import Step


@pytest.fixture
def pictures(image):
    return [[image(0), image(1, 30, 9)], [image(2)], [], [image(3, 9, 40)]]


def test_a_store_holds_what_a_trace_holds(any_vlm, pictures, tmp_path):
    batch = encode(any_vlm, pictures)
    with any_vlm.trace(*asked()) as plain, any_vlm.trace(*asked(), store=tmp_path / "store") as trace:
        any_vlm.forward(batch)
    store = sl.open_store(tmp_path / "store")
    assert store.ids == batch.ids
    assert not store.decoding
    check_store(store, plain, batch)
    assert torch.equal(trace["resid_post"][1], plain["resid_post"][1])  # the trace holds its last run
    assert store.verify() == {}


def test_generations_are_joined_and_end_where_each_row_ends(any_vlm, pictures, tmp_path):
    batch = encode(any_vlm, pictures)
    free = any_vlm.generate(batch, max_new_tokens=5)
    end = next(token for token in free.tokens[1][1:4] if token not in free.tokens[1][:1])
    several = [one for one in asked() if one.name != "logits"]
    with any_vlm.trace(*several) as plain, any_vlm.trace(*several, store=tmp_path):
        generation = any_vlm.generate(batch, max_new_tokens=5, eos_token_id=end)
    lengths = [len(tokens) for tokens in generation.tokens]
    assert len(set(lengths)) > 1
    store = sl.open_store(tmp_path)
    assert store.decoding
    check_store(store, plain, batch)
    assert store["mean"][0].axes == ("item", "step", "d_model")
    fed = [n - 1 for n in lengths]  # the last token of a row is never fed back
    assert [len(one) for one in store["last"][0]] == [1 + n for n in fed]
    assert [one.shape[-1] for one in store["one head"][1]] == [
        n + more for n, more in zip(batch.lengths, fed, strict=True)
    ]


def test_tiles_of_several_sizes(image, tmp_path):
    vlm = BUILDERS["qwen2_5_vl"]()
    token = vlm.processor.image_token
    batch = vlm.encode(
        [[image(0, 40, 24), image(1, 24, 24)], [image(2, 24, 56)], None],
        [
            f"<|vision_start|>{token}<|vision_end|> dog <|vision_start|>{token}<|vision_end|>",
            f"<|vision_start|>{token}<|vision_end|> cat",
            "what is a dog ?",
        ],
        ids=["a", "b", "c"],
        chat=False,
    )
    several = [sites.vision_resid_post(), sites.projector_out(), sites.resid_post(positions="image")]
    with vlm.trace(*several) as plain, vlm.trace(*several, store=tmp_path):
        vlm.forward(batch)
    store = sl.open_store(tmp_path)
    check_store(store, plain, batch)
    assert store["vision_resid_post"][0].shape[1] is None
    values, mask = store["vision_resid_post"][0].padded(["a"])
    assert torch.equal(values * mask, values)
    assert mask.sum(dim=1).flatten().tolist() == plain.mask("vision_resid_post").sum(dim=1)[:2].tolist()


def test_tiles_are_given_to_rows_or_refused(llava, pictures):
    batch = encode(llava, pictures)
    assert tiles_per_row(batch, 4) == (2, 1, 0, 1)
    assert tiles_per_row(batch, 12) == (6, 3, 0, 3)
    with pytest.raises(UnsupportedError, match="5 tiles were recorded for 4 images"):
        tiles_per_row(batch, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_numbers_are_kept_as_they_are(dtype, llava, pictures, tmp_path):
    vlm = sl.VLM.wrap(copy.deepcopy(llava.model).to(dtype), llava.processor)
    several = [sites.resid_post(positions="image"), sites.resid_post(reduce="mean", label="mean"), sites.attention()]
    with vlm.trace(*several) as plain, vlm.trace(*several, store=tmp_path):
        vlm.forward(encode(vlm, pictures))
    store = sl.open_store(tmp_path)
    check_store(store, plain, plain.batch)
    assert store["resid_post"][0].dtype == dtype
    assert store["mean"][0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def slices(plain):
    """The recordings of each row of a trace, cut out and without the padding of the others."""
    for row in range(plain.batch.size):
        steps = []
        for step in plain.steps:
            one = Step()
            for label, layers in step.values.items():
                site = plain.sites[label]
                valid, axes = step.masks[label][row : row + 1], site.axes
                n, n_keys = int(valid.sum()), None
                if label in step.key_masks:
                    n_keys = int(step.key_masks[label][row].sum())
                    one.key_masks[label] = step.key_masks[label][row : row + 1, :n_keys]
                lead = next((axes.index(name) for name in ("position", "query") if name in axes), None)
                for layer, values in layers.items():
                    cut = values[row : row + 1]
                    cut = cut if lead is None else cut.narrow(lead, 0, n)
                    cut = cut.narrow(axes.index("key"), 0, n_keys) if "key" in axes else cut
                    one.values.setdefault(label, {})[layer] = cut
                one.masks[label] = valid if lead is None else valid[:, :n]
            steps.append(one)
        batch = dataclasses.replace(
            plain.batch, **{name: getattr(plain.batch, name)[row : row + 1] for name in ("ids", "images", "patches")}
        )
        yield batch, steps


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_the_bytes_do_not_depend_on_the_batch(method, llava, pictures, tmp_path):
    several = [one for one in asked() if not one.is_vision and one.name != "logits"]
    with llava.trace(*several) as plain, llava.trace(*several, store=tmp_path / "many"):
        getattr(llava, method)(encode(llava, pictures))
    with llava.trace(*several, store=tmp_path / "one") as trace:
        for batch, steps in slices(plain):
            trace.admit(batch)
            trace.start(batch, decoding=plain.decoding)
            trace.steps = steps
            trace.finish()
    many, one = ((tmp_path / name / "shard-0-00000.safetensors").read_bytes() for name in ("many", "one"))
    assert many == one


def test_runs_of_one_item_are_those_of_many(any_vlm, pictures, tmp_path):
    """Each item run alone, the one without an image too: the same shapes, and the same numbers but for rounding."""
    for name, groups in (("many", [range(4)]), ("one", [[row] for row in range(4)])):
        with any_vlm.trace(*asked(), store=tmp_path / name) as trace:
            for rows in groups:
                any_vlm.forward(encode(any_vlm, pictures, rows))
    many, one = (sl.open_store(tmp_path / name) for name in ("many", "one"))
    assert many.ids == one.ids
    for label in trace.sites:
        for layer in many[label]:
            together, alone = list(many[label][layer]), list(one[label][layer])
            assert [part.shape for part in together] == [part.shape for part in alone]
            for left, right in zip(together, alone, strict=True):
                scale = max([1.0, *right.abs().nan_to_num().flatten().tolist()])
                torch.testing.assert_close(left, right, rtol=0, atol=1e-5 * scale, equal_nan=True)
