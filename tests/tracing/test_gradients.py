"""Gradients with respect to recorded sites, compared with finite differences made by edits and with autograd on a copy."""

import copy

import pytest
import torch
from edits import Edits
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from slitlamp.errors import InputError
from slitlamp.tracing import Edit, sites
from slitlamp.vlm import VLM

TOKEN = 7
PROMPTS = ["<image> what ?", "<image> is there a dog in the image ?"]
STATES = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "ln1",
    "ln2",
    "q",
    "k",
    "v",
    "z",
    "mlp_pre",
    "mlp_post",
)


def score(output):
    return output.logits[:, -1, TOKEN]


@pytest.fixture(scope="module")
def setting(llava, image):
    """A model in double precision throughout, so that finite differences are good to many figures, and a padded batch."""
    model = copy.deepcopy(llava.model).double()
    for path, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):  # which goes through float32
            norm = torch.nn.RMSNorm(len(module.weight), eps=module.variance_epsilon, dtype=torch.float64)
            norm.load_state_dict(module.state_dict())
            model.set_submodule(path, norm)
    vlm = VLM.wrap(model, llava.processor)
    return vlm, vlm.encode([image(0), image(1)], PROMPTS)


@pytest.mark.parametrize("name", [*STATES, "vision_resid_post", "projector_out", "vision_z"])
def test_the_gradient_is_the_slope_of_the_score(name, setting):
    """Moving the values of a site by epsilon along a direction changes the score by epsilon times <gradient, direction>."""
    vlm, batch = setting
    layer = 0 if name == "projector_out" else 1
    site = sites.projector_out() if name == "projector_out" else getattr(sites, name)(layers=layer)
    with vlm.trace(site, gradient_of=score) as trace:
        vlm.forward(batch)
    gradient, valid = trace.gradients[name][layer], trace.gradients.mask(name)
    assert gradient.shape == trace[name][layer].shape
    assert gradient[valid].abs().max() > 0
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
    epsilon = 1e-5

    def moved(by):
        def change(values, calls):
            if site.is_vision:
                return values + by * direction
            step = torch.zeros_like(values)
            step[calls.batch.real_mask] = by * direction[valid]
            return values + step

        # the stream in the middle of a block moves with what attention adds to it
        with vlm.apply(Edits([Edit("attn_out" if name == "resid_mid" else name, layer, change)])):
            return score(vlm.forward(batch)).sum()

    slope = (moved(epsilon) - moved(-epsilon)) / (2 * epsilon)
    chosen = valid if not site.is_vision else torch.ones(gradient.shape[:2], dtype=torch.bool)
    torch.testing.assert_close((gradient * direction)[chosen].sum(), slope, rtol=1e-6, atol=1e-9)


def test_positions_and_reductions_choose_gradients_as_they_choose_values(setting):
    vlm, batch = setting
    asked = [
        sites.resid_post(layers=0),
        sites.resid_post(layers=0, positions="image", label="image"),
        sites.resid_post(layers=0, positions="image", reduce="sum", label="sum"),
    ]
    with vlm.trace(*asked, gradient_of=score) as trace:
        vlm.forward(batch)
    whole = torch.zeros(batch.size, batch.length, 32, dtype=torch.float64)
    whole[batch.real_mask] = trace.gradients["resid_post"][0][trace.mask("resid_post")]
    image = whole[batch.image_mask].view(2, 16, 32)
    torch.testing.assert_close(trace.gradients["image"][0], image)
    torch.testing.assert_close(trace.gradients["sum"][0], image.sum(dim=1))


def test_a_row_alone_has_the_gradient_it_has_in_a_batch(setting, image):
    vlm, batch = setting
    with vlm.trace(sites.resid_post(layers=0, positions="image"), gradient_of=score) as many:
        vlm.forward(batch)
    with vlm.trace(sites.resid_post(layers=0, positions="image"), gradient_of=score) as one:
        vlm.forward(vlm.encode([image(0)], ["<image> what ?"]))
    torch.testing.assert_close(
        many.gradients["resid_post"][0][:1], one.gradients["resid_post"][0], rtol=1e-9, atol=1e-12
    )


