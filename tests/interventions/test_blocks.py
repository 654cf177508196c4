"""Interventions on heads, directions and attention, against the same done by hand in copies of models."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import close, encode, pictures_of
from eager import Eager
from safetensors.torch import save_file
from tiny_models import BUILDERS
from tiny_models.common import random_image

from interventions import (
    ActivationAddition,
    CutAttention,
    HeadAblation,
    ImageAttentionBoost,
    ImageFreeGuidance,
    InformedTokenBoost,
    ProjectionAblation,
)
from interventions.informed_token_boost import informed_tokens
from slitlamp.decoding import Intervention, image_free
from slitlamp.decoding.two_branch import fuse
from slitlamp.errors import InputError, UnknownNameError, UnsupportedError
from slitlamp.experiments.registry import build, describe
from slitlamp.models import Batch
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

# heads on shared keys in all; gated MLPs, a norm after each part, attention and MLP side by side, biases, norms of q and k
FAMILIES = ["llava", "gemma3", "aya_vision", "blip-2", "qwen3_vl"]
HEADS = [(0, 1), (2, 3), (2, 0)]


def under(vlm: VLM, batch: Batch, *methods: Intervention) -> torch.Tensor:
    """Logits at real positions under interventions."""
    with vlm.apply(*methods):
        return vlm.forward(batch).logits[batch.real_mask]


def copied(vlm: VLM) -> Any:
    return copy.deepcopy(vlm.model)


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch.inputs(), use_cache=False).logits[batch.real_mask]


def columns(vlm: VLM, head: int) -> slice:
    return slice(head * vlm.anatomy.d_head, (head + 1) * vlm.anatomy.d_head)


def vector_of(vlm: VLM, seed: int = 3) -> torch.Tensor:
    return torch.randn(vlm.anatomy.d_model, generator=torch.Generator().manual_seed(seed))


# heads


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_at_zero_equal_an_output_projection_without_their_columns(family: str) -> None:
    vlm = BUILDERS[family]()
    batch = encode(vlm, pictures_of(vlm))
    model = copied(vlm)
    with torch.no_grad():
        for layer, head in HEADS:
            model.get_submodule(vlm.anatomy.out_proj(layer)).weight[:, columns(vlm, head)] = 0
    found = under(vlm, batch, HeadAblation(HEADS))
    close(found, logits_of(model, batch))
    assert (found - logits_of(vlm.model, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_at_their_mean_equal_a_constant_behind_the_output_projection(family: str, tmp_path: Path) -> None:
    vlm = BUILDERS[family]()
    batch = encode(vlm, pictures_of(vlm))
    shape = (vlm.anatomy.n_layers, vlm.anatomy.n_heads, vlm.anatomy.d_head)
    means = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    model = copied(vlm)
    for layer, head in HEADS:
        projection = model.get_submodule(vlm.anatomy.out_proj(layer))
        with torch.no_grad():
            constant = projection.weight[:, columns(vlm, head)] @ means[layer, head]
            projection.weight[:, columns(vlm, head)] = 0
        projection.register_forward_hook(lambda module, args, output, constant=constant: output + constant)
    wanted = logits_of(model, batch)
    close(under(vlm, batch, HeadAblation(HEADS, value="mean", means=means)), wanted)
    path = tmp_path / "means.safetensors"
    save_file({"means": means}, path)
    close(under(vlm, batch, HeadAblation(HEADS, value="mean", means=path)), wanted)


def test_means_come_from_a_recording_as_the_docstring_says(llava: VLM) -> None:
    """With the head at the mean of what it gave, the mean of what it gives is the same."""
    batch = encode(llava, pictures_of(llava))
    with llava.trace(sites.z(reduce="mean")) as trace:
        llava.forward(batch)
    means = trace["z"].stack().mean(dim=1)
    method = HeadAblation([(0, 1)], value="mean", means=means)
    with llava.apply(method), llava.trace(sites.z(layers=[0])) as ablated:
        llava.forward(batch)
    given = ablated["z"][0][ablated.mask("z")]
    close(given[:, 1], means[0, 1].expand_as(given[:, 1]))
    with llava.trace(sites.z(layers=[0])) as plain:
        llava.forward(batch)
    assert torch.equal(given[:, [0, 2, 3]], plain["z"][0][plain.mask("z")][:, [0, 2, 3]])
    close(
        means[0],
        torch.stack([plain["z"][0][row][real].mean(dim=0) for row, real in enumerate(plain.mask("z"))]).mean(0),
    )


def test_random_heads_are_others_of_the_same_layers() -> None:
    control = HeadAblation(HEADS).controls()["random"]
    assert isinstance(control, HeadAblation)
    drawn = control.chosen(4)
    assert drawn == control.chosen(4)
    assert [layer for layer, _ in drawn] == [0, 2, 2]
    assert not set(drawn) & set(HEADS)
    several = {tuple(HeadAblation(HEADS, select="random", seed=seed).chosen(8)) for seed in range(20)}
    assert len(several) > 10  # 7 * 15 draws are possible: 20 of them are far from all the same


# directions


@pytest.mark.parametrize("family", FAMILIES)
def test_addition_equals_a_plain_forward_hook(family: str) -> None:
    vlm = BUILDERS[family]()
    batch = encode(vlm, pictures_of(vlm))
    vector, model = vector_of(vlm), copied(vlm)

    def add(module: Any, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        changed = states + 0.3 * states.norm(dim=-1, keepdim=True) * vector / vector.norm()
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    model.get_submodule(vlm.anatomy.blocks[1]).register_forward_hook(add)
    method = ActivationAddition(5 * vector, layer=1, scale=0.3)
    found = under(vlm, batch, method)
    close(found, logits_of(model, batch), 5e-5)
    assert (found - logits_of(vlm.model, batch)).abs().max() > 1e-3


def test_controls_of_addition_are_as_long_and_point_elsewhere(llava: VLM) -> None:
    batch = encode(llava, pictures_of(llava))
    vector = vector_of(llava)
    method = ActivationAddition(vector, layer=1, scale=0.3)
    steps = {}
    with llava.trace(sites.resid_post(layers=[1])) as plain:
        llava.forward(batch)
    for name, one in {"given": method, **method.controls()}.items():
        with llava.apply(one), llava.trace(sites.resid_post(layers=[1])) as trace:
            llava.forward(batch)
        steps[name] = (trace["resid_post"][1] - plain["resid_post"][1])[plain.mask("resid_post")]
    norms = 0.3 * plain["resid_post"][1][plain.mask("resid_post")].norm(dim=-1)
    for step in steps.values():
        close(step.norm(dim=-1), norms)
    close(steps["reversed"], -steps["given"])
    cosines = torch.cosine_similarity(steps["random"], steps["given"], dim=-1)
    assert cosines.abs().max() < 0.9  # of random directions in 32 dimensions the deviation is 0.18
    other = ActivationAddition(vector, layer=1, scale=0.3, direction="random", seed=1)
    assert not torch.allclose(under(llava, batch, other), under(llava, batch, method.controls()["random"]), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_projection_leaves_no_component_after_any_block(family: str) -> None:
    vlm = BUILDERS[family]()
    batch = encode(vlm, pictures_of(vlm))
    vector = vector_of(vlm)
    unit = vector / vector.norm()

    def along(strength: float) -> dict[int, torch.Tensor]:
        method = ProjectionAblation(vector, strength=strength)
        with vlm.apply(method), vlm.trace(sites.resid_post()) as trace:
            vlm.forward(batch)
        return {layer: trace["resid_post"][layer][trace.mask("resid_post")] for layer in trace["resid_post"]}

    plain, half, whole = along(0), along(0.5), along(1)
    for states in whole.values():
        close(states @ unit, torch.zeros(len(states)))
    assert min((states @ unit).abs().max() for states in plain.values()) > 1e-2
    close(half[0], plain[0] - 0.5 * (plain[0] @ unit)[:, None] * unit)
    close(whole[0], plain[0] - (plain[0] @ unit)[:, None] * unit)


def test_vectors_of_a_file_are_those_of_their_layers(llava: VLM, tmp_path: Path) -> None:
    batch = encode(llava, pictures_of(llava))
    two, zero = vector_of(llava, 1), vector_of(llava, 2)
    path = tmp_path / "vectors.safetensors"
    rows = {"logistic": torch.stack([two, zero]), "layer": torch.tensor([2, 0]), "one": zero}
    save_file(rows, path)

    def same(found: Intervention, wanted: Intervention) -> None:
        assert torch.equal(under(llava, batch, found), under(llava, batch, wanted))

    same(ActivationAddition(path, layer=2, key="logistic"), ActivationAddition(two, layer=2))
    same(ActivationAddition(str(path), layer=0, key="logistic"), ActivationAddition(zero, layer=0))
    same(ActivationAddition(path, key="one"), ActivationAddition(zero.tolist(), layer=1))
    same(ProjectionAblation(path, key="one"), ProjectionAblation(zero))
    same(ProjectionAblation(path, [0, 1], key="logistic", vector_layer=2), ProjectionAblation(two, [0, 1]))
    both = ProjectionAblation(path, [0, 2], key="logistic")
    with llava.apply(ProjectionAblation(zero, [0]), ProjectionAblation(two, [2])):
        wanted = llava.forward(batch).logits[batch.real_mask]
    assert torch.equal(under(llava, batch, both), wanted)
    for method, match in (
        (ActivationAddition(path, key="logistic"), r"has no direction of layer 1; it has layers \[2, 0\]"),
        (ProjectionAblation(path, key="logistic"), "has no direction of layer 1"),
        (ActivationAddition(path, key="logistics"), "did you mean 'logistic'"),
    ):
        with pytest.raises(InputError, match=match), llava.apply(method):
            pass


def test_random_directions_are_one_per_vector(llava: VLM, tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    save_file({"rows": torch.stack([vector_of(llava, 1), vector_of(llava, 2)]), "layer": torch.tensor([0, 2])}, path)
    several = ProjectionAblation(path, [0, 2], key="rows", direction="random")._vectors(llava.anatomy)
    one = ProjectionAblation(path, [0, 2], key="rows", vector_layer=0, direction="random")._vectors(llava.anatomy)
    assert not torch.equal(several[0], several[2])
    assert torch.equal(one[0], one[2])


# attention


def weights_under(vlm: VLM, batch: Batch, method: Intervention, **chosen: Any) -> Any:
    with vlm.apply(method), vlm.trace(sites.attention(**chosen)) as trace:
        vlm.forward(batch)
    return trace


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
def test_cut_attention_is_zero_in_traces_there_and_nowhere_else(family: str) -> None:
    vlm = BUILDERS[family]()
    batch = encode(vlm, pictures_of(vlm)).with_continuation([[6, 7], [8, 9], [9, 10]])
    method = CutAttention(layers=[1])
    for queries in ("before_generated", "generated"):
        trace = weights_under(vlm, batch, method, queries=queries, keys="image")
        assert not trace["attention"][1].any()
        assert trace["attention"][0].any()
        assert trace["attention"][2].any()
    others = weights_under(vlm, batch, method, queries="text_after_image", keys="image", layers=[1])
    assert others["attention"][1].any()  # the question may look
    later = weights_under(vlm, batch, CutAttention("generated", layers=[1]), queries="before_generated", keys="image")
    rows = later["attention"][1].sum(dim=(1, 3))  # [batch, query]: the last token of the prompt, a generated one
    assert rows[0, 0] > 0
    assert not rows[:, 1].any()


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_cut_attention_is_zero_step_by_step(family: str) -> None:
    vlm = BUILDERS[family]()
    batch = encode(vlm, pictures_of(vlm))
    options: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": []}
    with vlm.apply(CutAttention(layers=[0, 2])), vlm.trace(sites.attention(queries="last", keys="image")) as trace:
        vlm.generate(batch, **options)
    assert trace["attention"][0].shape[2] == 5  # the prompt's last token and four that were fed back
    assert not trace["attention"][0].any()
    assert not trace["attention"][2].any()
    assert (trace["attention"][1][0].sum(dim=(0, 2)) > 0).all()


def test_random_layers_are_others(llava: VLM) -> None:
    anatomy = llava.anatomy
    drawn = {CutAttention(layers=[1], select="random", seed=seed).chosen(anatomy) for seed in range(20)}
    assert drawn == {(0,), (2,)}
    assert CutAttention().chosen(anatomy) == (1,)
    control = CutAttention(layers=[1]).controls()["random_layers"]
    assert isinstance(control, CutAttention)
    assert control.chosen(anatomy) == control.chosen(anatomy) != (1,)


def boosted_by_hand(alpha: float, layers: list[int], rows: torch.Tensor, keys: torch.Tensor) -> Callable[..., Any]:
    """Eager attention as PAI's text has it: a + alpha |a| at rows [batch, query] and keys [batch, key], then the softmax.

    Keys may also be given as factors.
    """

    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, softcap: Any = None, **rest: Any
    ) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if module.layer_idx in layers:
            scores = scores + alpha * scores.abs() * (rows[:, None, :, None] * keys[:, None, None, :])
        weights = (scores + mask).softmax(dim=-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    return attend


def predicting(batch: Batch) -> torch.Tensor:
    mask = batch.generated_mask.clone()
    mask[torch.arange(batch.size), batch.last_prompt_position] = True
    return mask


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("llava", "sdpa"), ("llava", "eager"), ("gemma3", "sdpa"), ("gemma3", "eager"), ("paligemma gemma2", "eager")],
)  # Gemma 2 soft-caps its scores, which sdpa cannot
@pytest.mark.parametrize("target", ["image", "text"])
def test_boost_equals_eager_attention_with_scores_raised_by_hand(
    family: str, implementation: str, target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = BUILDERS[family]()
    vlm.model.set_attn_implementation(implementation)
    batch = encode(vlm, pictures_of(vlm)).with_continuation([[6, 7], [8], [9, 10]])
    keys = batch.image_mask if target == "image" else batch.text_mask & ~batch.generated_mask
    method = ImageAttentionBoost(0.5, layers=[1, 2], columns=target)
    found = under(vlm, batch, method)
    plain = logits_of(vlm.model, batch)
    trace = weights_under(vlm, batch, method, queries="all", keys="all")

    model = copied(vlm)
    model.set_attn_implementation("eager")
    code = sys.modules[type(model.get_submodule(vlm.anatomy.attention(0))).__module__]
    weights: dict[int, torch.Tensor] = {}
    by_hand = boosted_by_hand(0.5, [1, 2], predicting(batch), keys)

    def kept(module: Any, *args: Any, **options: Any) -> Any:
        output = by_hand(module, *args, **options)
        weights[module.layer_idx] = output[1]
        return output

    monkeypatch.setattr(importlib.import_module(code.__name__), "eager_attention_forward", kept)
    close(found, logits_of(model, batch))
    assert (found - plain).abs().max() > 1e-3
    assert len(weights) == 3
    for layer in (1, 2):
        for row, real in enumerate(batch.real_mask):
            n = int(real.sum())
            close(trace["attention"][layer][row][:, :n, :n], weights[layer][row][:, real][..., real])


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("gemma3", "sdpa"), ("gemma3", "eager"), ("qwen2_5_vl", "sdpa"), ("paligemma gemma2", "eager")],
)
@pytest.mark.parametrize("target", ["image", "text"])
def test_a_boosted_generation_equals_its_recomputation(family: str, implementation: str, target: Any) -> None:
    """Behind Gemma 3's sliding window (8), the keys of a step are the last ones only."""
    vlm = BUILDERS[family]()
    vlm.model.set_attn_implementation(implementation)
    batch = encode(vlm, pictures_of(vlm))
    with vlm.apply(ImageAttentionBoost(1.5, layers=[0, 1, 2], columns=target)):
        with vlm.trace(sites.logits(), sites.attention("generated", "all")) as steps:
            generation = vlm.generate(batch, max_new_tokens=8, eos_token_id=[])
        with vlm.trace(sites.logits("before_generated"), sites.attention("generated", "all")) as once:
            vlm.forward(generation.teacher_forced())
    close(steps["logits"][0], once["logits"][0])
    for layer in range(3):
        decoded = steps["attention"][layer]  # the last token is never fed back
        close(decoded, once["attention"][layer][..., : decoded.shape[-2], : decoded.shape[-1]])


