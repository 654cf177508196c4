"""SubnetMask against copies of models whose weights were multiplied by the masks, in the real classes of several families."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import close, encode
from tiny_models import BUILDERS
from tiny_models.common import random_image

from interventions import SubnetMask
from probes.wanda import Matrix, matrices, save_masks, weight_of
from slitlamp.errors import InputError, UnknownNameError, UnsupportedError
from slitlamp.models import Batch
from slitlamp.vlm import VLM

# gated, with a norm after each part, attention and MLP side by side, biases and no gate, norms of queries and keys, experts
FAMILIES = ["llava", "gemma3", "paligemma gemma2", "aya_vision", "blip-2", "qwen3_vl", "llama4"]


def random_masks(vlm: VLM, share: float = 0.6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        one.key: torch.rand(weight_of(vlm.model, one).shape, generator=generator) < share
        for one in matrices(vlm.anatomy)
    }


def pruned(vlm: VLM, masks: dict[str, torch.Tensor]) -> VLM:
    """A copy of the model with weights multiplied by masks."""
    model = copy.deepcopy(vlm.model)
    with torch.no_grad():
        for one in matrices(vlm.anatomy):
            if one.key in masks:
                model.get_submodule(one.path).weight.mul_(masks[one.key])  # type: ignore[operator, union-attr]
    return VLM.wrap(model, vlm.processor)


@pytest.fixture(scope="module")
def batch(llava: VLM, image: Any) -> Batch:
    return llava.encode(
        images=[image(0), image(1)], prompts=["<image> is there a dog ?", "<image> what is in the image ?"]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_by_edits_equals_masked_weights(family: str, tmp_path: Path) -> None:
    vlm = BUILDERS[family]()
    one, other = (encode(vlm, [[random_image(0)], [random_image(1, 30, 9)]]) for _ in range(2))
    masks = random_masks(vlm)
    path = save_masks(tmp_path / "masks.safetensors", masks)
    by_hand = pruned(vlm, masks)
    before = vlm.forward(one).logits
    method = SubnetMask(masks=str(path))
    with vlm.apply(method):
        found = vlm.forward(one).logits
        tokens = vlm.generate(other, max_new_tokens=5).tokens
    real = one.real_mask
    close(found[real], by_hand.forward(one).logits[real], 5e-5)
    assert tokens == by_hand.generate(other, max_new_tokens=5).tokens
    assert (found - before)[real].abs().max() > 1e-2
    assert method.kept_ == pytest.approx(
        sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    )


@pytest.mark.parametrize("name", ["q", "k", "v", "o", "gate", "up", "down"])
def test_each_type_alone(llava: VLM, batch: Batch, tmp_path: Path, name: str) -> None:
    masks = {key: mask for key, mask in random_masks(llava, 0.3).items() if key in (f"0.{name}", f"2.{name}")}
    path = save_masks(tmp_path / "masks.safetensors", masks)
    with llava.apply(SubnetMask(masks=str(path))):
        found = llava.forward(batch).logits
    assert torch.allclose(found, pruned(llava, masks).forward(batch).logits, atol=1e-4)
    with llava.apply(SubnetMask(masks=str(path), layers=[2])):
        found = llava.forward(batch).logits
    masks = {f"2.{name}": masks[f"2.{name}"]}
    assert torch.allclose(found, pruned(llava, masks).forward(batch).logits, atol=1e-4)


def by_rows_own_prompt(vlm: VLM, batch: Batch, sparsity: float, kinds: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Wanda from the inputs of the linear modules themselves (no site), sorted row by row; batch of one."""
    inputs: dict[str, torch.Tensor] = {}
    handles = []
    chosen = matrices(vlm.anatomy)

    def keep(one: Matrix) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            inputs[one.key] = args[0].detach()[0]

        return hook

    for one in chosen:
        handles.append(vlm.model.get_submodule(one.path).register_forward_pre_hook(keep(one)))
    vlm.forward(batch)
    for handle in handles:
        handle.remove()
    masks = {}
    for one in chosen:
        weight = weight_of(vlm.model, one)
        both = torch.ones_like(weight, dtype=torch.bool)
        for kind in kinds:
            norm = inputs[one.key][kind[0]].square().sum(dim=0).sqrt()
            for row in range(len(weight)):
                score = weight[row].abs() * norm
                both[row, score.argsort()[: int(sparsity * len(norm) + 1e-9)]] = False
        masks[one.key] = both
    return masks