def test_logits_give_the_scores_own_derivative(setting):
    vlm, batch = setting
    with vlm.trace(sites.logits(), gradient_of=score) as trace:
        vlm.forward(batch)
    wanted = torch.zeros(2, 1, vlm.anatomy.d_vocab, dtype=torch.float64)
    wanted[..., TOKEN] = 1
    assert torch.equal(trace.gradients["logits"][0], wanted)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_by_attention_are_those_of_autograd_through_the_whole_matrix(attention, setting, image):
    """Without padding, at which eager attention gives NaN in double precision; its softmax is in float32: tolerance 1e-5."""
    vlm, _ = setting
    batch = vlm.encode([image(1)], PROMPTS[1:])
    eager = copy.deepcopy(vlm.model)
    eager.set_attn_implementation("eager")
    output = eager(**batch.inputs(), output_attentions=True)
    wanted = torch.autograd.grad(score(output).sum(), output.attentions)
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation(attention)
    one = VLM.wrap(model, vlm.processor)
    with one.trace(
        sites.attention(queries="text", keys="image", layers=[0, 2]),
        sites.attention(queries="all", keys="image", heads=[3, 0], reduce_keys="sum", label="sum"),
        sites.vision_attention(),
        gradient_of=score,
    ) as trace:
        one.forward(batch)
    text, seen = batch.text_mask[0], batch.image_mask[0]

    def close(found, wanted):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))

    for layer in (0, 2):
        close(trace.gradients["attention"][layer], wanted[layer][:, :, text][..., seen])
    close(trace.gradients["sum"][1], wanted[1][:, [3, 0]][..., seen].sum(dim=-1))
    assert trace.gradients["vision_attention"][0].shape == trace["vision_attention"][0].shape
    assert trace.gradients["vision_attention"][0].abs().max() > 0


def test_padding_does_not_change_gradients_by_attention(setting, image):
    vlm, batch = setting
    with vlm.trace(sites.attention(), gradient_of=score) as many:
        vlm.forward(batch)
    with vlm.trace(sites.attention(), gradient_of=score) as one:
        vlm.forward(vlm.encode([image(0)], PROMPTS[:1]))
    for layer, found in one.gradients["attention"].items():
        torch.testing.assert_close(many.gradients["attention"][layer][:1], found, rtol=1e-5, atol=1e-6)


def test_frozen_weights_give_the_same_gradients(setting):
    vlm, batch = setting
    asked = [sites.resid_post(layers=1), sites.vision_resid_post(layers=0), sites.resid_pre(layers=0)]
    with vlm.trace(*asked, gradient_of=score) as trace:
        vlm.forward(batch)
    frozen = copy.deepcopy(vlm.model).requires_grad_(False)
    other = VLM.wrap(frozen, vlm.processor)
    with other.trace(*asked, gradient_of=score) as found:
        other.forward(batch)
    for label in ("resid_post", "vision_resid_post", "resid_pre"):
        layer = trace[label].layers[0]
        torch.testing.assert_close(found.gradients[label][layer], trace.gradients[label][layer], rtol=1e-9, atol=1e-15)
    assert not any(one.requires_grad for one in frozen.parameters())


def test_nothing_is_left_behind(setting):
    vlm, batch = setting
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in vlm.model.modules()]
    with vlm.trace(sites.resid_post(), gradient_of=score):
        vlm.forward(batch)
    assert all(one.grad is None for one in vlm.model.parameters())
    assert [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in vlm.model.modules()] == hooks
    assert not batch.extra["pixel_values"].requires_grad
    assert not vlm.forward(batch).logits.requires_grad


def test_two_traces_differentiate_two_scores(setting):
    vlm, batch = setting
    with (
        vlm.trace(sites.resid_post(layers=0), gradient_of=score) as one,
        vlm.trace(sites.resid_post(layers=0), gradient_of=lambda out: 3 * score(out)) as three,
    ):
        vlm.forward(batch)
    torch.testing.assert_close(three.gradients["resid_post"][0], 3 * one.gradients["resid_post"][0])


def test_what_cannot_be_differentiated_is_refused(setting):
    vlm, batch = setting
    with vlm.trace(sites.resid_post(), gradient_of=lambda out: 3.0), pytest.raises(InputError, match="it gave float"):
        vlm.forward(batch)
    with vlm.trace(sites.resid_post(), gradient_of=lambda out: out.logits.detach()), pytest.raises(InputError):
        vlm.forward(batch)
    with vlm.trace(sites.resid_post(), gradient_of=score), pytest.raises(InputError, match="teacher_forced"):
        vlm.generate(batch, max_new_tokens=2)
