"""The nnsight backend gives the tensors that the hooks give, here and from a server.

Tolerance: both run the same kernels on the same weights; sums over chosen positions may be made in another order, which
float32 rounds at 6e-8 relative. 1e-5 times the largest absolute value (at least 1) is well above that.
"""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
import zstandard
from tiny_models import BUILDERS
from tiny_models.common import random_image

import slitlamp as sl
from interventions import HeadReinforcement
from slitlamp.errors import InputError, NonFiniteError, UnknownNameError, UnsupportedError
from slitlamp.tracing import nnsight_backend, sites
from slitlamp.vlm import VLM

STATES = (
    *("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"),
    *("q", "k", "v", "z", "mlp_pre", "mlp_post", "ln1", "ln2"),
)


@pytest.fixture(scope="module", name="build")
def build_fixture():
    """A function: name of a tiny model -> the model, made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = BUILDERS[name]()
        return made[name]

    return make


def make_batch(vlm):
    """Rows of different length; a row without an image where the family takes such in one batch."""
    family = vlm.anatomy.family
    given = vlm.processor.image_token if family.placeholder else ""
    images, prompts = (
        [random_image(0), random_image(1)],
        [f"{given} is the ?", f"{given} is there a dog in the image ?"],
    )
    if family.placeholder and family.cross is None:
        images, prompts = (
            [[images[0], random_image(2)], images[1], None],
            [f"{given} {prompts[0]}", prompts[1], "a dog ?"],
        )
    return vlm.encode(images, prompts)


def everything(vlm):
    """Every site, with positions, heads and reductions of every kind."""
    anatomy = vlm.anatomy
    asked = [getattr(sites, name)() for name in STATES if anatomy.layers(name)]
    asked += [
        getattr(sites, f"vision_{name}")(positions="patches") for name in STATES if anatomy.layers(f"vision_{name}")
    ]
    asked += [
        sites.projector_out(reduce="mean"),
        sites.logits(),
        sites.resid_post(positions="image", reduce="mean", label="image mean"),
        sites.resid_post(positions="generated", reduce="sum", label="generated sum"),
        sites.z(positions="text_after_image", heads=[2, 0], label="two heads"),
        sites.attention("last", "image"),
        sites.attention("all", "all", label="whole"),
        sites.attention("all", "image", reduce_keys="sum", label="on the image"),
        sites.attention("last", "image", reduce_keys="sum", reduce_heads="mean", label="one number"),
        sites.attention("text", "all", heads=[1], reduce_queries="mean", reduce_heads="mean", label="mean rows"),
        sites.attention("last", "generated", label="on generated"),
    ]
    if anatomy.layers("cross_attention"):
        asked += [sites.cross_attention(), sites.cross_attention("all", reduce_keys="sum", label="cross sum")]
    if anatomy.tower.unpack is None:
        asked.append(sites.vision_attention("all", "patches", reduce_heads="mean"))
    return asked


def run(vlm, batch, asked, method, **options):
    with vlm.trace(*asked, **options) as trace:
        output = vlm.forward(batch) if method == "forward" else vlm.generate(batch, max_new_tokens=4)
    return trace, output


def same(found, wanted):
    scale = max(1.0, float(wanted.nan_to_num().abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * scale, equal_nan=True)


def assert_same(found, wanted):
    """Two traces hold the same."""
    assert len(found.steps) == len(wanted.steps)
    for ours, theirs in zip(found.steps, wanted.steps, strict=True):
        assert set(ours.values) == set(theirs.values)
        for label, layers in theirs.values.items():
            assert set(ours.values[label]) == set(layers), label
            for layer, values in layers.items():
                same(ours.values[label][layer], values)
            assert torch.equal(ours.masks[label], theirs.masks[label]), label
        assert set(ours.key_masks) == set(theirs.key_masks)
        for label, mask in theirs.key_masks.items():
            assert torch.equal(ours.key_masks[label], mask), label


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_the_same_tensors_as_the_hooks(name, method, build):
    vlm = build(name)
    batch = make_batch(vlm)
    wanted, output = run(vlm, batch, everything(vlm), method)
    found, ours = run(vlm, batch, everything(vlm), method, backend="nnsight")
    assert_same(found, wanted)
    assert len(found.steps) == (1 if method == "forward" else max(map(len, output.tokens)))
    if method == "forward":
        same(ours.logits, output.logits)
    else:
        assert ours.tokens == output.tokens


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "mllama"])
def test_the_same_after_a_rehearsal_of_the_remote_run(name, method, build):
    """Serialised, read back without slitlamp (its modules hidden), run."""
    vlm = build(name)
    batch = make_batch(vlm)
    wanted, output = run(vlm, batch, everything(vlm), method)
    found, ours = run(vlm, batch, everything(vlm), method, backend="nnsight", remote="local")
    assert_same(found, wanted)
    if method == "forward":
        same(ours.logits, output.logits)
    else:
        assert ours.tokens == output.tokens


def test_eager_attention(build):
    vlm = VLM.wrap(copy.deepcopy(build("llava").model), build("llava").processor)
    assert vlm.model.config._attn_implementation == "sdpa"
    vlm.model.set_attn_implementation("eager")
    batch = make_batch(vlm)
    assert_same(*(run(vlm, batch, everything(vlm), "generate", backend=one)[0] for one in ("nnsight", "hooks")))


def test_a_batch_without_images(build):
    for name in ("llava", "mllama"):
        vlm = build(name)
        batch = vlm.encode(prompts=["what is a dog ?", "is there ?"])
        found, wanted = (run(vlm, batch, everything(vlm), "forward", backend=one)[0] for one in ("nnsight", "hooks"))
        assert "vision_resid_post" not in found.steps[0]
        assert_same(found, wanted)


def test_positions_by_mask(build):
    vlm = build("llava")
    batch = make_batch(vlm)
    mask = torch.rand(batch.size, batch.length, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[batch.lengths.index(batch.length), 5:] = False  # the longest row has the fewest
    asked = (sites.resid_post(positions=mask), sites.attention(mask, mask), sites.attention("last", mask, label="keys"))
    for method in ("forward", "generate"):
        assert_same(*(run(vlm, batch, asked, method, backend=one)[0] for one in ("nnsight", "hooks")))


def test_sampling_here(build):
    vlm = build("llava")
    batch, asked = make_batch(vlm), (sites.resid_post(positions="last"),)
    traces = []
    for backend in ("hooks", "nnsight"):
        with vlm.trace(*asked, backend=backend) as trace:
            vlm.generate(batch, max_new_tokens=4, do_sample=True, seed=3)
        traces.append(trace)
    assert_same(traces[1], traces[0])


def state_of(vlm):
    """What a run must leave as it was: the module path, attributes of modules and processor, configuration, weights."""
    modules = [(id(module), sorted(module.__dict__), len(module._forward_hooks)) for module in vlm.model.modules()]
    weights = [(name, one.data_ptr(), one._version) for name, one in vlm.model.named_parameters()]
    processor = [sorted(vlm.processor.__dict__), sorted(vlm.tokenizer.__dict__), vlm.tokenizer.padding_side]
    return (
        list(sys.path),
        modules,
        weights,
        processor,
        vlm.model.config.to_dict(),
        vlm.model.generation_config.to_dict(),
    )


@pytest.mark.parametrize("remote", [False, "local"])
def test_the_model_and_its_processor_are_untouched(remote, build):
    vlm = BUILDERS["llava"]()  # that nothing has run on
    vlm.tokenizer.padding_side = "right"
    before = state_of(vlm)
    run(vlm, make_batch(vlm), everything(vlm), "generate", backend="nnsight", remote=remote)
    assert state_of(vlm) == before


def test_only_what_was_asked_for_leaves_the_model(build, monkeypatch):
    vlm = build("llava")
    batch = make_batch(vlm)
    came = {}
    interleave = nnsight_backend._interleave

    def spy(*args):
        came.update(interleave(*args))
        return came

    monkeypatch.setattr(nnsight_backend, "_interleave", spy)
    asked = (
        sites.resid_post(layers=[1], positions="image", reduce="mean"),
        sites.attention(layers=[1], reduce_keys="sum"),
    )
    run(vlm, batch, asked, "forward", backend="nnsight", remote="local")
    assert came["output"].shape == (
        batch.size,
        batch.length,
        vlm.anatomy.d_vocab,
    )  # the logits, nothing else of the output
    assert came[0][0][0].shape == (batch.size, vlm.anatomy.d_model)
    assert came[1][0][0].shape == (batch.size, vlm.anatomy.n_heads, 1)
    assert set(came) == {"output", 0, 1}


# -- a server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="folder")
def folder_fixture(build, tmp_path_factory):
    """A model in a folder, as a hub would hold it."""
    path = tmp_path_factory.mktemp("hub") / "tiny-llava"
    build("llava").model.save_pretrained(path)
    build("llava").processor.save_pretrained(path)
    return path


@pytest.fixture(name="server")
def server_fixture(folder, build, monkeypatch):
    """A stand-in for the server: gets what would be sent, reads it without our modules, runs it on a model of its own."""
    from nnsight import TransformersModel
    from nnsight.intervention.backends.local import LocalSimulationBackend
    from nnsight.intervention.backends.remote import RemoteBackend
    from nnsight.intervention.serialization import CustomCloudUnpickler
    from nnsight.modeling import huggingface
    from nnsight.schema.request import RequestModel

    modules = set()

    class Reader(CustomCloudUnpickler):
        """Notes the modules that what was sent names."""

        def find_class(self, module, name):
            modules.add(module)
            return super().find_class(module, name)

    monkeypatch.setitem(huggingface._ID_CACHE, str(folder), "someone/tiny-llava")  # else the hub is asked
    own = build("llava")
    requests = []

    def answer(backend, request, tracer):
        blob = backend._serialize(tracer)
        modules.clear()
        model = TransformersModel(
            copy.deepcopy(own.model), task="image-text-to-text", processor=copy.deepcopy(own.processor), device="cpu"
        )
        path = list(sys.path)
        hidden = LocalSimulationBackend._hide_local_modules(LocalSimulationBackend(model))
        left = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "slitlamp"}
        hidden["modules"].update(left)  # it leaves what has "nnsight" in its name
        try:
            known = model._remoteable_persistent_objects()
            rebuilt = RequestModel.deserialize(blob, known, request.compress, Reader)
        finally:
            LocalSimulationBackend._restore(None, hidden)
            sys.path[:] = path
        requests.append((backend, request, blob, set(modules)))
        rebuilt.execute(rebuilt.info.code)
        return {"found": rebuilt.info.frame.f_locals["found"]}

    monkeypatch.setattr(RemoteBackend, "request", answer)
    return requests


@pytest.mark.parametrize("method", ["forward", "generate"])
def test_a_model_without_weights_runs_on_a_server(method, server, folder, build):
    here = VLM.remote(str(folder))
    assert all(one.is_meta for one in here.model.parameters())
    assert here.device == torch.device("cpu")
    own = build("llava")
    batch = make_batch(here)
    wanted, output = run(own, make_batch(own), everything(own), method)
    found, ours = run(here, batch, everything(here), method, backend="nnsight", remote=True)
    assert_same(found, wanted)
    if method == "forward":
        same(ours.logits, output.logits)
    else:
        assert ours.tokens == output.tokens
    ((backend, request, _, _),) = server
    assert request.model_key == (
        'nnsight.modeling.transformers.TransformersModel:{"repo_id": "someone/tiny-llava", "revision": null, '
        '"task": "image-text-to-text"}'
    )
    assert request.env == {"attn_implementation": "sdpa"}
    assert backend.host.startswith("https://")


def test_what_is_sent_names_no_module_of_ours(server, folder):
    here = VLM.remote(str(folder), revision="main")
    batch = make_batch(here)
    run(here, batch, everything(here), "forward", backend="nnsight", remote="http://localhost:1")
    asked = [sites.resid_post(positions="image", reduce="mean")]
    run(here, batch, asked, "forward", backend="nnsight", remote="http://localhost:1")
    for backend, request, _, modules in server:
        assert backend.host == "http://localhost:1"
        assert '"revision": "main"' in request.model_key
        assert {one.split(".")[0] for one in modules} <= {
            *("torch", "nnsight", "cloudpickle"),
            *("builtins", "types", "functools", "collections", "typing", "_codecs", "copyreg"),
        }
    inputs = sum(one.numel() * one.element_size() for one in batch.inputs().values())
    size = zstandard.ZstdDecompressor().decompressobj().decompress(server[1][2])
    assert len(size) < inputs + 60_000  # the batch, code and the names of modules; the weights are 134 kB


def test_our_functions_are_sent_as_source_only_then(build):
    import cloudpickle

    before = cloudpickle.list_registry_pickle_by_value()
    vlm = build("llava")
    run(vlm, make_batch(vlm), [sites.resid_post()], "forward", backend="nnsight")
    assert cloudpickle.list_registry_pickle_by_value() == before


def test_a_model_without_weights_does_not_run_here(folder):
    here = VLM.remote(str(folder))
    batch = make_batch(here)
    for options in ({}, {"backend": "nnsight"}, {"backend": "nnsight", "remote": "local"}):
        with pytest.raises(InputError, match="no weights here"):
            run(here, batch, [sites.resid_post()], "forward", **options)


# -- refusals -------------------------------------------------------------------------------------------------------


def test_what_it_refuses(build, monkeypatch):
    vlm, packed = build("llava"), build("qwen2_5_vl")
    batch, asked = make_batch(vlm), [sites.resid_post()]
    with pytest.raises(UnknownNameError, match="unknown backend 'nnsite'"):
        run(vlm, batch, asked, "forward", backend="nnsite")
    with pytest.raises(InputError, match='remote needs backend="nnsight"'):
        run(vlm, batch, asked, "forward", remote=True)
    with vlm.apply(HeadReinforcement()), pytest.raises(UnsupportedError, match="interventions run with hooks"):
        run(vlm, batch, asked, "forward", backend="nnsight")
    with pytest.raises(UnsupportedError, match="gradients are computed with hooks"):
        run(vlm, batch, asked, "forward", backend="nnsight", gradient_of=lambda output: output.logits[:, -1, 5])
    with vlm.trace(*asked), pytest.raises(InputError, match="differ in backend or remote"):
        run(vlm, batch, asked, "forward", backend="nnsight")
    with (
        vlm.trace(*asked, backend="nnsight", remote="local"),
        pytest.raises(UnsupportedError, match="a seed here does not reach it"),
    ):
        vlm.generate(batch, do_sample=True, seed=0)
    with pytest.raises(UnsupportedError, match="all tiles as one sequence"):
        run(packed, make_batch(packed), [sites.vision_attention("all", "all")], "forward", backend="nnsight")
    with pytest.raises(UnsupportedError, match="logits of the last 1 positions alone"):
        run(vlm, batch, [sites.logits("all")], "generate", backend="nnsight")
    with vlm.trace(*asked, backend="nnsight"):
        vlm.forward(batch)
        with pytest.raises(InputError, match="a trace holds one run"):
            vlm.forward(batch)
    training = VLM.wrap(copy.deepcopy(vlm.model), vlm.processor)
    training.model.train()
    with pytest.raises(InputError, match="training mode"):
        run(training, batch, asked, "forward", backend="nnsight")
    training.model.eval().model.language_model.layers[0].compile()
    with pytest.raises(UnsupportedError, match="compiled modules"):
        run(training, batch, asked, "forward", backend="nnsight")
    nameless = VLM.wrap(copy.deepcopy(vlm.model), vlm.processor)
    with pytest.raises(InputError, match="a server knows models of the hub by their name"):
        run(nameless, batch, asked, "forward", backend="nnsight", remote=True)
    monkeypatch.setitem(sys.modules, "nnsight", None)
    with pytest.raises(ImportError, match="pip install nnsight"):
        run(vlm, batch, asked, "forward", backend="nnsight")


def test_a_trace_that_failed_leaves_the_next_one_alone(build):
    vlm = build("llava")
    batch = make_batch(vlm)
    with pytest.raises(UnsupportedError):
        run(vlm, batch, [sites.logits("all")], "generate", backend="nnsight")
    trace, _ = run(vlm, batch, [sites.resid_post()], "forward", backend="nnsight")
    assert trace["resid_post"].layers == (0, 1, 2)


def test_the_document_runs(monkeypatch, capsys, server, folder):
    text = (Path(__file__).parents[2] / "docs" / "nnsight.md").read_text(encoding="utf-8")
    text = text.replace("llava-hf/llava-1.5-7b-hf", str(folder)).replace("dog.png", str(folder / "dog.png"))
    random_image(0).save(folder / "dog.png")
    names = {"__name__": "document"}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "docs/nnsight.md", "exec"), names)
    assert len(server) == 1
    assert "torch.Size" in capsys.readouterr().out


def test_infinity_is_reported(build):
    model = copy.deepcopy(build("llava").model)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight[0] = torch.inf
    vlm = VLM.wrap(model, build("llava").processor)
    with pytest.raises(NonFiniteError, match="resid_post, layer 1"):
        run(vlm, make_batch(vlm), [sites.resid_post()], "forward", backend="nnsight", nonfinite="raise")


def test_into_a_store(build, tmp_path):
    vlm = build("llava")
    batch, asked = make_batch(vlm), [sites.resid_post(positions="image", reduce="mean")]
    run(vlm, batch, asked, "forward", backend="nnsight", store=tmp_path / "store")
    wanted, _ = run(vlm, batch, asked, "forward")
    same(torch.as_tensor(sl.open_store(tmp_path / "store")["resid_post"][1][:]), wanted["resid_post"][1])