def test_the_boost_gives_the_image_more_attention_and_its_reverse_less(llava: VLM) -> None:
    """|a| raises scores of either sign. By default the first two layers are left as they are."""
    batch = llava.encode([random_image(0)], ["<image> is there a dog ?"])
    method = ImageAttentionBoost(0.5)

    def mass(one: Intervention, layer: int) -> torch.Tensor:
        return weights_under(llava, batch, one, queries="last", keys="image")["attention"][layer].sum(dim=-1)

    nothing = ImageAttentionBoost(0.0)
    assert (mass(method, 2) > mass(nothing, 2)).all()
    assert (mass(method.controls()["reversed"], 2) < mass(nothing, 2)).all()
    assert (mass(method.controls()["text"], 2) < mass(nothing, 2)).all()
    assert torch.equal(mass(method, 1), mass(nothing, 1))


def test_pai_is_the_boost_under_guidance_by_the_image(llava: VLM) -> None:
    """log-probabilities with the image, boosted, against those without it, not boosted; decoding as in one pass."""
    batch = llava.encode([random_image(0), random_image(1)], ["<image> is there a dog ?", "<image> what ?"])
    guidance = ImageFreeGuidance(1.1, view="deleted", space="log-probs")
    boost = ImageAttentionBoost(0.5, layers=[0, 1, 2])
    with llava.apply(boost):
        clean = llava.forward(batch).logits
    without = llava.forward(image_free(batch, "deleted", 0)[0]).logits[:, -1:]
    with llava.apply(boost, guidance):
        found = llava.forward(batch).logits
        generation = llava.generate(batch, max_new_tokens=6, eos_token_id=[])
        again = llava.forward(generation.teacher_forced()).logits[:, -7:-1]
    torch.testing.assert_close(found, fuse(guidance, batch, clean, [without]), rtol=0, atol=2e-5)
    again[..., llava.model.generation_config.suppress_tokens] = -torch.inf
    assert again.argmax(dim=-1).tolist() == [list(tokens) for tokens in generation.tokens]
    assert generation.tokens != llava.generate(batch, max_new_tokens=6, eos_token_id=[]).tokens