@pytest.mark.parametrize("tokens", ["image", "text", "both"])
def test_masks_of_the_prompt_by_hand(llava: VLM, batch: Batch, image: Any, tokens: Any) -> None:
    alone = llava.encode(images=[image(0)], prompts=["<image> is there a dog ?"])
    after_image = torch.zeros_like(alone.image_mask)
    after_image[0, int(alone.image_mask[0].nonzero().max()) + 1 :] = True
    kinds = {"image": [alone.image_mask], "text": [after_image], "both": [alone.image_mask, after_image]}[tokens]
    by_hand = pruned(llava, by_rows_own_prompt(llava, alone, 0.5, kinds))
    with llava.apply(SubnetMask(sparsity=0.5, tokens=tokens)):
        together = llava.forward(batch).logits[0]
    assert torch.allclose(together[batch.real_mask[0]], by_hand.forward(alone).logits[0], atol=1e-4)


@pytest.mark.parametrize("tokens", ["image", "both"])
def test_controls_keep_as_many_weights(llava: VLM, batch: Batch, tokens: Any) -> None:
    method = SubnetMask(sparsity=0.5, tokens=tokens)
    kept = {}
    for name, one in {"wanda": method, **method.controls()}.items():
        with llava.apply(one):
            llava.forward(batch)
        kept[name] = one.kept_  # type: ignore[attr-defined]
    assert kept["wanda"] == kept["magnitude"] == kept["random"]
    if tokens == "image":
        assert kept["wanda"] == 0.5
    else:
        assert kept["wanda"] < 0.5


def test_the_magnitude_control_by_hand(llava: VLM, batch: Batch, tmp_path: Path) -> None:
    given = random_masks(llava)
    path = save_masks(tmp_path / "masks.safetensors", given)
    expected = {}
    for one in matrices(llava.anatomy):
        weight, mask = weight_of(llava.model, one).abs(), torch.zeros_like(given[one.key])
        for row in range(len(weight)):
            mask[row, weight[row].argsort(descending=True)[: int(given[one.key][row].sum())]] = True
        expected[one.key] = mask
    with llava.apply(SubnetMask(masks=str(path), rule="magnitude")):
        found = llava.forward(batch).logits
    assert torch.allclose(found, pruned(llava, expected).forward(batch).logits, atol=1e-4)


def test_random_masks_differ_by_seed_only(llava: VLM, batch: Batch) -> None:
    logits = []
    for seed in (0, 0, 1):
        with llava.apply(SubnetMask(rule="random", seed=seed)):
            logits.append(llava.forward(batch).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)


def test_what_cannot_be_masked_is_refused(llava: VLM, batch: Batch, tmp_path: Path) -> None:
    masks = random_masks(llava)
    other = save_masks(tmp_path / "other.safetensors", {"7.q": masks["0.q"]})
    with pytest.raises(InputError, match=r"7\.q"), llava.apply(SubnetMask(masks=str(other))):
        pass
    wrong = save_masks(tmp_path / "wrong.safetensors", {"0.q": masks["0.q"][:, :-1]})
    with pytest.raises(InputError, match="another model"), llava.apply(SubnetMask(masks=str(wrong))):
        llava.forward(batch)
    sparse = save_masks(tmp_path / "sparse.safetensors", masks, sparsity="0.3")
    with (
        pytest.raises(InputError, match=r"made at sparsity 0\.3, found sparsity=0\.5"),
        llava.apply(SubnetMask(sparse)),
    ):
        pass
    SubnetMask(sparse, sparsity=0.3).check(llava.anatomy)
    with pytest.raises(InputError, match="no file of masks"), llava.apply(SubnetMask(masks="nowhere.safetensors")):
        pass
    with pytest.raises(UnknownNameError, match="magnitude"), llava.apply(SubnetMask(rule="magnitudes")):  # type: ignore[arg-type]
        pass
    with pytest.raises(InputError, match="sparsity"), llava.apply(SubnetMask(sparsity=1.0)):
        pass
    with pytest.raises(UnsupportedError, match="cross-attention"):
        SubnetMask().check(BUILDERS["mllama"]().anatomy)
    textual = llava.encode(prompts=["is there a dog ?"], ids=["textual"])
    with pytest.raises(InputError, match="textual"), llava.apply(SubnetMask()):
        llava.forward(textual)


def test_quantised_weights_are_refused_by_name(llava: VLM, batch: Batch) -> None:
    quantised = copy.deepcopy(llava.model)
    module = quantised.get_submodule("model.language_model.layers.1.mlp.up_proj")
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)  # type: ignore[operator, union-attr]
    vlm = VLM.wrap(quantised, llava.processor)
    up = next(one for one in matrices(vlm.anatomy) if one.key == "1.up")
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.up_proj.*int8"):
        weight_of(vlm.model, up)


def test_describe_says_what_counts() -> None:
    assert SubnetMask().describe() == (
        "only the weights that both image and text tokens of the prompt activate (sparsity 0.5)"
    )
    assert "largest" in SubnetMask(rule="magnitude").describe()
    assert "alpha.safetensors" in SubnetMask(masks="alpha.safetensors", rule="random", seed=3).describe()
    assert "seed=3" in SubnetMask(masks="alpha.safetensors", rule="random", seed=3).describe()
