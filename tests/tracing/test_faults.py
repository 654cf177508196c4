"""What goes wrong: exceptions, threads, NaN, training mode, compiled and quantised models, models without weights."""

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from edits import Edits
from tiny_models import BUILDERS
from untouched import snapshot

from slitlamp.errors import InputError, NonFiniteError, UnknownNameError, UnsupportedError
from slitlamp.tracing import Edit, Probe, View, sites
from slitlamp.tracing.attention_tap import _held, _observers
from slitlamp.tracing.nonfinite import NonFiniteWarning
from slitlamp.vlm import VLM

SITES = (
    sites.resid_post(),
    sites.z(positions="last"),
    sites.attention("all", "image"),
    sites.vision_attention(),
    sites.vision_resid_post(),
)


def again(vlm):
    return VLM.wrap(copy.deepcopy(vlm.model), vlm.processor, vlm.name)


@pytest.fixture
def batch(llava, image):
    made = llava.encode([image(0), image(1)], ["<image> is there a dog ?", "<image> what ?"], ids=["first", "second"])
    llava.forward(made)  # transformers installs hooks of its own at a model's first call
    return made


def recorded(vlm, batch, **options):
    with vlm.trace(*SITES, **options) as trace:
        vlm.forward(batch)
    return trace


def assert_same(found, wanted):
    for site in SITES:
        assert torch.equal(found[site.label].stack(), wanted[site.label].stack()), site.label


# -- exceptions -------------------------------------------------------------------------------------------------------


class Boom(Exception):
    """The fault that the tests make."""


def at(place):
    """An edit that fails in a layer of one forward call."""

    def fail(values, calls):
        if calls.number == place:
            raise Boom
        return values

    return Edits([Edit("resid_post", 1, fail)])


@dataclass
class Failing(Probe):
    """A probe that fails somewhere."""

    where: str = "update"
    name = "failing"

    def sites(self, anatomy):
        if self.where == "sites":
            raise Boom
        return list(SITES)

    def views(self, anatomy):
        def view(batch, trace):
            if self.where == "view":
                raise Boom
            return batch, at(0).edits(None) if self.where == "run of a view" else []

        return {"other": View(view)}

    def update(self, batch, trace, labels=None):
        raise Boom

    def state(self):
        return {}

    def load_state(self, state): ...

    def merge(self, other): ...

    def result(self): ...


def forward(vlm, batch):
    with vlm.apply(at(0)):
        vlm.forward(batch)


def generate(vlm, batch):
    with vlm.apply(at(2)):
        vlm.generate(batch, max_new_tokens=5)


def body(vlm, batch):
    vlm.forward(batch)
    raise Boom


def probe(where):
    def run(vlm, batch):
        vlm.measure(Failing(where), batch)

    return run


@pytest.mark.parametrize(
    "fail", [forward, generate, body, *(probe(where) for where in ("sites", "update", "view", "run of a view"))]
)
def test_after_an_exception_all_is_as_before_and_the_next_run_is_right(fail, llava, batch):
    wanted, before = recorded(llava, batch), snapshot(llava)
    with pytest.raises(Boom), llava.trace(*SITES):
        fail(llava, batch)
    after = snapshot(llava)
    for name in before:
        assert after[name] == before[name], name
    assert not _held
    assert_same(recorded(llava, batch), wanted)


def test_a_trace_whose_run_failed_takes_no_second_one(llava, batch):
    with llava.trace(*SITES):
        with pytest.raises(Boom):
            forward(llava, batch)
        with pytest.raises(InputError, match="one run"):
            llava.forward(batch)


def test_nested_traces_record_the_same_run_and_end_apart(llava, batch):
    wanted = recorded(llava, batch)
    with llava.trace(*SITES) as outer:
        with pytest.raises(Boom), llava.trace(*SITES):
            raise Boom
        with llava.trace(*SITES) as inner:
            llava.forward(batch)
        assert llava._traces == [outer]
    for trace in (outer, inner):
        assert_same(trace, wanted)


# -- threads ----------------------------------------------------------------------------------------------------------

ROUNDS = 8


@pytest.mark.parametrize("models", [1, 2])
def test_threads_get_recordings_of_their_own(models, llava, image):
    """Two threads at once, on one model (its runs wait for each other) or on two; each with an intervention of its own."""
    vlms = [again(llava)] * 2 if models == 1 else [again(llava), again(BUILDERS["llava siglip"]())]
    batches = [
        vlm.encode([image(number)], ["<image> is there a dog ?" + " cat" * number]) for number, vlm in enumerate(vlms)
    ]
    asked = (sites.resid_post(), sites.attention("all", "all"), sites.vision_attention("all", "all"))

    def run(number):
        vlm = vlms[number]
        scale = Edit("mlp_out", 0, lambda values, calls: values * (number + 2))
        with vlm.apply(Edits([scale])), vlm.trace(*asked) as trace:
            vlm.forward(batches[number])
            return trace

    wanted = [run(0), run(1)]
    together = threading.Barrier(2)

    def several(number):
        found = []
        for _ in range(ROUNDS):
            together.wait(timeout=30)
            found.append(run(number))
        return found

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(several, range(2)))
    for number in range(2):
        for trace in found[number]:
            for site in asked:
                torch.testing.assert_close(trace[site.label].stack(), wanted[number][site.label].stack())
    assert not _held
    assert not _observers


