"""VHR against the paper's algorithm done step by step by hand on the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from interventions import HeadReinforcement
from probes.vision_heads import choose_heads, head_divergence, text_activation, zero_surging_heads
from slitlamp.errors import InputError, UnknownNameError
from slitlamp.models import Batch
from slitlamp.tracing import sites
from slitlamp.vlm import VLM


@pytest.fixture(scope="module")
def batch(llava: VLM, image: Any) -> Batch:
    return llava.encode(images=[image(3)], prompts=["<image> is there a dog ?"])


def scaled(vlm: VLM, layer: int, heads: list[int], alpha: float) -> VLM:
    """A copy of the model with the output-projection columns of some heads multiplied, which is what scaling z means."""
    model = copy.deepcopy(vlm.model)
    weight = model.model.language_model.layers[layer].self_attn.o_proj.weight
    d_head = vlm.anatomy.d_head
    with torch.no_grad():
        for head in heads:
            weight[:, head * d_head : (head + 1) * d_head] *= alpha
    return VLM.wrap(model, vlm.processor)


def last_z(vlm: VLM, batch: Batch, layer: int) -> torch.Tensor:
    with vlm.trace(sites.z(layers=[layer], positions="last")) as trace:
        vlm.forward(batch)
    return trace["z"][layer][:, 0]


@pytest.mark.parametrize(("outlier_rule", "both"), [(True, False), (False, False), (False, True)])
def test_layer_by_layer_with_the_layers_below_reinforced(
    llava: VLM, batch: Batch, outlier_rule: bool, both: bool
) -> None:
    """Algorithm 1 on copies of the model: measure a layer, scale its weights, go on to the next; `both`: in both runs.

    A factor of 6, at which this small model chooses other heads where the image-free run is reinforced too.
    """
    reinforced, free = llava, batch.without_images()
    expected = {}
    for layer in range(3):
        without = last_z(reinforced if both else llava, free, layer)
        vhd = head_divergence(last_z(reinforced, batch, layer), without)
        if outlier_rule:
            vhd = zero_surging_heads(vhd, text_activation(without))
        heads = choose_heads(vhd, "divergent")
        expected[layer] = heads
        reinforced = scaled(reinforced, layer, heads[0].nonzero().flatten().tolist(), 6.0)
    method = HeadReinforcement(alpha=6.0, layers=[0, 1, 2], outlier_rule=outlier_rule, reinforce_image_free=both)
    with llava.apply(method):
        logits = llava.forward(batch).logits
        generation = llava.generate(batch, max_new_tokens=6)
    assert {layer: heads.tolist() for layer, heads in method.chosen_.items()} == {
        layer: heads.tolist() for layer, heads in expected.items()
    }
    assert torch.allclose(logits, reinforced.forward(batch).logits, atol=1e-4)
    assert generation.tokens == reinforced.generate(batch, max_new_tokens=6).tokens


def test_a_continuation_does_not_change_the_heads(llava: VLM, batch: Batch) -> None:
    """Heads are chosen at the last prompt position, also where the answer is given with the prompt."""
    method = HeadReinforcement(layers=[0, 1, 2])
    with llava.apply(method):
        llava.forward(batch)
        chosen = {layer: heads.tolist() for layer, heads in method.chosen_.items()}
        llava.forward(batch.with_continuation([[6, 7, 8, 9]]))
    assert {layer: heads.tolist() for layer, heads in method.chosen_.items()} == chosen


def test_fixed_heads_equal_scaled_weights(llava: VLM, batch: Batch) -> None:
    by_hand = scaled(scaled(llava, 0, [1], 0.0), 2, [0, 3], 0.0)
    with llava.apply(HeadReinforcement(alpha=0.0, heads=[(0, 1), (2, 0), (2, 3)])):
        assert torch.allclose(llava.forward(batch).logits, by_hand.forward(batch).logits, atol=1e-5)


def test_scaling_only_the_last_prompt_position_leaves_the_others(llava: VLM, batch: Batch) -> None:
    with llava.trace(sites.resid_post(layers=[2])) as before:
        llava.forward(batch)
    method = HeadReinforcement(alpha=3.0, layers=[0, 1, 2], prefill="last")
    with llava.apply(method), llava.trace(sites.resid_post(layers=[2])) as after:
        llava.forward(batch)
    change = (after["resid_post"][2] - before["resid_post"][2]).abs().amax(dim=-1)[0]
    assert change[:-1].max() == 0
    assert change[-1] > 1e-2


def test_two_reinforcements_multiply(llava: VLM, batch: Batch) -> None:
    with llava.apply(HeadReinforcement(alpha=2.0, heads=[(1, 1)]), HeadReinforcement(alpha=3.0, heads=[(1, 1)])):
        twice = llava.forward(batch).logits
    with llava.apply(HeadReinforcement(alpha=6.0, heads=[(1, 1)])):
        assert torch.allclose(llava.forward(batch).logits, twice, atol=1e-5)


def test_heads_of_a_file_are_those_named_in_it(llava: VLM, batch: Batch, tmp_path: Path) -> None:
    marked = torch.zeros(llava.anatomy.n_layers, llava.anatomy.n_heads)
    marked[1, 1] = marked[2, 0] = 1
    save_file({"heads": marked}, tmp_path / "heads.safetensors")
    with llava.apply(HeadReinforcement(alpha=6.0, heads=[(1, 1), (2, 0)])):
        named = llava.forward(batch).logits
    with llava.apply(HeadReinforcement(alpha=6.0, heads=tmp_path / "heads.safetensors")):
        assert torch.equal(llava.forward(batch).logits, named)


def test_heads_of_a_file_of_another_model_are_refused(llava: VLM, tmp_path: Path) -> None:
    save_file({"heads": torch.ones(llava.anatomy.n_layers + 1, llava.anatomy.n_heads)}, tmp_path / "heads.safetensors")
    with pytest.raises(InputError, match="of another model"):
        HeadReinforcement(heads=tmp_path / "heads.safetensors").check(llava.anatomy)


def test_the_control_of_fixed_heads_is_as_many_random_ones_of_the_same_layers(llava: VLM, batch: Batch) -> None:
    method = HeadReinforcement(heads=[(0, 0), (0, 1), (2, 0)], seed=1)
    assert list(method.controls()) == ["random"]
    drawn = set()
    for seed in range(8):
        control = HeadReinforcement(heads=method.heads, select="random", seed=seed)
        with llava.apply(control):
            llava.forward(batch)
        assert {layer: int(heads.sum()) for layer, heads in control.chosen_.items()} == {0: 2, 2: 1}
        drawn.add(tuple(control.chosen_[0][0].tolist()))
    assert len(drawn) > 1
    with pytest.raises(InputError, match="fixed heads have no control 'least'"):
        HeadReinforcement(heads=[(0, 0)], select="least").check(llava.anatomy)


def test_negative_layers_count_from_the_end(llava: VLM, batch: Batch) -> None:
    last = llava.anatomy.n_layers - 1
    with llava.apply(HeadReinforcement(alpha=6.0, layers=[0, last])):
        named = llava.forward(batch).logits
    method = HeadReinforcement(alpha=6.0, layers=[0, -1])
    with llava.apply(method):
        assert torch.equal(llava.forward(batch).logits, named)
    assert list(method.chosen_) == [0, last]


def test_controls_keep_the_number_of_heads_and_the_mean_factor() -> None:
    method = HeadReinforcement(alpha=2.0, layers=[1, 2], seed=3)
    controls = method.controls()
    assert {name: (one.select, one.alpha, one.layers) for name, one in controls.items()} == {  # type: ignore[attr-defined]
        "random": ("random", 2.0, [1, 2]),
        "least": ("least", 2.0, [1, 2]),
        "all": ("all", 1.5, [1, 2]),
    }


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"layers": [7]}, "layer 7"),
        ({"layers": [-4]}, "layer -4 is not one of the 3 layers"),
        ({"heads": [(0, 9)]}, "head 9"),
        ({"ddof": 2}, "ddof"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(llava: VLM, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message), llava.apply(HeadReinforcement(**parameters)):
        pass


@pytest.mark.parametrize("parameters", [{"select": "divergant"}, {"contrast": "delete"}, {"prefill": "first"}])
def test_unknown_options_name_the_known(llava: VLM, parameters: dict[str, Any]) -> None:
    with pytest.raises(UnknownNameError), llava.apply(HeadReinforcement(**parameters)):
        pass


def test_text_only_rows_are_refused(llava: VLM) -> None:
    with pytest.raises(InputError, match="needs an image"), llava.apply(HeadReinforcement()):
        llava.forward(llava.encode(prompts=["is there a dog ?"]))


def test_a_description_says_what_is_done_and_what_is_not_default() -> None:
    assert HeadReinforcement().describe() == "the half of the heads that react most to the image x 2"
    assert HeadReinforcement(alpha=1.5, select="all", layers=[1]).describe() == "all heads x 1.5 (layers=[1])"
    assert HeadReinforcement(heads="a/one.safetensors").describe() == "the heads of one.safetensors x 2"
    assert (
        HeadReinforcement(heads="a/one.safetensors", select="random").describe()
        == "as many heads, drawn at random, as the heads of one.safetensors x 2"
    )
    assert HeadReinforcement(heads=[(0, 1)]).describe() == "1 fixed heads x 2 (heads=[(0, 1)])"
