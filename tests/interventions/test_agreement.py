"""The same change made by another library gives the same numbers: transformers, TransformerLens, steering-vectors.

steering-vectors asks for transformers below 5, so it is no dependency of the tests: where it is not installed, its tests are
skipped by name. Tolerance: 2e-5 times the largest absolute value of the reference (at least 1): float32 rounds at 6e-8 relative
over a few blocks of sums of some hundred terms, and another library sums in another order.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from interventions import ActivationAddition, HeadAblation, ImageFreeGuidance, ProjectionAblation
from slitlamp.decoding.edits import add_direction
from slitlamp.models import Batch
from slitlamp.vlm import VLM

LAYER, SCALE = 1, 0.4
VECTOR = torch.tensor([(-1.0) ** (i // 3) * (1 + i % 5) for i in range(32)])


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * max(1.0, float(wanted.abs().max())))


@pytest.fixture(scope="module")
def batch(llava: VLM, image: Any) -> Batch:
    """Two rows, one of them padded."""
    return llava.encode(
        images=[image(0), image(1)],
        prompts=["<image> is there a dog ?", "<image> what is in the image and where is it ?"],
    )


# -- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [3.0, 1.5, 0.0])
@pytest.mark.parametrize("model", ["llava", "organism"])
def test_guidance_away_from_no_image_is_that_of_transformers(
    model: str, scale: float, image: Any, request: pytest.FixtureRequest
) -> None:
    """Its negative prompt is the prompt without its image tokens, its mask given (without it padding would be read)."""
    vlm: VLM = request.getfixturevalue(model)
    mark = "<image> " if model == "llava" else ""
    words = ["is there a dog ?", "what is in the image and where is it ?"]
    batch = vlm.encode(images=[image(0), image(1)], prompts=[f"{mark}{one}" for one in words])
    without = batch.without_images()
    with torch.no_grad():
        theirs = vlm.model.generate(  # type: ignore[operator]
            **batch.inputs(),
            guidance_scale=scale,
            negative_prompt_ids=without.input_ids,
            negative_prompt_attention_mask=without.attention_mask,
            max_new_tokens=8,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    with vlm.apply(ImageFreeGuidance(scale, view="deleted", space="log-probs")):
        ours = vlm.generate(batch, max_new_tokens=8)
        logits = vlm.forward(ours.teacher_forced()).logits
    plain = vlm.generate(batch, max_new_tokens=8)
    assert ours.tokens != plain.tokens
    for row, tokens in enumerate(ours.tokens):
        assert list(tokens) == theirs.sequences[row, batch.length :][: len(tokens)].tolist()
        steps = logits[row, -1 - len(tokens) : -1]  # rows end together; the last position's comes after all tokens
        given = torch.stack([one[row] for one in theirs.scores[: len(tokens)]])
        kept = given.isfinite()  # generate also leaves out the tokens that the model's own configuration suppresses
        close(steps[:, kept[0]].log_softmax(dim=-1), given[:, kept[0]].log_softmax(dim=-1))


# -- TransformerLens --------------------------------------------------------------------------------------------------


def test_ablated_heads_are_those_of_transformer_lens(llava: VLM, batch: Batch) -> None:
    """Its bridge of a copy (it changes the model that it is given), with hooks on hook_z."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = copy.deepcopy(llava.model)
    model.set_attn_implementation("eager")
    bridge = build_bridge_from_module(
        model, type(model).__name__, hf_config=copy.deepcopy(model.config), model_name="tiny"
    )
    heads = [(0, 1), (2, 3), (2, 0)]

    def zero(layer: int) -> Any:
        def hook(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            z[:, :, [head for at, head in heads if at == layer]] = 0
            return z

        return hook

    inputs = batch.inputs()
    with torch.no_grad():
        theirs = bridge.run_with_hooks(
            inputs.pop("input_ids"),
            **inputs,
            fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero(layer)) for layer in (0, 2)],
        )
    plain = llava.forward(batch).logits
    with llava.apply(HeadAblation(heads)):
        ours = llava.forward(batch).logits
    real = batch.real_mask
    assert (ours - plain)[real].abs().max() > 0.01
    close(ours[real], theirs[real])


# -- steering-vectors -------------------------------------------------------------------------------------------------


def steered(vlm: VLM, batch: Batch, vector: Tensor, layers: list[int], **options: Any) -> Tensor:
    """Logits of a copy under steering-vectors' hooks on decoder blocks."""
    library = pytest.importorskip("steering_vectors")
    model = copy.deepcopy(vlm.model)
    blocks = {"decoder_block": "model.language_model.layers.{num}"}
    found = library.SteeringVector(dict.fromkeys(layers, vector), "decoder_block")
    with torch.no_grad(), found.apply(model, layer_config=blocks, **options):
        return model(**batch.inputs()).logits


def test_adding_a_direction_is_what_steering_vectors_does(llava: VLM, batch: Batch) -> None:
    """With the length given (the edit that ActivationAddition makes, not relative), and in units of each position's norm."""
    unit = VECTOR / VECTOR.norm()
    real, plain = batch.real_mask, llava.forward(batch).logits

    theirs = steered(llava, batch, unit, [LAYER], multiplier=2.0)
    ours = llava.forward(batch, edits=add_direction(LAYER, VECTOR, 2.0, relative=False)).logits
    assert (ours - plain)[real].abs().max() > 0.01
    close(ours[real], theirs[real])

    def relative(states: Tensor, vector: Tensor) -> Tensor:
        return states.norm(dim=-1, keepdim=True) * vector

    theirs = steered(llava, batch, unit, [LAYER], multiplier=SCALE, operator=relative)
    with llava.apply(ActivationAddition(VECTOR, layer=LAYER, scale=SCALE)):
        ours = llava.forward(batch).logits
    assert (ours - plain)[real].abs().max() > 0.01
    close(ours[real], theirs[real])


def test_taking_a_direction_out_is_what_steering_vectors_does(llava: VLM, batch: Batch) -> None:
    steering_operators = pytest.importorskip("steering_vectors.steering_operators")
    theirs = steered(llava, batch, VECTOR, [0, 1, 2], operator=steering_operators.ablation_operator())
    plain = llava.forward(batch).logits
    with llava.apply(ProjectionAblation(VECTOR)):
        ours = llava.forward(batch).logits
    real = batch.real_mask
    assert (ours - plain)[real].abs().max() > 0.01
    close(ours[real], theirs[real])