def test_informed_tokens_are_those_planted() -> None:
    early, late = torch.arange(16.0), torch.ones(16)
    late[[3, 15]] = 9.0  # quartiles of the others are equal: any more is exceptional
    local, summary = informed_tokens(early, late, 0.25)
    assert summary.nonzero()[:, 0].tolist() == [3, 15]
    assert local.nonzero()[:, 0].tolist() == [12, 13, 14]
    spread = torch.arange(16.0)
    spread[7] = 24.9  # without 7 and with this, Q1 is 3.75 and Q3 12.25: the limit is 25
    assert not informed_tokens(early, spread, 0.0)[0].any()
    assert not informed_tokens(early, spread, 0.0)[1].any()
    spread[7] = 25.1
    assert informed_tokens(early, spread, 0.0)[1].nonzero()[:, 0].tolist() == [7]


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_informed_tokens_are_found_and_boosted_by_their_own_factors(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Hugging Face's own attention of the tower, and by scores raised by hand."""
    vlm = BUILDERS[family]()
    batch = encode(vlm, [[random_image(4)], [random_image(5)]])
    eager = Eager(vlm, batch)
    n_layers = vlm.anatomy.n_vision_layers
    method = InformedTokenBoost(0.7, 0.3, layers=[1, 2])
    found = under(vlm, batch, method)
    factors = torch.zeros(batch.size, batch.length)
    for row in range(batch.size):
        n_tokens = int(batch.image_mask[row].sum())
        early, late = (eager.vision_attentions[layer][row].mean(dim=0)[0, 1:] for layer in (0, n_layers - 2))
        if len(early) != n_tokens:  # squares of four patches under a token, [row, 2, column, 2] of the grid
            side = round(n_tokens**0.5)
            early, late = (one.view(side, 2, side, 2).sum(dim=(1, 3)).flatten() for one in (early, late))
        local, summary = informed_tokens(early, late, 0.25)
        assert method.local_[row].tolist() == local.nonzero()[:, 0].tolist()
        assert method.summary_[row].tolist() == summary.nonzero()[:, 0].tolist()
        assert local.any()
        factors[row, batch.image_mask[row]] = 0.7 * local + 0.3 * summary
    assert [len(one) for one in method.summary_] in ([0, 1], [1, 0])  # one of these images has one
    model = copied(vlm)
    model.set_attn_implementation("eager")
    code = sys.modules[type(model.get_submodule(vlm.anatomy.attention(0))).__module__]
    by_hand = boosted_by_hand(1.0, [1, 2], predicting(batch), factors)
    monkeypatch.setattr(importlib.import_module(code.__name__), "eager_attention_forward", by_hand)
    close(found, logits_of(model, batch))


def test_random_informed_tokens_are_as_many(llava: VLM) -> None:
    batch = encode(llava, [[random_image(4)], [random_image(5)]])
    method, other = InformedTokenBoost(), InformedTokenBoost(select="random")
    for one in (method, other):
        under(llava, batch, one)
    for mine, drawn in ((method.local_, other.local_), (method.summary_, other.summary_)):
        assert [len(one) for one in mine] == [len(one) for one in drawn]
    assert [one.tolist() for one in method.local_] != [one.tolist() for one in other.local_]
    for local, summary in zip(other.local_, other.summary_, strict=True):
        assert not set(local.tolist()) & set(summary.tolist())


# what does not fit, and YAML


def refusals(vlm: VLM, folder: Path) -> list[tuple[Intervention, type[Exception], str]]:
    good = torch.ones(vlm.anatomy.d_model)
    not_tensors = folder / "text.safetensors"
    not_tensors.write_text("hello")
    no_layers = folder / "rows.safetensors"
    save_file({"difference_of_means": torch.ones(3, vlm.anatomy.d_model)}, no_layers)
    any_value: Any = "either"
    return [
        (HeadAblation([(3, 0)]), InputError, "layer 3 is not one of 0 to 2"),
        (HeadAblation([(0, 4)]), InputError, "head 4 is not one of 0 to 3"),
        (HeadAblation([(0, -1)]), InputError, "head -1 is not one of 0 to 3"),
        (HeadAblation(HEADS, value=any_value), UnknownNameError, "HeadAblation value 'either'"),
        (HeadAblation(HEADS, select=any_value), UnknownNameError, "HeadAblation select 'either'"),
        (HeadAblation(HEADS, value="mean"), InputError, "value='mean' needs means"),
        (
            HeadAblation(HEADS, value="mean", means=torch.zeros(3, 2, 8)),
            InputError,
            r"expected \[layer, head, d_head\] = \[3, 4, 8\], found \[3, 2, 8\]",
        ),
        (HeadAblation(HEADS, value="mean", means=torch.full((3, 4, 8), torch.nan)), InputError, "holds NaN"),
        (HeadAblation(HEADS, value="mean", means=no_layers), UnknownNameError, "'means'"),
        (
            HeadAblation([(1, 0), (1, 1), (1, 2)], select="random"),
            InputError,
            "3 of the 4 heads of layer 1 are given.*the control 'random'; give at most half",
        ),
        (ActivationAddition(good, scale=torch.inf), InputError, "scale must be a finite number, found inf"),
        (ActivationAddition(good, layer=3), InputError, "layer 3 is not one of 0 to 2"),
        (ActivationAddition(good, direction=any_value), UnknownNameError, "direction 'either'"),
        (ActivationAddition(good[:-1]), InputError, r"expected \[d_model\] = \[32\], found \[31\]"),
        (ActivationAddition(0 * good), InputError, "zero everywhere"),
        (ActivationAddition(folder / "none.safetensors"), InputError, "cannot be read as a safetensors file"),
        (ActivationAddition(not_tensors), InputError, "cannot be read as a safetensors file"),
        (ActivationAddition(no_layers), InputError, "holds 3 directions but not of which layers"),
        (ProjectionAblation(good, strength=1.1), InputError, "strength must be from 0 to 1, found 1.1"),
        (ProjectionAblation(good, [1, 1]), InputError, r"layers \[1, 1\] name one twice"),
        (ProjectionAblation(good, [-1]), InputError, "layer -1 is not one of 0 to 2"),
        (ProjectionAblation(good, direction=any_value), UnknownNameError, "direction 'either'"),
        (CutAttention(queries=any_value), UnknownNameError, "CutAttention queries 'either'"),
        (CutAttention(keys="last"), UnknownNameError, "CutAttention keys 'last'"),  # type: ignore[arg-type]
        (CutAttention(select=any_value), UnknownNameError, "CutAttention select 'either'"),
        (CutAttention(layers=[3]), InputError, "layer 3 is not one of 0 to 2"),
        (
            CutAttention(layers=[0, 1], select="random"),
            InputError,
            "2 of the 3 layers are cut, so that there are only 1 others for the control 'random_layers'",
        ),
        (ImageAttentionBoost(torch.nan), InputError, "alpha must be a finite number, found nan"),
        (ImageAttentionBoost(layers=[3]), InputError, "layer 3 is not one of 0 to 2"),
        (InformedTokenBoost(alpha=torch.nan), InputError, "alpha must be a finite number, found nan"),
        (InformedTokenBoost(beta=torch.inf), InputError, "beta must be a finite number, found inf"),
        (InformedTokenBoost(share=1.5), InputError, "share must be from 0 to 1, found 1.5"),
        (InformedTokenBoost(layers=[3]), InputError, "layer 3 is not one of 0 to 2"),
        (InformedTokenBoost(select=any_value), UnknownNameError, "select 'either'"),
        (ImageAttentionBoost(columns=any_value), UnknownNameError, "columns 'either'"),
    ]


def test_what_does_not_fit_the_model_is_refused_with_what_was_found(llava: VLM, tmp_path: Path) -> None:
    for method, error, match in refusals(llava, tmp_path):
        with pytest.raises(error, match=match):
            method.check(llava.anatomy)


def test_models_without_image_tokens_among_their_positions_are_refused() -> None:
    mllama = BUILDERS["mllama"]()
    for method in (CutAttention(layers=[0]), ImageAttentionBoost(layers=[0])):
        with pytest.raises(UnsupportedError, match="reads the image by cross-attention"):
            method.check(mllama.anatomy)
    CutAttention("text", "text", layers=[0]).check(mllama.anatomy)


def test_informed_tokens_need_a_cls_token_and_images(llava: VLM, llava_siglip: VLM) -> None:
    with pytest.raises(
        UnsupportedError, match=r"needs a CLS token and two blocks; found no CLS token.*ImageAttentionBoost"
    ):
        InformedTokenBoost().check(llava_siglip.anatomy)
    without = llava.encode([[]], ["is there a dog ?"])
    with llava.apply(InformedTokenBoost()), pytest.raises(InputError, match="needs an image in every row"):
        llava.forward(without)


@pytest.mark.parametrize(
    "method",
    [
        HeadAblation(HEADS, value="mean", means=torch.ones(3, 4, 8), select="random", seed=2),
        ActivationAddition(torch.ones(32), layer=0, scale=0.5, direction="reversed"),
        ProjectionAblation(torch.ones(32), [0, 2], strength=0.5, vector_layer=None),
        CutAttention("text", "image", layers=[1], select="random", seed=1),
        ImageAttentionBoost(0.5, layers=[0, 1], columns="text"),
        InformedTokenBoost(0.5, 0.4, share=0.5, layers=[0, 1], select="random", seed=1),
    ],
    ids=lambda method: method.name,
)
def test_plain_values_as_in_a_yaml_file_make_the_same(method: Intervention, llava: VLM) -> None:
    ((name, values),) = describe(method).items()
    again = build("intervention", name, type(method), values)
    batch = encode(llava, [[random_image(0)], [random_image(1)]])
    assert torch.equal(under(llava, batch, again), under(llava, batch, method))
    assert describe(again) == {name: values}


def test_descriptions_tell_a_method_from_its_controls() -> None:
    for method in (
        HeadAblation(HEADS),
        ActivationAddition("a/steer.safetensors"),
        ProjectionAblation(Path("steer.safetensors"), strength=0.5),
        CutAttention(),
        ImageAttentionBoost(),
        InformedTokenBoost(),
    ):
        words = [one.describe() for one in (method, *method.controls().values())]
        assert len(set(words)) == len(words)
    assert HeadAblation(HEADS).describe() == "heads 0.1, 2.0, 2.3 set to zero"
    assert "steer.safetensors (difference_of_means) added after the middle block, scale 0.2" in (
        ActivationAddition("a/steer.safetensors").describe()
    )
    assert ProjectionAblation(torch.ones(2), [1], 0.5).describe() == (
        "the direction of a given tensor taken out after blocks 1, 50% of it"
    )
    assert CutAttention(layers=[3, 4]).describe() == (
        "attention of the tokens that predict the answer to image tokens cut in layers 3, 4"
    )
    assert ImageAttentionBoost().describe() == (
        "attention scores to image tokens changed by +0.2 of their size in the third layer to the last"
    )
