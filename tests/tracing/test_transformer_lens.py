"""A trace as TransformerLens's cache, compared with what its own bridge records on a copy of the same model.

Tolerance: 2e-5 times the largest absolute value of the reference tensor (at least 1): the bridge runs eager attention, ours
SDPA, and float32 rounds at 6e-8 relative over three blocks of sums of at most 48 terms.
"""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import BUILDERS, llava
from tiny_models.common import random_image
from torch import nn

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.tracing import sites
from slitlamp.tracing.lens_model import NormParts

# what TransformerLens 4.3 has a bridge for; it has none for the other families, nor for LLaVA's Pixtral tower
BRIDGED = (
    *("llava", "llava siglip", "llava_next", "gemma3", "idefics3", "qwen2_5_vl"),
    *("llava_onevision", "mistral3", "qwen3_vl", "llama4"),
)
STATES = (
    *("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"),
    *("q", "k", "v", "z", "mlp_pre", "mlp_post", "ln1", "ln2"),
)


def close(found, wanted, tolerance=2e-5):
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * scale)


def build(name):
    """A tiny model whose norms have weights of their own, so that leaving one out shows."""
    vlm = BUILDERS[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, weight in vlm.model.named_parameters():
            if "norm" in path and weight.ndim == 1:
                weight += torch.randn(weight.shape, generator=generator) * 0.3
    return vlm


def make_batch(vlm):
    """Two rows of different length, each with an image."""
    given = vlm.processor.image_token if vlm.anatomy.family.placeholder else ""  # else the processor puts it itself
    return vlm.encode(
        [random_image(0), random_image(1)], [f"{given} describe this .", f"{given} is there a dog in the image ?"]
    )


def record(vlm, batch, *more):
    states = [getattr(sites, name)() for name in STATES if vlm.anatomy.layers(name)]
    with vlm.trace(*states, sites.attention("all", "all"), *more) as trace:
        output = vlm.forward(batch)
    return trace, output.logits


@pytest.fixture(scope="module", name="setting")
def setting_fixture():
    """A function: name of a tiny model -> (VLM, batch, trace of everything, logits), made once."""
    made = {}

    def make(name):
        if name not in made:
            vlm = build(name)
            batch = make_batch(vlm)
            made[name] = (vlm, batch, *record(vlm, batch))
        return made[name]

    return make


def bridge_of(vlm, monkeypatch):
    """TransformerLens's bridge of a copy: it changes the model that it is given."""
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    # those of Qwen-VL ask for torchvision, for a processor that is not used here
    monkeypatch.setattr(ArchitectureAdapter, "_check_required_libraries", lambda self: None)
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation("eager")
    name = type(model).__name__
    return build_bridge_from_module(model, name, hf_config=copy.deepcopy(model.config), model_name="tiny")


def rows_of(tensor, name, real):
    """The real positions of a cache entry, which for patterns are along the query axis."""
    return tensor.transpose(1, 2)[real] if name.endswith("hook_pattern") else tensor[real]


@pytest.mark.parametrize("name", BRIDGED)
def test_every_entry_is_what_the_bridge_caches(name, setting, monkeypatch):
    vlm, batch, trace, logits = setting(name)
    bridge = bridge_of(vlm, monkeypatch)
    inputs = batch.inputs()
    with torch.no_grad():
        bridged, theirs = bridge.run_with_cache(inputs.pop("input_ids"), **inputs)
    ours, real = trace.to_activation_cache(), batch.real_mask
    close(bridged[real], logits[real])  # the bridge itself is right: its logits are the model's
    recorded = sum(len(vlm.anatomy.layers(name)) for name in (*STATES, "attention"))
    # besides, two scales per block; the stream's start, and the last norm's scale
    assert len(ours) == recorded + 2 * vlm.anatomy.n_layers + 2
    for entry, values in ours.items():
        if entry != "hook_embed":
            assert values.shape == theirs[entry].shape, entry
            close(rows_of(values, entry, real), rows_of(theirs[entry], entry, real))
    # TransformerLens's is the embedding of the placeholder at image tokens; ours is what enters the first block
    close(ours["hook_embed"][batch.text_mask], theirs["hook_embed"][batch.text_mask])
    assert (ours["hook_embed"] - theirs["hook_embed"])[batch.image_mask].abs().max() > 0.1
    theirs_summed = theirs.decompose_resid().sum(dim=0)
    assert (theirs_summed - theirs["resid_post", -1])[batch.image_mask].abs().max() > 0.1
    summed = real & ~batch.image_mask if vlm.anatomy.deepstack_layers else real  # DeepStack adds at image tokens
    close(ours.decompose_resid().sum(dim=0)[summed], theirs["resid_post", -1][summed])


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_logit_lens_ends_in_the_logits(name, setting):
    vlm, batch, trace, logits = setting(name)
    lens = trace.to_activation_cache().logit_lens(positions=None)
    assert lens.labels == [*(f"{layer}_pre" for layer in range(vlm.anatomy.n_layers)), "final_post"]
    close(lens.values[-1][batch.real_mask], logits[batch.real_mask])
    assert (lens.values[-2] - logits)[batch.real_mask].abs().max() > 0.1


@pytest.mark.parametrize("name", sorted(set(BUILDERS) - {"mllama"}))  # some of its layers have no mlp_out
def test_direct_logit_attribution_sums_to_the_logit_difference(name, setting):
    vlm, batch, trace, logits = setting(name)
    cache = trace.to_activation_cache()
    parts, labels = cache.decompose_resid(pos_slice=-1, return_labels=True)
    assert labels[0] == "embed"
    assert len(labels) == 1 + 2 * vlm.anatomy.n_layers
    attributed = cache.logit_attrs(parts, tokens=7, incorrect_tokens=9, pos_slice=-1)
    assert attributed.shape == (len(labels), batch.size)
    cap = vlm.anatomy.logit_softcap
    if cap is not None:  # what is attributed is the logits before soft-capping
        logits = cap * torch.atanh(logits / cap)
    bias = cache.model.b_U  # of the head and of a final LayerNorm (OPT's, in BLIP-2): no part's contribution
    assert bool(bias.any()) is (name == "blip-2")
    close(attributed.sum(dim=0) + bias[7] - bias[9], logits[:, -1, 7] - logits[:, -1, 9])
    assert (attributed[1:].sum(dim=0) - attributed.sum(dim=0)).abs().max() > 0.01  # the input has its share


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2_5_vl", "blip-2"])
def test_heads_and_neurons_add_up(name, setting):
    vlm, batch, trace, _ = setting(name)
    cache, real = trace.to_activation_cache(), batch.real_mask
    heads, labels = cache.stack_head_results(1, return_labels=True)
    assert labels == [f"L0H{head}" for head in range(vlm.anatomy.n_heads)]
    bias = vlm.model.get_submodule(vlm.anatomy.out_proj(0)).bias
    close(heads.sum(dim=0)[real] + (0 if bias is None else bias), cache["attn_out", 0][real])
    last = cache["resid_post", -1][real]
    close(cache.get_full_resid_decomposition().sum(dim=0)[real], last)
    close(cache.get_full_resid_decomposition(expand_neurons=False).sum(dim=0)[real], last)


def test_biases_are_a_part_of_their_own():
    """A LLaVA on a Llama with biases, in whose decomposition the bias is not 0."""
    vlm = llava.build_llava(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for path, weight in vlm.model.model.language_model.named_parameters():
            if path.endswith("bias"):
                weight.fill_(0.1)
    batch = make_batch(vlm)
    cache = record(vlm, batch)[0].to_activation_cache()
    full, labels = cache.get_full_resid_decomposition(return_labels=True)
    close(full[labels.index("bias")], torch.full_like(full[0], 0.1 * 2 * vlm.anatomy.n_layers))
    close(full.sum(dim=0)[batch.real_mask], cache["resid_post", -1][batch.real_mask])
    assert torch.allclose(
        cache.model.accumulated_bias(1, mlp_input=True), torch.tensor(0.3)
    )  # attention, MLP, attention


def test_heads_behind_a_norm_have_no_contribution(setting):
    cache = setting("gemma3")[2].to_activation_cache()
    with pytest.raises(UnsupportedError, match=r"layer 0 of this Gemma 3.*decompose by attn_out and mlp_out"):
        cache.stack_head_results()
    with pytest.raises(UnsupportedError, match="neurons have no contribution"):
        cache.stack_neuron_results(1)


def test_the_last_position_alone(setting):
    vlm, batch, trace, logits = setting("llava")
    names = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z")
    with vlm.trace(
        *(getattr(sites, name)(positions="last") for name in names), sites.attention("last", "all")
    ) as at_last:
        vlm.forward(batch, logits_to_keep=1)
    whole, last = trace.to_activation_cache(), at_last.to_activation_cache()
    for entry, values in last.items():
        pattern = entry.endswith("hook_pattern")
        close(values, whole[entry][:, :, -1:] if pattern else whole[entry][:, -1:])
        assert values.shape[2 if pattern else 1] == 1
    attributed = last.logit_attrs(last.decompose_resid(pos_slice=-1), 7, 9, pos_slice=-1)
    close(attributed.sum(dim=0), logits[:, -1, 7] - logits[:, -1, 9])


def test_layers_and_sites_that_were_recorded(setting):
    vlm, batch, trace, _ = setting("llava")
    with vlm.trace(sites.resid_post(layers=[1]), sites.vision_resid_post(), sites.logits("all")) as some:
        vlm.forward(batch)
    cache = some.to_activation_cache()
    assert list(cache) == ["blocks.1.hook_resid_post"]  # the others have no name in TransformerLens
    close(cache["resid_post", 1], trace.to_activation_cache()["resid_post", 1])
    assert list(trace.to_activation_cache(labels=["ln2"]))[-1] == "blocks.2.ln2.hook_out"


def test_padding_is_zero_and_the_trace_keeps_its_values(setting):
    _, batch, trace, _ = setting("llava")
    before = trace["z"][0].clone()
    cache = trace.to_activation_cache()
    assert not batch.real_mask.all()
    assert not cache["z", 0][~batch.real_mask].any()
    assert not cache["pattern", 0].transpose(1, 2)[~batch.real_mask].any()
    assert torch.equal(trace["z"][0], before)


def test_names_both_ways(setting):
    _, _, trace, _ = setting("llava")
    for name in (*STATES, "attention"):
        assert torch.equal(trace[sites.canonical_name(name, 1)], trace[name][1])
    assert sites.canonical_name("ln1", 3) == "blocks.3.ln1.hook_out"


def test_recordings_that_a_cache_cannot_hold(setting):
    vlm, batch, _, _ = setting("llava")
    asked = {
        "image": (sites.resid_post(positions="image", label="image"), "covers other positions"),
        "mean": (sites.resid_post(reduce="mean", label="mean"), "was reduced"),
        "heads": (sites.z(heads=[0], label="heads"), "covers some heads"),
        "keys": (sites.attention("all", "image", label="keys"), "covers some keys"),
        "sum": (sites.attention("all", "all", reduce_keys="sum", label="sum"), "was reduced"),
    }
    whole = sites.resid_post()
    last = sites.z(positions="last")
    with vlm.trace(whole, last, sites.resid_post(label="again"), *(site for site, _ in asked.values())) as trace:
        vlm.forward(batch)
    for label, (_, why) in asked.items():
        with pytest.raises(InputError, match=f"'{label}' {why}.*leave it out with labels"):
            trace.to_activation_cache(labels=[label])
    with pytest.raises(InputError, match="'resid_post' covers all positions and 'z' the last"):
        trace.to_activation_cache(labels=["resid_post", "z"])
    with pytest.raises(InputError, match=r"two recordings give blocks\.0\.hook_resid_post"):
        trace.to_activation_cache(labels=["resid_post", "again"])
    with pytest.raises(InputError, match="unknown recording 'resid_pots'"):
        trace.to_activation_cache(labels=["resid_pots"])


def test_traces_without_a_cache(setting):
    vlm, batch, _, _ = setting("llava")
    with vlm.trace(sites.resid_post()) as empty:
        pass
    with pytest.raises(InputError, match="recorded nothing"):
        empty.to_activation_cache()
    with vlm.trace(sites.resid_post()) as generated:
        generation = vlm.generate(batch, max_new_tokens=2)
    with pytest.raises(InputError, match="teacher_forced"):
        generated.to_activation_cache()
    with vlm.trace(sites.resid_post()) as again:
        vlm.forward(generation.teacher_forced())
    assert again.to_activation_cache()["resid_post", 0].shape[1] == batch.length + 2
    with vlm.trace(sites.vision_resid_post()) as vision:
        vlm.forward(batch)
    with pytest.raises(InputError, match="name for none of these recordings: vision_resid_post"):
        vision.to_activation_cache()
    with pytest.raises(UnsupportedError, match="no name for 'vision_resid_post'"):
        vision.to_activation_cache(labels=["vision_resid_post"])


def test_the_model_of_a_cache(setting):
    vlm, _, trace, _ = setting("llava")
    model = trace.to_activation_cache().model
    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model) == (3, 4, 32)
    assert model.to_single_token("dog") == vlm.tokenizer.convert_tokens_to_ids("dog")
    with pytest.raises(InputError, match="2 tokens, not one"):
        model.to_single_token("dog cat")
    assert torch.equal(model.tokens_to_residual_directions("dog"), model.W_U[:, model.to_single_token("dog")])
    assert model.tokens_to_residual_directions(torch.tensor([[7, 9]])).shape == (1, 2, 32)
    with pytest.raises(UnsupportedError, match=r"vlm\.trace"):
        model.run_with_cache("a")


class Gemma(nn.Module):
    """Its weight is an offset from 1."""

    def __init__(self, width):
        super().__init__()
        self.eps, self.weight = 1e-3, nn.Parameter(torch.linspace(-1, 1, width))

    def forward(self, values):
        return values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + self.eps) * (1 + self.weight)


