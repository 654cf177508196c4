"""An edit does downstream exactly what the same change made by hand on the weights of a copy does.

Adding a vector after a linear layer is adding it to the layer's bias; scaling a head's output is scaling its columns of the
output projection. Tolerance 1e-5 of the largest logit: float32 sums in another order.
"""

import copy

import pytest
import torch
from edits import Edits

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.tracing import Edit, sites
from slitlamp.vlm import VLM


def vector(width):
    return torch.linspace(-0.5, 0.5, width)


def add_to_bias(linear, values):
    if linear.bias is None:
        linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
    linear.bias.data += values


def by_hand(vlm, change):
    model = copy.deepcopy(vlm.model)
    change(model)
    return VLM.wrap(model, vlm.processor)


@pytest.fixture
def batch(any_vlm, image):
    return any_vlm.encode([[image(0), image(1, 30, 9)], None], ["is <image> in <image> ?", "what is a dog ?"])


def scale_head(model):
    model.model.language_model.layers[1].self_attn.o_proj.weight.data[:, 16:24] *= 2


def silence_mlp(model):
    model.model.language_model.layers[1].mlp.down_proj.weight.data.zero_()


def double_head(values, calls):
    factors = torch.ones(4)
    factors[2] = 2
    return values * factors[:, None]


def add(values, calls):
    return values + vector(values.shape[-1])


CASES = {
    "z": (Edit("z", 1, double_head), scale_head),
    "mlp_out": (Edit("mlp_out", 1, lambda values, calls: torch.zeros_like(values)), silence_mlp),
    "resid_post": (
        Edit("resid_post", 1, add),
        lambda model: add_to_bias(model.model.language_model.layers[1].mlp.down_proj, vector(32)),
    ),
    "resid_pre": (
        Edit("resid_pre", 2, add),
        lambda model: add_to_bias(model.model.language_model.layers[1].mlp.down_proj, vector(32)),
    ),
    "projector_out": (
        Edit("projector_out", 0, add),
        lambda model: add_to_bias(model.model.multi_modal_projector.linear_2, vector(32)),
    ),
    "vision_resid_post below the feature layer": (
        Edit("vision_resid_post", 0, add),
        lambda model: add_to_bias(vision_layers(model)[0].mlp.fc2, vector(16)),
    ),
    "vision_resid_post at the feature layer": (  # vision_feature_layer is -2: the output of block 1 of 3
        Edit("vision_resid_post", 1, add),
        lambda model: add_to_bias(vision_layers(model)[1].mlp.fc2, vector(16)),
    ),
}


def vision_layers(model):
    return next(module for path, module in model.named_modules() if path.endswith("encoder.layers"))


@pytest.mark.parametrize("case", CASES)
def test_an_edit_equals_the_same_change_of_the_weights(case, any_vlm, batch):
    edit, change = CASES[case]
    changed = by_hand(any_vlm, change)
    wanted = changed.forward(batch).logits
    plain = any_vlm.forward(batch).logits
    with any_vlm.apply(Edits([edit])):
        found = any_vlm.forward(batch).logits
        generated = any_vlm.generate(batch, max_new_tokens=4)
    real = batch.real_mask
    scale = float(wanted[real].abs().max())
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-5 * scale)
    assert (found[0] - plain[0])[real[0]].abs().max() > 1e-3 * scale
    assert generated.tokens == changed.generate(batch, max_new_tokens=4).tokens


def test_edits_above_the_feature_layer_of_the_tower_reach_nothing(any_vlm, batch):
    plain = any_vlm.forward(batch).logits
    with any_vlm.apply(Edits([Edit("vision_resid_post", 2, add)])):
        assert torch.equal(any_vlm.forward(batch).logits, plain)


def test_edits_reach_a_model_that_has_never_run(llava, image):
    """transformers installs the hooks that capture image features at its first call; an edit must come before them."""
    batch = llava.encode([image(0)], ["<image> what ?"])
    edit, change = CASES["vision_resid_post at the feature layer"]
    wanted = by_hand(llava, change).forward(batch).logits
    fresh = type(llava.model)(copy.deepcopy(llava.model.config)).eval()
    fresh.load_state_dict(llava.model.state_dict())
    vlm = VLM.wrap(fresh, llava.processor)
    for _ in range(2):
        with vlm.apply(Edits([edit])):
            found = vlm.forward(batch).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_the_first_residual_is_the_models_input_embeddings(llava, image):
    batch = llava.encode(None, ["what is a dog ?"])
    embeddings = llava.model.get_input_embeddings()(batch.input_ids) + vector(32)
    with torch.no_grad():
        wanted = llava.model(inputs_embeds=embeddings, attention_mask=batch.attention_mask).logits
    with llava.apply(Edits([Edit("resid_pre", 0, add)])):
        torch.testing.assert_close(llava.forward(batch).logits, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "z", "mlp_out", "projector_out", "vision_resid_post"])