def test_a_trace_records_only_runs_of_its_own_thread(llava, batch):
    wanted = llava.forward(batch).logits
    zero = Edits([Edit("resid_post", 1, lambda values, calls: values * 0)])
    with llava.trace(*SITES) as trace, llava.apply(zero), ThreadPoolExecutor(1) as pool:
        logits = pool.submit(lambda: llava.forward(batch).logits).result()
        assert trace.batch is None
        assert torch.equal(logits, wanted)  # nor is an intervention in force in another thread
        llava.forward(batch)
    assert trace["resid_post"][1].abs().max() == 0


# -- NaN and infinity -------------------------------------------------------------------------------------------------


def poison(value, *, row=1, call=0, layer=1):
    """Put a value into the residual stream of one item."""

    def change(values, calls):
        if calls.number != call:
            return values
        changed = values.clone()
        changed[row, -1, 3] = value
        return changed

    return Edits([Edit("resid_post", layer, change)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_reported_by_where_they_are(value, llava, batch):
    where = r"resid_post, layer 1, forward call 0, item 'second': 1 of \d+ values"
    with llava.apply(poison(value)):
        with pytest.warns(NonFiniteWarning, match=where), llava.trace(sites.resid_post(layers=[0, 1])) as warned:
            llava.forward(batch)
        with (
            pytest.raises(NonFiniteError, match=where + r".*nonfinite=\"keep\""),
            llava.trace(sites.resid_post(layers=[0, 1]), nonfinite="raise"),
        ):
            llava.forward(batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kept = recorded(llava, batch, nonfinite="keep")
            with llava.trace(sites.resid_post(layers=[0])):  # nothing is wrong where this one looks
                llava.forward(batch)
    assert not warned["resid_post"][1].isfinite().all()
    assert not kept["resid_post"][1].isfinite().all()


def test_the_forward_call_of_a_generation_is_named(llava, batch):
    with (
        llava.apply(poison(float("nan"), row=0, call=2)),
        pytest.raises(NonFiniteError, match="resid_post, layer 1, forward call 2, item 'first'"),
        llava.trace(sites.resid_post(layers=[1], positions="last", reduce="mean"), nonfinite="raise"),
    ):
        llava.generate(batch, max_new_tokens=4, eos_token_id=[])


def test_reductions_over_nothing_are_not_reported(llava, image):
    """A row without an image has no mean over image tokens: NaN, on purpose. A fault in the same recording is."""
    batch = llava.encode([image(0), None], ["<image> is there a dog ?", "what ?"])
    asked = (
        sites.resid_post(positions="image", reduce="mean"),
        sites.attention("last", "image", reduce_keys="mean"),
        sites.attention("image", "all", reduce_queries="mean", label="rows"),
        sites.attention("image", "image", reduce_queries="sum", reduce_keys="sum", reduce_heads="mean", label="three"),
    )
    with llava.trace(*asked, nonfinite="raise") as trace:
        llava.forward(batch)
    for site in asked:
        assert trace[site.label][0][1].isnan().all()
        assert trace[site.label][0][0].isfinite().all()
    everywhere = Edits([Edit("resid_post", 0, lambda values, calls: values * float("nan"))])
    with llava.apply(everywhere), pytest.raises(NonFiniteError, match=r"item '0'") as error, llava.trace(
        *asked, nonfinite="raise"
    ):  # fmt: skip
        llava.forward(batch)
    assert "item '1'" not in str(error.value).split("attention")[0]


def test_a_sum_that_overflows_is_not_a_fault(llava, batch):
    large = Edits([Edit("resid_post", 2, lambda values, calls: torch.full_like(values, 3e38))])
    with llava.apply(large), llava.trace(sites.resid_post(layers=[2]), nonfinite="raise") as trace:
        llava.forward(batch)
    assert trace["resid_post"][2].isfinite().all()


def test_an_unknown_policy(llava):
    with pytest.raises(UnknownNameError, match="policy for NaN and infinity 'rase'; did you mean 'raise'"):
        llava.trace(*SITES, nonfinite="rase").__enter__()


# -- states of a model ------------------------------------------------------------------------------------------------


def test_a_part_in_training_mode_is_refused(llava, batch):
    vlm = again(llava)
    vlm.model.model.vision_tower.train()
    with pytest.raises(InputError, match=r"part of the model is in training mode \(model.vision_tower; .*eval\(\)"):
        vlm.forward(batch)
    vlm.model.train()
    with pytest.raises(InputError, match="the model is in training mode"):
        vlm.forward(batch)
    vlm.model.eval()
    attention = vlm.model.model.language_model.layers[1].self_attn
    attention.train()  # it has no dropout
    vlm.forward(batch)
    attention.attention_dropout = 0.1
    with pytest.raises(InputError, match=r"\(model.language_model.layers.1.self_attn; dropout"):
        vlm.forward(batch)


def test_a_module_of_ones_own_may_be_in_training_mode_if_it_drops_nothing(llava, batch):
    vlm = again(llava)
    vlm.model.model.language_model.norm = torch.nn.Sequential(
        vlm.model.model.language_model.norm, torch.nn.Dropout(0.0)
    )
    vlm.forward(batch)
    vlm.model.model.language_model.norm[1].p = 0.5
    with pytest.raises(InputError, match=r"\(model.language_model.norm.1; dropout"):
        vlm.forward(batch)


def test_gradient_checkpointing_changes_nothing(llava, batch):
    vlm = again(llava)
    vlm.model.gradient_checkpointing_enable()
    vlm.model.eval()
    assert_same(recorded(vlm, batch), recorded(llava, batch))


COMPILED = {
    "in place": lambda model: model.compile(backend="eager"),
    "its forward": lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")),
    "a block in place": lambda model: model.model.language_model.layers[1].compile(backend="eager"),
    "attention": lambda model: model.model.language_model.layers[1].self_attn.compile(backend="eager"),
    "a block wrapped": lambda model: model.model.language_model.layers.__setitem__(
        1, torch.compile(model.model.language_model.layers[1], backend="eager")
    ),
}


@pytest.mark.parametrize("how", sorted(COMPILED))
def test_compiled_models_run_as_plain_ones_inside_a_trace(how, llava, batch):
    """Compiled code passes over hooks that come after it; the compiled model is there again afterwards."""
    wanted = recorded(llava, batch)
    vlm = again(llava)
    COMPILED[how](vlm.model)
    vlm.forward(batch)  # compiles
    implementations = [(module, module._compiled_call_impl) for module in vlm.model.modules()]
    assert_same(recorded(vlm, batch), wanted)
    with vlm.trace(*SITES) as trace:
        vlm.generate(batch, max_new_tokens=2)
    assert len(trace.steps) == 2
    with vlm.apply(poison(0.0)), vlm.trace(sites.resid_post(layers=[1])) as edited:
        vlm.forward(batch)
    assert edited["resid_post"][1][1, -1, 3] == 0 or (edited["resid_post"][1][1] == 0).any()
    assert [(module, module._compiled_call_impl) for module in vlm.model.modules()] == implementations
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_the_wrapper_that_torch_compile_returns_is_refused(llava, batch):
    vlm = VLM.wrap(torch.compile(again(llava).model, backend="eager"), llava.processor)
    with pytest.raises(UnsupportedError, match=r"torch.compile\(model\) returns.*model._orig_mod"):
        vlm.forward(batch)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantised_layers(llava, batch):
    """Dynamic int8: recordings are those of the quantised model, and its hash sees its weights."""
    if (
        "x86" not in torch.backends.quantized.supported_engines
        and "qnnpack" not in torch.backends.quantized.supported_engines
    ):
        pytest.skip("this torch has no quantised kernels")
    model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(llava.model), {torch.nn.Linear}, dtype=torch.qint8)
    vlm = VLM.wrap(model, llava.processor)
    assert type(model.model.language_model.layers[0].self_attn.q_proj) is not torch.nn.Linear
    plain = vlm.forward(batch).logits
    with vlm.trace(*SITES, sites.q(), sites.mlp_out()) as trace:
        assert torch.equal(vlm.forward(batch).logits, plain)
    assert not torch.equal(trace["resid_post"][2], recorded(llava, batch)["resid_post"][2])
    hidden = vlm.model(**batch.inputs(), output_hidden_states=True).hidden_states[2]
    assert torch.equal(
        trace["resid_post"][1][0, : int(batch.attention_mask[0].sum())], hidden[0, batch.attention_mask[0].bool()]
    )
    zero = Edits([Edit("mlp_out", 1, lambda values, calls: values * 0)])
    with vlm.apply(zero), vlm.trace(sites.mlp_out(layers=[1])) as edited:
        vlm.forward(batch)
    assert edited["mlp_out"][1].abs().max() == 0
    changed = copy.deepcopy(model)
    changed.model.language_model.layers[0].mlp.up_proj.set_weight_bias(
        model.model.language_model.layers[0].mlp.gate_proj.weight(), None
    )
    assert vlm.weights_hash == VLM.wrap(model, llava.processor).weights_hash
    assert vlm.weights_hash != VLM.wrap(changed, llava.processor).weights_hash


def test_a_model_without_weights_is_refused(llava, batch):
    with torch.device("meta"):
        model = type(llava.model)(llava.model.config).eval()
    vlm = VLM.wrap(model, llava.processor)
    with llava.trace(*SITES), pytest.raises((InputError, UnsupportedError), match="no weights"):
        vlm.forward(batch)