def test_norms_are_read_off_from_what_they_do():
    layer_norm = nn.LayerNorm(8, eps=1e-3)
    layer_norm.weight.data, layer_norm.bias.data = torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)
    rms_norm = nn.RMSNorm(8, eps=1e-3)
    rms_norm.weight.data = torch.linspace(0.5, 2, 8)
    values = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.3
    for norm, centred, weight in (
        (layer_norm, True, layer_norm.weight),
        (rms_norm, False, rms_norm.weight),
        (Gemma(8), False, torch.linspace(0, 2, 8)),
    ):
        parts = NormParts.of(norm, 8)
        assert parts.centred is centred
        close(parts.weight, weight.detach(), 1e-6)
        close(parts.normalise(values) * parts.weight + parts.bias, norm(values).detach(), 1e-6)
        close(
            values.sub(values.mean(-1, keepdim=True) if centred else 0) / parts.scale(values), parts.normalise(values)
        )
    with pytest.raises(UnsupportedError, match="Tanh is neither an RMSNorm nor a LayerNorm"):
        NormParts.of(nn.Tanh(), 8)
    with pytest.raises(UnsupportedError, match="odd width"):
        NormParts.of(nn.RMSNorm(7), 7)
    with pytest.raises(UnsupportedError, match="not in memory"):
        NormParts.of(nn.RMSNorm(8, device="meta"), 8)


def test_weights_that_cannot_be_read(setting):
    vlm, batch, _, _ = setting("llava")
    cache = record(vlm, batch)[0].to_activation_cache()
    with pytest.raises(UnsupportedError, match=r"self_attn .*cannot be read as a matrix"):
        cache.model.linear(vlm.anatomy.attention(0))


def test_without_transformer_lens(setting, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    with pytest.raises(ImportError, match="pip install transformer-lens"):
        setting("llava")[2].to_activation_cache()


def test_it_is_imported_when_it_is_asked_for():
    code = "import sys, slitlamp.vlm; assert not {'transformer_lens', 'nnsight'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_worked_example_runs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "transformer_lens.md").read_text(encoding="utf-8")
    names = {"__name__": "example"}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "docs/transformer_lens.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "final_post  p(yes)" in printed
    assert "5_mlp_out" in printed


def test_an_extra_pass_has_a_cache_too(setting):
    vlm, batch, trace, _ = setting("llava")
    view = vlm._extra_pass(batch, [sites.resid_post()], [])
    close(view.to_activation_cache()["resid_post", 1], trace.to_activation_cache()["resid_post", 1])
