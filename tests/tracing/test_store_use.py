"""Reading a store, and traces that write one: runs, refusals, continuing."""

import contextlib
import copy

import pytest
import torch
from stored import asked, check_store, encode

import slitlamp as sl
from probes import HeadDivergence
from slitlamp.errors import InputError, StoreError, UnknownNameError
from slitlamp.tracing import check_sites, sites
from slitlamp.tracing.store.writer import StoredTrace
from slitlamp.tracing.trace import Source


@pytest.fixture
def pictures(image):
    return [[image(0), image(1, 30, 9)], [image(2)], [], [image(3, 9, 40)]]


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


def test_recordings_that_were_written_into_are_refused(llava, pictures, tmp_path):
    """A recording is stored as it is, a little later; a store of other numbers than the model's would be worthless."""

    def run(change):
        with llava.trace(sites.resid_post(positions="last"), store=tmp_path) as trace:
            llava.forward(encode(llava, pictures))
            change(trace["resid_post"][1])

    with pytest.raises(InputError, match=r"over 'item 0', .* were written into before they were stored"):
        run(lambda values: values.mul_(2))
    assert len(sl.open_store(tmp_path)) == 0
    run(lambda values: values.clone().mul_(2))
    assert len(sl.open_store(tmp_path)) == 4


def test_inference_mode(llava, pictures, tmp_path):
    with llava.trace(*asked()) as plain, llava.trace(*asked(), store=tmp_path), torch.inference_mode():
        llava.forward(encode(llava, pictures))
    check_store(sl.open_store(tmp_path), plain, plain.batch)