def test_edits_act_in_order_and_recordings_show_the_outcome(site, any_vlm, batch):
    layer = 0
    record = getattr(sites, site)
    asked = record() if site == "projector_out" else record(layers=[layer])

    def recorded(*edits):
        with any_vlm.apply(Edits(list(edits))), any_vlm.trace(asked) as trace:
            any_vlm.forward(batch)
        return trace[site][layer][trace.mask(site)]

    plus = Edit(site, layer, lambda values, calls: values + 1)
    times = Edit(site, layer, lambda values, calls: values * 3)
    plain = recorded()
    torch.testing.assert_close(recorded(plus, times), (plain + 1) * 3)
    torch.testing.assert_close(recorded(times, plus), plain * 3 + 1)


def test_an_edit_knows_whether_it_is_in_the_prompt(any_vlm, batch):
    seen = []

    def look(values, calls):
        seen.append((calls.number, calls.is_prefill, values.shape[1]))
        return values

    with any_vlm.apply(Edits([Edit("resid_pre", 0, look)])):
        any_vlm.generate(batch, max_new_tokens=3, eos_token_id=[])
    assert seen == [(0, True, batch.length), (1, False, 1), (2, False, 1)]
    seen.clear()
    with any_vlm.apply(Edits([Edit("projector_out", 0, look)])):
        any_vlm.generate(batch, max_new_tokens=3)
    assert [is_prefill for _, is_prefill, _ in seen] == [True]


def test_edits_that_cannot_be_made_are_refused_before_the_model_runs(llava, image, monkeypatch):
    batch = llava.encode([image(0)], ["<image> what ?"])
    monkeypatch.setattr(llava.model, "forward", lambda *a, **k: pytest.fail("the model ran"))
    for edit, error, match in [
        (Edit("attention", 0, add), UnsupportedError, "'attention' cannot be edited; sites that can: resid_pre"),
        (Edit("z", 3, double_head), InputError, "layer 3 of z, which has layers 0 to 2"),
        (Edit("z", -1, double_head), InputError, "layer -1 of z"),
        (Edit("projector_out", 1, add), InputError, "layers 0 to 0"),
    ]:
        with llava.apply(Edits([edit])), pytest.raises(error, match=match):
            llava.forward(batch)


def test_edits_that_change_shape_or_dtype_are_refused(llava, image):
    batch = llava.encode([image(0)], ["<image> what ?"])
    cut, double = lambda values, calls: values[:, :1], lambda values, calls: values.double()
    match = r"must give torch.float32 \[1, 19, 32\]; it gave torch.float32 \[1, 1, 32\]"
    with llava.apply(Edits([Edit("resid_post", 0, cut)])), pytest.raises(InputError, match=match):
        llava.forward(batch)
    with llava.apply(Edits([Edit("z", 0, double)])), pytest.raises(InputError, match=r"it gave torch\.float64"):
        llava.forward(batch)


def test_the_middle_of_a_block_cannot_be_edited(llava, image):
    """The norm before the MLP reads the residual stream, but the block adds the MLP's output to what it held before."""
    batch = llava.encode([image(0)], ["<image> what ?"])
    edit = Edit("resid_mid", 1, lambda values, calls: values)
    with llava.apply(Edits([edit])), pytest.raises(UnsupportedError, match=r"'resid_mid'.*edit attn_out or resid_pre"):
        llava.forward(batch)


def test_an_edit_of_the_prompt_alone_is_not_called_after_it(any_vlm, batch):
    """What it does to the keys and values of the prompt stays: decoding goes on as after an edit that asks where it is."""
    calls = []

    def doubled(values, seen):
        calls.append(seen.number)
        return 2 * values

    def asks(values, seen):
        return 2 * values if seen.is_prefill else values

    site = sites.logits(positions="last")
    found = []
    for edit in (Edit("z", 1, doubled, prefill_only=True), Edit("z", 1, asks)):
        with any_vlm.apply(Edits([edit])), any_vlm.trace(site) as trace:
            any_vlm.generate(batch, max_new_tokens=4, eos_token_id=[])
        found.append(trace["logits"][0])
    assert calls == [0]
    assert torch.equal(*found)
    with any_vlm.apply(Edits([Edit("z", 1, doubled, prefill_only=True)])):
        any_vlm.forward(batch)
        any_vlm.generate(batch, max_new_tokens=2)
    assert calls == [0] * 3
