"""What a store holds, compared with a plain trace of the same runs, whose masks say what is real."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from tiny_models import BUILDERS

import slitlamp as sl
from probes import HeadDivergence
from slitlamp.errors import InputError, StoreError, UnknownNameError, UnsupportedError
from slitlamp.tracing import check_sites, sites
from slitlamp.tracing.store_items import tiles_per_row
from slitlamp.tracing.store_writer import StoredTrace
from slitlamp.tracing.trace import Source, Step

PROMPTS = ["is <image> in the <image> ?", "<image> describe this .", "what is a dog ?", "<image> what ?"]


def asked():
    """Every kind of recording: kept whole, reduced, with heads, with queries and keys, of the vision tower."""
    return [
        sites.resid_post(layers=[0, 2], positions="all", label="all"),
        sites.resid_post(positions="image"),
        sites.resid_post(positions="last", label="last"),
        sites.resid_post(positions="image", reduce="mean", label="mean"),
        sites.z(positions="text_after_image", heads=[3, 0]),
        sites.k(layers=1, positions="last"),
        sites.mlp_post(layers=1, positions="text"),
        sites.logits(),
        sites.attention(queries="text", keys="image"),
        sites.attention(queries="last", keys="all", layers=1, heads=[2], label="one head"),
        sites.attention(queries="text", keys="image", reduce_keys="sum", label="over keys"),
        sites.attention(queries="text", keys="all", reduce_queries="mean", label="over queries"),
        sites.attention(queries="last", keys="image", reduce_heads="mean", label="over heads"),
        sites.attention(reduce_queries="mean", reduce_keys="sum", label="mass"),
        sites.vision_resid_post(layers=[0, 1]),
        sites.vision_attention(queries="all", keys="all", layers=1),
        sites.projector_out(),
    ]


@pytest.fixture
def pictures(image):
    return [[image(0), image(1, 30, 9)], [image(2)], [], [image(3, 9, 40)]]


def encode(vlm, pictures, rows=range(4), suffix=""):
    ids = [f"item {row}{suffix}" for row in rows]
    return vlm.encode([pictures[row] for row in rows], [PROMPTS[row] for row in rows], ids=ids, chat=False)


def real(trace, label, layer, row):
    """The recording of a row (of a vision site, of a tile) without padding, by the masks of each forward call."""
    site = trace.sites[label]
    parts, widths = [], []
    for step in (step for step in trace.steps if label in step):
        values, valid = step[label][layer][row], step.masks[label][row]
        keys = step.key_masks[label][row] if site.is_attention else None
        if keys is not None and not keys.any():
            continue
        axes = list(site.axes[1:])
        for name in ("position", "query"):
            if name in axes:
                values = values.index_select(axes.index(name), valid.nonzero()[:, 0])
        if "key" in axes:
            values = values.index_select(axes.index("key"), keys.nonzero()[:, 0])
            widths.append(values.shape[-1])
        if valid.any():
            parts.append(values)
    return parts, widths


def check(layer, trace, label, row, unit):
    """A stored recording is that of the trace, bit for bit."""
    found = layer[unit]
    parts, widths = real(trace, label, layer.layer, row)
    site = trace.sites[label]
    ragged = [axis for axis in ("position", "query", "step", "key") if axis in layer.axes]
    if not parts:  # nothing was there to be recorded
        assert found.isnan().all() if not ragged else found.numel() == 0
        return 0
    if "key" in layer.axes:
        parts = [torch.nn.functional.pad(part, (0, max(widths) - part.shape[-1])) for part in parts]
    joined = next((site.axes[1:].index(name) for name in ("position", "query") if name in site.axes), None)
    if "step" in layer.axes:
        wanted = torch.stack(parts)
    else:
        wanted = parts[0] if len(parts) == 1 else torch.cat(parts, dim=joined)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)
    return wanted.numel()


def check_store(store, trace, batch):
    compared = 0
    for label, site in trace.sites.items():
        assert store[label].layers == site.layers
        for layer in store[label].values():
            if not site.is_vision:
                compared += sum(check(layer, trace, label, row, one) for row, one in enumerate(batch.ids))
                continue
            owners = [one for one, count in zip(batch.ids, batch.tiles, strict=True) for _ in range(count)]
            assert layer.ids == tuple(owners)
            compared += sum(check(layer, trace, label, row, row) for row in range(len(owners)))
            for one in batch.ids:
                tiles = [layer[row] for row, owner in enumerate(owners) if owner == one]
                if len({tile.shape for tile in tiles}) == 1:
                    assert torch.equal(layer[one], torch.stack(tiles))
    assert compared > 0


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


# -- reading --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(llava, pictures, tmp_path):
    """Sixteen items in four shards of four, and plain traces of their runs."""
    several = [
        sites.resid_post(positions="last"),
        sites.resid_post(positions="all", label="all"),
        sites.vision_resid_post(),
    ]
    traces = []
    with llava.trace(*several, store=sl.StoreOptions(tmp_path / "store", shard_bytes=1)):
        for run in range(4):
            with llava.trace(*several) as plain:
                llava.forward(encode(llava, pictures, suffix=f" of run {run}"))
            traces.append(plain)
    return tmp_path / "store", traces


def test_indexing_is_that_of_a_tensor(filled):
    path, traces = filled
    layer = sl.open_store(path)["resid_post"][1]
    whole = torch.cat([plain["resid_post"][1] for plain in traces])
    assert layer.shape == tuple(whole.shape) == (16, 1, 32)
    assert layer.axes == ("item", "position", "d_model")
    for index in (0, 5, -1, slice(None), slice(1, 3), slice(2, 11), slice(14, None, -3), slice(3, 3), slice(4, 8)):
        assert torch.equal(layer[index], whole[index] if index != slice(14, None, -3) else whole[[14, 11, 8, 5, 2]])
    assert torch.equal(layer["item 2 of run 3"], whole[14])
    assert torch.equal(torch.stack(list(layer)), whole)
    with pytest.raises(IndexError, match="16 recordings; there is no number 16"):
        layer[16]
    with pytest.raises(InputError, match="'nobody' is not among the 16 items"):
        layer["nobody"]


def test_a_stretch_of_a_shard_is_mapped_not_copied(filled):
    layer = sl.open_store(filled[0])["resid_post"][1]
    assert layer[4:8].untyped_storage().data_ptr() == layer[5].untyped_storage().data_ptr()


def test_padded_batches(filled):
    path, traces = filled
    layer = sl.open_store(path)["all"][2]
    assert layer.shape == (16, None, 32)
    values, mask = layer.padded(slice(4, 8))
    assert torch.equal(values, traces[1]["all"][2])
    assert torch.equal(mask[:, :, 0], traces[1].mask("all"))
    values, _ = layer.padded(["item 1 of run 2", 0])
    assert torch.equal(values[0, : len(layer[9])], layer[9])
    with pytest.raises(InputError, match="differ in shape"):
        layer[4:8]
    assert layer.padded([])[0].shape == (0, 0, 32)


def test_names_of_transformer_lens(filled):
    store = sl.open_store(filled[0])
    assert torch.equal(store["blocks.1.hook_resid_post"][3], store["resid_post"][1][3])
    with pytest.raises(UnknownNameError, match="resid_post"):
        store["resid_pst"]
    with pytest.raises(InputError, match=r"layer 7 .* recorded: \[0, 1, 2\]"):
        store["resid_post"][7]


def test_what_is_shown(filled):
    store = sl.open_store(filled[0])
    assert "16 items" in repr(store)
    assert "4 shards" in repr(store)
    assert store.nbytes == sum(path.stat().st_size for path in filled[0].glob("*.safetensors"))
    assert store.sites["resid_post"] == sites.resid_post(layers=[0, 1, 2], positions="last")
    assert store.manifest["model"]["weights_sha256"]


def test_a_shard_is_a_safetensors_file(filled):
    from safetensors.torch import load_file

    tensors = load_file(filled[0] / "shard-0-00002.safetensors")
    assert torch.equal(tensors["resid_post.1"], filled[1][2]["resid_post"][1])
    assert sorted({name.rpartition(".")[2] for name in tensors}) == ["0", "1", "2", "shapes"]


# -- traces ---------------------------------------------------------------------------------------------------------------


def test_a_probe_measures_while_the_store_is_filled(llava, pictures, tmp_path):
    """Its tables are those without a store, and its numbers can be had from the store again."""
    probes, several = [HeadDivergence(), HeadDivergence()], [sites.resid_post(positions="image")]
    groups = [[0, 1], [3]]
    means = []
    with llava.trace(*several, store=tmp_path) as trace:
        for rows in groups:
            llava.measure(probes[0], encode(llava, pictures, rows))
            means += [
                one[mask].mean() for one, mask in zip(trace["resid_post"][1], trace.mask("resid_post"), strict=True)
            ]
    for rows in groups:
        llava.measure(probes[1], encode(llava, pictures, rows))
    for name, table in probes[0].result().tables.items():
        assert table.equals(probes[1].result().tables[name])
    again = [one.mean() for one in sl.open_store(tmp_path)["resid_post"][1]]
    torch.testing.assert_close(torch.stack(again), torch.stack(means))


def test_pending_and_items_stored_twice(llava, pictures, tmp_path):
    with llava.trace(sites.resid_post(), store=tmp_path) as trace:
        llava.forward(encode(llava, pictures, [0, 1]))
        assert trace.pending([f"item {row}" for row in range(4)]) == ["item 2", "item 3"]
        with pytest.raises(InputError, match="items 'item 1' are in the store"):
            llava.forward(encode(llava, pictures, [1, 2]))
        with pytest.raises(InputError, match="more than once in this batch"):
            llava.forward(llava.encode([None, None], ["what ?", "what ?"], ids=["x", "x"]))
        llava.forward(encode(llava, pictures, [2]))
    with llava.trace(sites.resid_post(), store=tmp_path) as trace:
        assert trace.pending(["item 2", "item 3"]) == ["item 3"]
        llava.forward(encode(llava, pictures, [3]))
    assert sl.open_store(tmp_path).ids == ("item 0", "item 1", "item 2", "item 3")
    with llava.trace(sites.resid_post()) as trace:
        assert trace.pending(["a"]) == ["a"]


def test_an_exception_keeps_finished_runs_and_nothing_of_the_failed_one(llava, pictures, tmp_path):
    def fail(module, args):
        raise RuntimeError("out of memory, say")

    def run():
        with llava.trace(sites.resid_pre(), store=tmp_path):
            llava.forward(encode(llava, pictures, [0, 1]))
            stack.callback(block.register_forward_pre_hook(fail).remove)
            llava.forward(encode(llava, pictures, [2]))

    block = llava.model.get_submodule(llava.anatomy.blocks[1])
    with contextlib.ExitStack() as stack, pytest.raises(RuntimeError, match="say"):
        run()
    assert sl.open_store(tmp_path).ids == ("item 0", "item 1")


def test_a_failed_run_may_be_run_again(llava, pictures, tmp_path):
    vlm = sl.VLM.wrap(copy.deepcopy(llava.model), llava.processor)
    with vlm.trace(sites.resid_post(), store=tmp_path) as trace:
        vlm.model.train()
        with pytest.raises(InputError, match="training mode"):
            vlm.forward(encode(vlm, pictures, [0]))
        vlm.model.eval()
        assert trace.pending(["item 0"]) == ["item 0"]
        vlm.forward(encode(vlm, pictures, [0]))
    assert len(sl.open_store(tmp_path)["resid_post"][0]) == 1


def test_what_cannot_be_stored_is_refused(llava, pictures, tmp_path):
    mask = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(InputError, match="a position mask belongs to one batch"):
        llava.trace(sites.resid_post(positions=mask), store=tmp_path / "mask").__enter__()
    with pytest.raises(InputError, match="gradients are not stored"):
        llava.trace(sites.resid_post(), store=tmp_path / "g", gradient_of=lambda out: out.logits.sum()).__enter__()
    assert not (tmp_path / "mask").exists()
    with llava.trace(sites.resid_post(positions="last"), store=tmp_path / "kinds"):
        llava.forward(encode(llava, pictures, [0]))
        with pytest.raises(InputError, match=r"holds forward passes .* generations .* need a store of their own"):
            llava.generate(encode(llava, pictures, [1]), max_new_tokens=2)


def test_a_store_belongs_to_one_set_of_interventions(llava, pictures, tmp_path):
    from interventions import HeadReinforcement

    with llava.trace(sites.resid_post(positions="last"), store=tmp_path), llava.apply(HeadReinforcement(alpha=2.0)):
        llava.forward(encode(llava, pictures, [0]))
    with llava.trace(sites.resid_post(positions="last"), store=tmp_path):
        with pytest.raises(InputError, match=r"under HeadReinforcement\(.*alpha=2.0"):
            llava.forward(encode(llava, pictures, [1]))
        with llava.apply(HeadReinforcement(alpha=2.0)):
            llava.forward(encode(llava, pictures, [1]))
    assert len(sl.open_store(tmp_path)) == 2


def test_a_store_is_continued_with_what_made_it(llava, pictures, tmp_path):
    with llava.trace(sites.resid_post(layers=[0, 1]), store=tmp_path):
        llava.forward(encode(llava, pictures, [0]))
    with pytest.raises(StoreError, match=r"'resid_post': layers \(\[0, 1\] there, \[0, 2\] now\)"):
        llava.trace(sites.resid_post(layers=[0, 2]), store=tmp_path).__enter__()
    with pytest.raises(StoreError, match="'z' is asked for and not recorded there"):
        llava.trace(sites.resid_post(layers=[0, 1]), sites.z(), store=tmp_path).__enter__()
    other = sl.VLM.wrap(copy.deepcopy(llava.model), llava.processor)
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    with pytest.raises(StoreError, match="weights sha256"):
        other.trace(sites.resid_post(layers=[0, 1]), store=tmp_path).__enter__()
    with other.trace(sites.resid_post(layers=[0, 1]), store=sl.StoreOptions(tmp_path, hash_weights=False)) as trace:
        assert trace.pending(["item 0"]) == []  # without hashes only configurations are compared
    half = sl.VLM.wrap(copy.deepcopy(llava.model).half(), llava.processor)
    with pytest.raises(StoreError, match=r"dtype \(float32 there, float16 now\)"):
        half.trace(sites.resid_post(layers=[0, 1]), store=tmp_path).__enter__()


def test_one_process_writes_as_one_writer(llava, tmp_path):
    with (
        llava.trace(sites.resid_post(), store=tmp_path),
        pytest.raises(InputError, match="is being written"),
        llava.trace(sites.resid_post(), store=tmp_path),
    ):
        pass
    with pytest.raises(InputError, match="name of a writer"):
        llava.trace(sites.resid_post(), store=sl.StoreOptions(tmp_path, writer="../x")).__enter__()


def test_memory_holds_one_shard(llava, pictures, tmp_path):
    """What is written is let go, and a run is let go when the next one starts."""
    source = Source(llava.model, llava.anatomy, llava.tokenizer)
    options = sl.StoreOptions(tmp_path, shard_bytes=80_000)
    trace = StoredTrace(check_sites([sites.resid_post()], llava.anatomy), options, source)
    sizes = []
    for run in range(12):
        with llava.trace(sites.resid_post()) as plain:
            llava.forward(encode(llava, pictures, suffix=f"/{run}"))
        trace.start(plain.batch, decoding=False)
        assert trace.steps == []
        trace.steps = plain.steps
        trace.finish()
        sizes.append(trace._nbytes)
    assert max(sizes) < 80_000
    assert sizes.count(0) >= 2
    trace.close()
    assert len(sl.open_store(tmp_path)) == 48
