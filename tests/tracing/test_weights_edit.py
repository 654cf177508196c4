"""Edits of attention after the softmax: equal to values summed by hand in a copy under the model's own eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import close, encode, pictures_of
from eager import Eager
from edits import Edits
from hand_attention import FAMILIES, Rule, built, by_hand, outputs, pairs
from tiny_models import BUILDERS
from tiny_models.common import random_image

from slitlamp.decoding.edits import knock_out
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.tracing import WeightsEdit, attention_rows, attention_tap, sites, weights_edit
from slitlamp.tracing.attention_tap import _held, _observers
from slitlamp.vlm import VLM


def waves(weights: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A rule that knows heads, queries and keys apart; rows do not add up to 1 afterwards."""
    heads = torch.arange(weights.shape[1])[None, :, None, None]
    return weights * (1 + 0.7 * torch.sin(1.0 + heads + 2 * rows[:, None, :, None] + 3 * columns)).to(weights)


def capped(weights: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A rule that does not commute with the one above."""
    return weights.clamp(max=0.15)


def edit(
    layer: int, rule: Rule, queries: Any = "all", tower: Any = "language", sizes: list[Any] | None = None
) -> WeightsEdit:
    def function(weights: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, calls: Any) -> torch.Tensor:
        if sizes is not None:
            sizes.append(tuple(weights.shape[:3]))
        return rule(weights, rows, columns)

    return WeightsEdit(layer, function, queries, tower)


KINDS = [
    (name, kind) for name in FAMILIES for kind in ("sdpa", "eager") if (name, kind) != ("paligemma gemma2", "sdpa")
]


@pytest.mark.parametrize(("family", "implementation"), KINDS)
def test_edits_equal_values_summed_by_hand(family: str, implementation: str) -> None:
    """Rows of one name in one layer, two edits in order in another, and a knockout before the softmax of the same rows."""
    vlm = built(family, implementation)
    batch = encode(vlm, pictures_of(vlm))
    after, real = batch.text_after_image_mask, batch.real_mask
    edits = [edit(1, waves), edit(0, waves, "text_after_image"), edit(1, capped, batch.image_mask)]
    knockout = knock_out([1], "text_after_image", "image")
    rules = [(0, waves, after), (1, waves, real), (1, capped, batch.image_mask)]
    bias = {1: pairs(batch, after, batch.image_mask)}
    wanted = outputs(by_hand(vlm, rules, bias), batch)  # type: ignore[arg-type]
    plain = vlm.forward(batch).logits
    with vlm.trace(sites.attention("all", "all"), sites.attention("image", "text", heads=[1], label="one")) as trace:
        found = vlm.forward(batch, edits=[*edits, *knockout]).logits
    close(found[real], wanted.logits[real])
    assert (found - plain)[real].abs().max() > 1e-3
    attentions = getattr(wanted, "language_model_outputs", wanted).attentions
    for layer in (0, 1):
        for row in range(batch.size):
            mine, n = real[row], int(real[row].sum())
            close(trace["attention"][layer][row][:, :n, :n], attentions[layer][row][:, mine][..., mine])
            chosen = attentions[layer][row, 1][batch.image_mask[row]][:, batch.text_mask[row]]
            close(trace["one"][layer][row, 0][: chosen.shape[0], : chosen.shape[1]], chosen)
    assert torch.equal(vlm.forward(batch).logits, plain)


def test_what_is_summed_by_hand_without_a_rule_is_the_models_own(llava: VLM) -> None:
    """The reference is right, and an edit that gives the weights back changes no more than rounding."""
    batch = encode(llava, pictures_of(llava))
    same: Rule = lambda weights, rows, columns: weights  # noqa: E731
    real, plain = batch.real_mask, llava.forward(batch).logits
    close(outputs(by_hand(llava, [(0, same, None), (2, same, None)], {}), batch).logits[real], plain[real])
    close(llava.forward(batch, edits=[edit(0, same), edit(2, same)]).logits[real], plain[real])


def test_rows_that_are_not_edited_are_the_same_bit_for_bit(llava: VLM) -> None:
    batch = encode(llava, pictures_of(llava))
    site = sites.z(layers=[1], positions="all")
    with llava.trace(site) as plain:
        llava.forward(batch)
    with llava.trace(site) as edited:
        llava.forward(batch, edits=[edit(1, waves, "text_after_image")])
    real = plain.mask("z")
    differs = (plain["z"][1] != edited["z"][1]).flatten(2).any(dim=-1)
    for row in range(batch.size):
        n = int(real[row].sum())
        assert differs[row, :n].tolist() == batch.text_after_image_mask[row][batch.real_mask[row]].tolist()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_is_never_edited(implementation: str) -> None:
    vlm = built("llava", implementation)
    batch = encode(vlm, pictures_of(vlm))
    assert not batch.real_mask.all()
    plain = vlm.forward(batch).logits[~batch.real_mask]
    edited = vlm.forward(
        batch, edits=[edit(2, waves)]
    ).logits  # in the last layer: in eager attention padding looks at real keys
    assert torch.equal(edited[~batch.real_mask], plain)
    assert not torch.equal(edited[batch.real_mask], vlm.forward(batch).logits[batch.real_mask])


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        *[(name, kind) for name in ("llava", "qwen2_5_vl", "gemma3") for kind in ("sdpa", "eager")],
        ("paligemma gemma2", "eager"),
    ],
)
def test_decoding_equals_recomputation_and_many_rows_equal_one(family: str, implementation: str) -> None:
    """Rules that know no places, which padding shifts. Recordings of decode steps show the edited weights, those of layers
    without edits beside them; behind a sliding window (8) the first keys are gone.
    """
    vlm = built(family, implementation)
    pictures = pictures_of(vlm)
    batch = encode(vlm, pictures)

    def alternating(weights: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        apart = (rows[:, None, :, None] - columns) % 2
        return torch.where(apart == 0, 2.5 * weights, weights.square())

    edits = [edit(0, alternating), edit(2, capped, "generated"), *knock_out([0], "generated", "image")]
    asked = [
        sites.attention("generated", "all"),
        sites.attention("generated", "image", reduce_keys="sum", label="mass"),
    ]
    options: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": []}
    with vlm.apply(Edits(edits)), vlm.trace(sites.logits(), *asked) as steps:  # type: ignore[arg-type]  # of any kind
        generation = vlm.generate(batch, **options)
    whole = generation.teacher_forced()
    with vlm.trace(sites.logits("before_generated"), *asked) as once:
        vlm.forward(whole, edits=edits)
    close(steps["logits"][0], once["logits"][0])
    for layer in range(3):
        decoded = steps["attention"][layer]  # the last token is never fed back
        close(decoded, once["attention"][layer][..., : decoded.shape[-2], : decoded.shape[-1]])
        mass, with_image = steps["mass"][layer], batch.image_mask.any(dim=1)
        close(mass[with_image], once["mass"][layer][with_image][:, :, : mass.shape[2]])
    assert (steps["attention"][2] <= 0.15).all()
    assert (steps["attention"][1] > 0.15).any()
    assert generation.tokens != vlm.generate(batch, **options).tokens
    for row in range(batch.size):
        with vlm.apply(Edits(edits)):  # type: ignore[arg-type]
            alone = vlm.generate(encode(vlm, pictures, [row]), **options)
        assert alone.tokens[0] == generation.tokens[row]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_blocks_of_rows_change_nothing(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = built("llava", implementation)
    batch = encode(vlm, pictures_of(vlm))
    wanted = vlm.forward(batch, edits=[edit(1, waves)]).logits
    sizes: list[Any] = []
    monkeypatch.setattr(attention_rows, "BLOCK_ELEMENTS", 2 * batch.size * vlm.anatomy.n_heads * batch.length)
    found = vlm.forward(batch, edits=[edit(1, waves, sizes=sizes)]).logits
    close(found[batch.real_mask], wanted[batch.real_mask])
    heads = vlm.anatomy.n_heads
    assert set(sizes) <= {(batch.size, heads, 2), (batch.size, heads, 1)}
    assert len(sizes) >= batch.length // 2


WHOLE_TOWERS = ("llava", "llava siglip", "llava_next", "internvl", "idefics3", "smolvlm", "gemma3")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", WHOLE_TOWERS)
def test_edits_in_the_vision_tower(family: str, implementation: str) -> None:
    vlm = built(family, implementation)
    batch = encode(vlm, pictures_of(vlm))
    rules: list[tuple[int, Rule, torch.Tensor | None]] = [(0, waves, None), (0, capped, None), (1, waves, None)]
    wanted = outputs(by_hand(vlm, rules, {}, "vision_"), batch).logits
    plain = vlm.forward(batch).logits
    sizes: list[Any] = []
    edits = [
        edit(0, waves, tower="vision", sizes=sizes),
        edit(0, capped, tower="vision"),
        edit(1, waves, tower="vision"),
    ]
    with vlm.trace(sites.vision_attention("all", "all", layers=[0, 1])) as trace:
        found = vlm.forward(batch, edits=edits).logits
    close(found[batch.real_mask], wanted[batch.real_mask])
    assert (found - plain)[batch.real_mask].abs().max() > 1e-4
    assert sizes[0][0] == sum(batch.tiles)
    own = Eager(vlm, batch).vision_attentions[0]
    places = torch.arange(own.shape[-1])
    changed = capped(waves(own, places[None].expand(own.shape[0], -1), places), places, places)
    close(trace["vision_attention"][0], changed)


def test_the_vision_tower_of_a_batch_without_images_is_left_alone() -> None:
    vlm = BUILDERS["llava_next"]()
    batch = vlm.encode([[]], ["is there a dog ?"], chat=False)
    sizes: list[Any] = []
    vlm.forward(batch, edits=[edit(0, waves, tower="vision", sizes=sizes)])
    assert not sizes


def test_packed_towers_are_refused_by_name() -> None:
    vlm = BUILDERS["qwen2_5_vl"]()
    batch = encode(vlm, pictures_of(vlm))
    with pytest.raises(UnsupportedError, match=r"vision tower of this Qwen2.5-VL runs over all tiles as one sequence"):
        vlm.forward(batch, edits=[edit(0, waves, tower="vision")])


def test_a_tower_that_calls_attention_several_times_is_refused(llava: VLM) -> None:
    batch = llava.encode([random_image(0)], ["<image> what ?"])
    editor = weights_edit.WeightsEditor([edit(0, waves, tower="vision")], calls=weights_edit.Calls(batch))
    states = torch.zeros(1, 4, 3, 8)
    assert editor.of_call(states, 3, lambda rows, heads: states, 0) is not None
    with pytest.raises(UnsupportedError, match="several times per forward"):
        editor.of_call(states, 3, lambda rows, heads: states, 1)


def test_edits_that_do_not_fit_are_refused(llava: VLM) -> None:
    batch = llava.encode([random_image(0)], ["<image> what ?"])

    def giving(value: torch.Tensor) -> WeightsEdit:
        return edit(0, lambda *_: value, "last")

    cases = [
        (edit(3, waves), "the language attention weights of layer 3; the model has layers 0 to 2"),
        (edit(9, waves, tower="vision"), "the vision attention weights of layer 9; the model has layers 0 to"),
        (edit(0, waves, "lst"), "'lst' is not one of all, image"),
        (edit(0, waves, torch.ones(1, 3, dtype=torch.bool)), r"expected bool \[1, 19\]"),
        (edit(0, waves, "last", "vision"), "expected \"all\", found 'last'"),
        (edit(0, waves, tower="visual"), r"visual.*vision"),
        (giving(torch.zeros(1, 4, 1, 3)), r"floating weights \[1, 4, 1, 19\]; it gave torch.float32 \[1, 4, 1, 3\]"),
        (giving(torch.zeros(1, 4, 1, 19, dtype=torch.int64)), "it gave torch.int64"),
    ]
    for one, match in cases:
        with pytest.raises(InputError, match=match):
            llava.forward(batch, edits=[one])


def test_the_model_is_as_before_after_an_error_in_an_edit(llava: VLM) -> None:
    batch = llava.encode([random_image(0)], ["<image> what ?"])
    before = llava.forward(batch).logits

    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("mine")

    for tower in ("language", "vision"):
        with pytest.raises(RuntimeError, match="mine"):
            llava.forward(batch, edits=[edit(1, fail, tower=tower)])
        assert not _observers
        assert not _held
        assert torch.equal(llava.forward(batch).logits, before)


def test_flash_attention_is_refused_by_name(llava: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the kernel itself cannot run; what is refused is the call."""
    from slitlamp.tracing.attention_edit import Editor

    batch = llava.encode([random_image(0)], ["<image> what ?"])
    module = llava.model.get_submodule(llava.anatomy.attention(0))
    states = torch.zeros(1, 4, 3, 8)
    monkeypatch.setitem(
        attention_tap.ALL_ATTENTION_FUNCTIONS._local_mapping,
        "fake_flash",
        lambda *a, **k: (states.transpose(1, 2), None),
    )
    calls = weights_edit.Calls(batch)
    editor = Editor([], calls, weights_edit.WeightsEditor([edit(0, waves)], calls))
    monkeypatch.setitem(_observers, id(module), attention_tap._Watch([], editor))
    with pytest.raises(UnsupportedError, match=r"fake_flash.*cannot be edited; load the model with .*'sdpa'"):
        attention_tap._tapped_flash("fake_flash", module, states, states, states, None)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradients_pass_through_edited_rows(implementation: str) -> None:
    """By the residual stream below, by the values, and by the edited weights: as autograd gives them in the copy."""
    vlm = built("llava", implementation)
    batch = vlm.encode([random_image(0)] * 2, ["<image> what ?", "<image> is there a dog ?"])
    top = lambda output: output.logits[:, -1, 7]  # noqa: E731
    asked = [sites.resid_post(layers=[0]), sites.v(layers=[1]), sites.attention("last", "all", layers=[1])]
    with vlm.trace(*asked, gradient_of=top) as trace:
        vlm.forward(batch, edits=[edit(1, waves)])
    model = by_hand(vlm, [(1, waves, batch.real_mask)], {})
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str, number: int | None = None) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            kept[name] = output if number is None else output[number]
            kept[name].retain_grad()

        return hook

    place = vlm.anatomy.place
    block = model.get_submodule(vlm.anatomy.blocks[0])
    block.register_forward_hook(keep("resid_post"))
    model.get_submodule(place("v", 1).path).register_forward_hook(keep("v"))
    model.get_submodule(place("attention", 1).path).register_forward_hook(keep("attention", 1))
    top(model(**batch.inputs(), use_cache=False)).sum().backward()
    assert trace.gradients is not None
    for row in range(2):
        mine, n = batch.real_mask[row], int(batch.real_mask[row].sum())
        for name, layer in (("resid_post", 0), ("v", 1)):
            wanted = kept[name].grad[row][mine]  # type: ignore[index]
            assert wanted.abs().max() > 1e-4
            close(trace.gradients[name][layer][row, :n].flatten(1), wanted, 1e-5)
        of_weights = kept["attention"].grad[row][:, -1:][..., mine]  # type: ignore[index]
        assert of_weights.abs().max() > 1e-4
        close(trace.gradients["attention"][1][row][..., :n], of_weights, 1e-5)
