"""After a trace, an edit or a failure, the model and its processor are what they were before."""

import copy

import pytest
import torch
from edits import Edits
from untouched import snapshot

from slitlamp.errors import InputError
from slitlamp.tracing import Edit, sites
from slitlamp.vlm import VLM

ALL = (
    sites.resid_pre,
    sites.resid_post,
    sites.z,
    sites.mlp_out,
    sites.attention,
    sites.vision_resid_post,
    sites.vision_attention,
    sites.projector_out,
)


@pytest.fixture(params=["llava sdpa", "llava eager", "llava eager tower", "llava_next sdpa"])
def vlm(request):
    name, _, attention = request.param.partition(" ")
    one = request.getfixturevalue(name)
    model = copy.deepcopy(one.model)
    model.set_attn_implementation({"vision_config": "eager"} if attention == "eager tower" else attention)
    return VLM.wrap(model, copy.deepcopy(one.processor))


@pytest.fixture
def batch(vlm, image):
    made = vlm.encode([image(0), None], ["<image> is there a dog ?", "what ?"])
    vlm.model(**made.inputs(), output_hidden_states=True)  # transformers installs hooks of its own at its first call
    return made


@pytest.fixture
def unchanged(vlm, batch):
    """Fails when the test has changed the model."""
    weights = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    before = snapshot(vlm)
    yield
    after = snapshot(vlm)
    for name in before:
        assert after[name] == before[name], name
    assert all(torch.equal(tensor, weights[name]) for name, tensor in vlm.model.state_dict().items())


class Boom(Exception):
    pass


def boom(*args, **kwargs):
    raise Boom


def test_the_snapshot_sees_what_is_left_behind(vlm, batch):
    before = snapshot(vlm)
    handle = vlm.model.get_submodule(vlm.anatomy.blocks[1]).register_forward_hook(lambda *a: None)
    assert snapshot(vlm)["modules"] != before["modules"]
    handle.remove()
    assert snapshot(vlm)["modules"] == before["modules"]
    vlm.model.config.vision_config._attn_implementation_internal = "flash"
    assert snapshot(vlm)["configs"] != before["configs"]


@pytest.mark.usefixtures("unchanged")
def test_after_encode_forward_and_generate(vlm, batch, image):
    vlm.encode([image(0), None], ["<image> is there a dog ?", "what ?"])
    with vlm.apply(Edits([Edit("z", 1, lambda values, calls: values * 2)])), vlm.trace(*(make() for make in ALL)):
        vlm.forward(batch)
    with vlm.trace(*(make() for make in ALL)):
        vlm.generate(batch, max_new_tokens=3)
    vlm.generate(batch, max_new_tokens=2, do_sample=True, seed=3)


@pytest.mark.usefixtures("unchanged")
def test_after_an_exception_in_the_with_block(vlm, batch):
    with pytest.raises(Boom), vlm.apply(Edits()), vlm.trace(sites.attention()):  # noqa: PT012
        vlm.forward(batch)
        raise Boom


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("site", ["vision_resid_post", "projector_out", "resid_pre", "z", "mlp_out", "resid_post"])
def test_after_an_exception_inside_an_edit(site, vlm, batch):
    with vlm.apply(Edits([Edit(site, 0, boom)])), vlm.trace(sites.attention(), sites.resid_post()):
        with pytest.raises(Boom):
            vlm.forward(batch)
        # both contexts are still in force, but their trace is spent
        with pytest.raises(InputError, match="a trace holds one run"):
            vlm.forward(batch)


@pytest.mark.usefixtures("unchanged")
def test_after_an_exception_inside_generate(vlm, batch):
    with vlm.trace(sites.attention(), sites.z()), pytest.raises(Boom):
        vlm.generate(batch, max_new_tokens=3, logits_processor=[boom])
    with vlm.apply(Edits([Edit("z", 0, lambda v, calls: v if calls.is_prefill else boom())])), pytest.raises(Boom):
        vlm.generate(batch, max_new_tokens=3)


@pytest.mark.usefixtures("unchanged")
def test_after_an_exception_in_an_intervention_before_the_run(vlm, batch):
    class Broken(Edits):
        def edits(self, run):
            boom()

    with vlm.apply(Broken()), pytest.raises(Boom):
        vlm.forward(batch)


@pytest.mark.usefixtures("unchanged")
def test_nested_traces_both_record_and_sequential_traces_are_apart(vlm, batch):
    with vlm.trace(sites.resid_post(), sites.attention()) as outer:
        with vlm.trace(sites.resid_post(layers=[1]), sites.attention(layers=[1])) as inner:
            vlm.forward(batch)
        assert vlm._traces == [outer]
    with vlm.trace(sites.resid_post(layers=[1])) as later:
        vlm.forward(batch)
    assert torch.equal(outer["resid_post"][1], inner["resid_post"][1])
    assert torch.equal(outer["attention"][1], inner["attention"][1])
    assert inner["resid_post"].layers == (1,)
    # the attention of the first two ran through SDPA's kernel, that of the last one by the model's own implementation
    torch.testing.assert_close(later["resid_post"][1], inner["resid_post"][1], rtol=0, atol=1e-4)


@pytest.mark.usefixtures("unchanged")
def test_a_trace_holds_one_run(vlm, batch):
    with vlm.trace(sites.resid_post(layers=[0])) as trace:
        vlm.forward(batch)
        kept = trace["resid_post"][0].clone()
        with pytest.raises(InputError, match="a trace holds one run; open a new one"):
            vlm.generate(batch)
    assert torch.equal(trace["resid_post"][0], kept)
    assert len(trace.steps) == 1


def test_interventions_nest_and_are_gone_after_exceptions(vlm, batch):
    add_one = Edits([Edit("resid_post", 0, lambda values, calls: values + 1)])
    double = Edits([Edit("resid_post", 0, lambda values, calls: values * 2)])

    def first():
        with vlm.trace(sites.resid_post(layers=[0])) as trace:
            vlm.forward(batch)
        return trace["resid_post"][0][trace.mask("resid_post")]

    plain = first()
    with vlm.apply(add_one):
        with vlm.apply(double):
            torch.testing.assert_close(first(), (plain + 1) * 2)
        torch.testing.assert_close(first(), plain + 1)
        with pytest.raises(Boom), vlm.apply(double):
            raise Boom
        torch.testing.assert_close(first(), plain + 1)
    assert torch.equal(first(), plain)


def test_the_plain_model_computes_the_same_bits_after_a_trace(vlm, batch):
    before = vlm.model(**batch.inputs()).logits
    with vlm.trace(*(make() for make in ALL)):
        vlm.forward(batch)
    assert torch.equal(vlm.model(**batch.inputs()).logits, before)


def test_recording_states_changes_no_bit_of_the_answer(vlm, batch):
    before = vlm.forward(batch).logits
    with vlm.trace(sites.resid_pre(), sites.resid_post(), sites.z(), sites.mlp_out(), sites.vision_resid_post()):
        assert torch.equal(vlm.forward(batch).logits, before)
