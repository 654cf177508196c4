"""Edits of attention: equal to a mask written into the model's own eager attention, in every family and when decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import TEXTS, close, encode, pictures_of, prompt
from edits import Edits
from hand_attention import FAMILIES, built, logits_with_mask, pairs
from tiny_models.common import random_image

from slitlamp.decoding.edits import knock_out
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import Batch
from slitlamp.tracing import AttentionEdit, attention_rows, attention_tap, sites
from slitlamp.tracing.attention_tap import _held, _observers
from slitlamp.vlm import VLM


def last(batch: Batch) -> torch.Tensor:
    mask = torch.zeros_like(batch.image_mask)
    mask[:, -1] = True
    return mask


@pytest.mark.parametrize(
    ("family", "implementation"),
    [(name, kind) for name in FAMILIES for kind in ("sdpa", "eager") if (name, kind) != ("paligemma gemma2", "sdpa")],
)  # Gemma 2 soft-caps its scores, which sdpa cannot: it has eager attention only
def test_a_knockout_equals_a_mask_in_the_models_own_eager_attention(family: str, implementation: str) -> None:
    vlm = built(family, implementation)
    batch = encode(vlm, pictures_of(vlm))
    edits = [*knock_out([0, 1], "text_after_image", "image"), *knock_out([1], "last", "text")]
    bias = pairs(batch, batch.text_after_image_mask, batch.image_mask)
    wanted = logits_with_mask(vlm, batch, {0: bias, 1: bias + pairs(batch, last(batch), batch.text_mask)})
    plain = vlm.forward(batch).logits
    found = vlm.forward(batch, edits=edits).logits
    real = batch.real_mask
    close(found[real], wanted[real])
    assert (found - plain)[real].abs().max() > 1e-3
    assert torch.equal(vlm.forward(batch).logits, plain)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_bias_of_each_head_equals_the_same_mask(family: str, implementation: str) -> None:
    vlm = built(family, implementation)
    batch = encode(vlm, pictures_of(vlm))
    full = torch.randn(batch.size, vlm.anatomy.n_heads, batch.length, batch.length)

    def bias(queries: torch.Tensor, keys: torch.Tensor, calls: Any) -> torch.Tensor:
        index = queries[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3])
        return full.gather(2, index)[..., keys]

    wanted = logits_with_mask(vlm, batch, {1: full * batch.image_mask[:, None, :, None]})
    found = vlm.forward(batch, edits=[AttentionEdit(1, bias, "image")]).logits
    close(found[batch.real_mask], wanted[batch.real_mask])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_edits_relative_to_scores_add_up_in_units_of_the_models_own(implementation: str) -> None:
    """softmax(a + |a|/4 + |a|/2), with a by hand from the queries and keys that the attention function was given."""
    vlm = built("llava", implementation)
    batch = encode(vlm, pictures_of(vlm))
    asked: Any = sites.attention(layers=[1], queries="all", keys="all")
    seen: list[torch.Tensor] = []
    first, second = 0.25, 0.5

    def part(share: float) -> AttentionEdit:
        return AttentionEdit(1, lambda rows, columns, calls: torch.full((1, 1, 1, 1), share), "all", relative=True)

    kept = attention_tap._scores

    def look(query: torch.Tensor, key: torch.Tensor, options: Any, rows: Any) -> torch.Tensor:
        repeated = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        seen.append((query @ repeated.mT) / query.shape[-1] ** 0.5)
        return kept(query, key, options, rows)

    with pytest.MonkeyPatch.context() as patch, vlm.trace(asked) as trace:
        patch.setattr(attention_tap, "_scores", look)
        vlm.forward(batch, edits=[part(first), part(second)])
    a, real = seen[0], batch.real_mask
    causal = torch.ones(batch.length, batch.length, dtype=torch.bool).tril()
    visible = causal & real[:, None, None, :]
    wanted = (a + (first + second) * a.abs()).masked_fill(~visible, -torch.inf).softmax(dim=-1)
    for row in range(batch.size):
        mine, n = real[row], int(real[row].sum())
        close(trace["attention"][1][row][:, :n, :n], wanted[row][:, mine][..., mine])


def test_relative_edits_that_are_not_finite_and_position_biases_are_refused(llava: VLM) -> None:
    batch = llava.encode([random_image(0)], ["<image> what ?"])
    cut = AttentionEdit(0, lambda *_: torch.full((1, 1, 1, 1), -torch.inf), "last", relative=True)
    with pytest.raises(InputError, match="relative to its scores must be finite; to cut pairs, give bool"):
        llava.forward(batch, edits=[cut])
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UnsupportedError, match="position_bias"):
        attention_tap._scores(states, states, {"position_bias": torch.zeros(1, 2, 3, 3)}, slice(None))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_recorded_weights_are_zero_at_cut_pairs_and_rows_sum_to_one(implementation: str) -> None:
    """-inf before the softmax, not a boolean added to scores: the weights themselves are looked at."""
    vlm = built("llava", implementation)
    batch = encode(vlm, pictures_of(vlm)).with_continuation([[6, 7], [8], [9, 10]])
    with vlm.trace(sites.attention(queries="text_after_image", keys="image"), sites.z()) as plain:
        vlm.forward(batch)
    asked = [
        sites.attention(queries="text_after_image", keys="image", label="cut"),
        sites.attention(queries="all", keys="all", label="whole"),
    ]
    with vlm.trace(*asked) as trace:
        vlm.forward(batch, edits=knock_out([1], "text_after_image", "image"))
    assert (plain["attention"][1] > 0).any()
    assert not (trace["cut"][1] != 0).any()
    torch.testing.assert_close(trace["cut"][0], plain["attention"][0], rtol=0, atol=0)
    sums = trace["whole"][1].sum(dim=-1).transpose(1, 2)[trace.mask("whole")]
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_rows_that_are_not_edited_are_the_same_bit_for_bit(llava: VLM) -> None:
    batch = encode(llava, pictures_of(llava))
    site = sites.z(layers=[1], positions="all")
    with llava.trace(site) as plain:
        llava.forward(batch)
    with llava.trace(site) as edited:
        llava.forward(batch, edits=knock_out([1], "last", "image"))
    one, other, real = plain["z"][1], edited["z"][1], plain.mask("z")
    differs = (one != other).flatten(2).any(dim=-1)
    ends = torch.zeros_like(real)
    ends[torch.arange(batch.size), real.sum(dim=1) - 1] = True
    assert not (differs & ~ends).any()
    assert (one - other)[ends].flatten(1).abs().amax(dim=1).gt(1e-3).tolist() == batch.image_mask.any(dim=1).tolist()


@pytest.mark.parametrize(
    ("family", "implementation"),
    [
        *[(name, kind) for name in ("llava", "qwen2_5_vl", "gemma3") for kind in ("sdpa", "eager")],
        ("paligemma gemma2", "eager"),
    ],
)
def test_decoding_equals_recomputation_and_many_rows_equal_one(family: str, implementation: str) -> None:
    """Keys of earlier positions are in the cache; behind a sliding window (8) the first ones are gone."""
    vlm = built(family, implementation)
    pictures = pictures_of(vlm)
    batch = encode(vlm, pictures)
    edits = [*knock_out([0, 1], "text", "image"), *knock_out([2], "generated", "generated")]
    options: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": []}
    with vlm.apply(Edits(edits)), vlm.trace(sites.logits(), sites.attention("generated", "all")) as steps:
        generation = vlm.generate(batch, **options)
    whole = generation.teacher_forced()
    with vlm.trace(sites.logits("before_generated"), sites.attention("generated", "all")) as once:
        vlm.forward(whole, edits=edits)
    close(steps["logits"][0], once["logits"][0])
    for layer in range(3):
        decoded = steps["attention"][layer]  # the last token is never fed back
        close(decoded, once["attention"][layer][..., : decoded.shape[-2], : decoded.shape[-1]])
    assert generation.tokens != vlm.generate(batch, **options).tokens
    for row in range(batch.size):
        with vlm.apply(Edits(edits)):
            alone = vlm.generate(encode(vlm, pictures, [row]), **options)
        assert alone.tokens[0] == generation.tokens[row]


def test_blocks_of_rows_change_nothing(llava: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = encode(llava, pictures_of(llava))
    edits = knock_out([0, 1, 2], "all", "image")
    wanted = llava.forward(batch, edits=edits).logits
    sizes = []

    def look(queries: torch.Tensor, keys: torch.Tensor, calls: Any) -> torch.Tensor:
        sizes.append(tuple(queries.shape))
        return torch.zeros(1, 1, 1, 1)

    monkeypatch.setattr(attention_rows, "BLOCK_ELEMENTS", 2 * batch.size * llava.anatomy.n_heads * batch.length)
    found = llava.forward(batch, edits=[*edits, AttentionEdit(1, look, "all")]).logits
    close(found[batch.real_mask], wanted[batch.real_mask])
    assert set(sizes) == {(batch.size, 2)} or set(sizes) == {(batch.size, 2), (batch.size, 1)}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_row_without_any_key_is_refused_by_name(implementation: str) -> None:
    vlm = built("llava", implementation)
    batch = vlm.encode([random_image(0)] * 2, ["<image> what ?", "<image> is there a dog ?"], ids=["first", "second"])

    def all_keys(queries: torch.Tensor, keys: torch.Tensor, calls: Any) -> torch.Tensor:
        blocked = torch.zeros(2, 1, queries.shape[1], len(keys), dtype=torch.bool)
        blocked[1] = True
        return blocked

    match = f"layer 2 leaves position {batch.length - 1} of item 'second' nothing to attend to"
    with pytest.raises(InputError, match=match):
        vlm.forward(batch, edits=[AttentionEdit(2, all_keys, "last")])
    assert not _observers
    assert not _held
    assert torch.isfinite(vlm.forward(batch).logits).all()


def test_two_edits_that_leave_nothing_together_are_refused(llava: VLM) -> None:
    batch = llava.encode([random_image(0)], ["<image> what ?"])

    def half(side: int) -> AttentionEdit:
        return AttentionEdit(0, lambda queries, keys, calls: (keys % 2 == side)[None, None, None], "last")

    llava.forward(batch, edits=[half(0)])
    with pytest.raises(InputError, match="nothing to attend to"):
        llava.forward(batch, edits=[half(0), half(1)])


def test_edits_that_do_not_fit_are_refused(llava: VLM) -> None:
    batch = llava.encode([random_image(0)], ["<image> what ?"])

    def giving(value: torch.Tensor) -> AttentionEdit:
        return AttentionEdit(0, lambda queries, keys, calls: value, "last")

    cases = [
        (AttentionEdit(3, lambda *_: torch.zeros(1), "last"), "layer 3; the model has layers 0 to 2"),
        (AttentionEdit(0, lambda *_: torch.zeros(1), "lst"), "'lst' is not one of all, image"),  # type: ignore[arg-type]
        (AttentionEdit(0, lambda *_: torch.zeros(1), torch.ones(1, 3, dtype=torch.bool)), r"expected bool \[1, 19\]"),
        (giving(torch.zeros(1, 1, 1, 3)), r"broadcasts to \[1, 4, 1, 19\]; it gave torch.float32 \[1, 1, 1, 3\]"),
        (giving(torch.zeros(1, 1, 1, 19, dtype=torch.int64)), "must give bool pairs or a floating bias"),
        (giving(torch.zeros(19)), "must give bool pairs"),
    ]
    for edit, match in cases:
        with pytest.raises(InputError, match=match):
            llava.forward(batch, edits=[edit])


def test_the_model_is_as_before_after_an_error_in_an_edit(llava: VLM) -> None:
    batch = llava.encode([random_image(0)], ["<image> what ?"])
    before = llava.forward(batch).logits

    def fail(queries: torch.Tensor, keys: torch.Tensor, calls: Any) -> torch.Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        llava.forward(batch, edits=[AttentionEdit(1, fail)])
    assert not _observers
    assert not _held
    assert torch.equal(llava.forward(batch).logits, before)


def test_flash_attention_is_refused_by_name(llava: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the kernel itself cannot run; what is refused is the call."""
    from slitlamp.tracing.attention_edit import Editor

    module = llava.model.get_submodule(llava.anatomy.attention(0))
    states = torch.zeros(1, 4, 3, 8)
    monkeypatch.setitem(
        attention_tap.ALL_ATTENTION_FUNCTIONS._local_mapping,
        "fake_flash",
        lambda *a, **k: (states.transpose(1, 2), None),
    )
    monkeypatch.setitem(_observers, id(module), attention_tap._Watch([], Editor([], None)))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"fake_flash.*cannot be edited; load the model with .*'sdpa'"):
        attention_tap._tapped_flash("fake_flash", module, states, states, states, None)


def test_gradients_pass_through_edited_rows(llava: VLM) -> None:
    """The gradient by the values of cut keys is 0 where that was their only way."""
    batch = llava.encode([random_image(0)] * 2, ["<image> what ?", "<image> is there a dog ?"])
    top = lambda output: output.logits[:, -1, 7]  # noqa: E731
    with llava.trace(sites.v(layers=[2]), gradient_of=top) as plain:
        llava.forward(batch)
    with llava.trace(sites.v(layers=[2]), gradient_of=top) as cut:
        llava.forward(batch, edits=knock_out([2], "last", "image"))
    packed = torch.zeros_like(plain.mask("v"))
    for row in range(2):
        image = batch.image_mask[row][batch.real_mask[row]]
        packed[row, : len(image)] = image
    assert plain.gradients is not None
    assert cut.gradients is not None
    assert (plain.gradients["v"][2][packed] != 0).any()
    assert not (cut.gradients["v"][2][packed] != 0).any()
    assert torch.isfinite(cut.gradients["v"][2]).all()
    assert (cut.gradients["v"][2][~packed] != 0).any()


def test_interventions_may_give_attention_edits(llava: VLM) -> None:
    batch = llava.encode([random_image(0)], [prompt(llava, 1, TEXTS[0])], chat=False)
    edits = knock_out([0], "last", "image")
    wanted = llava.forward(batch, edits=edits).logits
    with llava.apply(Edits(edits)):  # type: ignore[arg-type]  # a list of either kind
        assert torch.equal(llava.forward(batch).logits, wanted)


def showing(wanted: torch.Tensor, layers: tuple[int, ...] = (0, 1), queries: Any = "all") -> list[AttentionEdit]:
    """Edits that show pairs, bool [batch, T, T]; none with the tokens that are generated."""

    def show(rows: torch.Tensor, columns: torch.Tensor, calls: Any) -> torch.Tensor:
        pad = [0, max(0, int(columns[-1]) + 1 - wanted.shape[2]), 0, max(0, int(rows.max()) + 1 - wanted.shape[1])]
        whole = torch.nn.functional.pad(wanted, pad)
        picked = whole.gather(1, rows[:, :, None].expand(-1, -1, whole.shape[2]))
        return picked[:, None][..., columns]

    return [AttentionEdit(layer, show, queries, shows=True) for layer in layers]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if "paligemma" not in name])
def test_pairs_that_are_shown_equal_a_mask_in_the_models_own_eager_attention(family: str, implementation: str) -> None:
    """All image tokens see all text of their row; what the model shows already, and padding, stays as it is."""
    vlm = built(family, implementation)
    batch = encode(vlm, pictures_of(vlm))
    later = torch.ones(batch.length, batch.length, dtype=torch.bool).triu(1)
    shown = batch.image_mask[:, :, None] & batch.text_mask[:, None, :] & later
    lifts = torch.zeros(shown.shape).masked_fill(shown, -torch.finfo(torch.float32).min)[:, None]
    wanted = logits_with_mask(vlm, batch, {0: lifts, 1: lifts})  # eager masks hide by the least float
    plain = vlm.forward(batch).logits
    everything = torch.ones(batch.size, batch.length, batch.length, dtype=torch.bool)
    asked = batch.image_mask[:, :, None] & ~batch.image_mask[:, None, :] & everything  # padding among the keys
    found = vlm.forward(batch, edits=showing(asked)).logits
    real = batch.real_mask
    close(found[real], wanted[real])
    changes = (found - plain).abs().amax(dim=-1)
    assert changes[batch.image_mask.any(dim=1)[:, None] & real].max() > 1e-3


def test_showing_what_a_model_shows_already_changes_nothing() -> None:
    """PaliGemma's prompt sees all of itself."""
    vlm = built("paligemma gemma2", "eager")
    batch = encode(vlm, pictures_of(vlm))
    everything = torch.ones(batch.size, batch.length, batch.length, dtype=torch.bool)
    found, plain = vlm.forward(batch, edits=showing(everything)).logits, vlm.forward(batch).logits
    close(found[batch.real_mask], plain[batch.real_mask])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_is_shown_can_be_cut_and_what_is_not_there_is_not_shown(implementation: str) -> None:
    """Every pair is asked for: no key is padding, nor a generated token that comes after the query."""
    vlm = built("llava", implementation)
    batch = encode(vlm, pictures_of(vlm)).with_continuation([[6, 7], [8], [9, 10]])
    everything = torch.ones(batch.size, batch.length, batch.length, dtype=torch.bool)
    cut = AttentionEdit(1, lambda rows, columns, calls: (columns == batch.length - 4)[None, None, None], "image")
    with vlm.trace(sites.attention("all", "all")) as trace:
        vlm.forward(batch, edits=[cut, *showing(everything)])
    for row in range(batch.size):
        mine = batch.real_mask[row]
        n, prompt_length = int(mine.sum()), int(mine.sum()) - batch.n_generated[row]
        seen = torch.ones(n, n).tril().bool() | (torch.arange(n) < prompt_length)
        assert torch.equal(trace["attention"][0][row][:, :n, :n] > 0, seen.expand(vlm.anatomy.n_heads, -1, -1))
        column = n - 4  # every row ends where the batch does
        seen[batch.image_mask[row][mine], column] = False
        assert torch.equal(trace["attention"][1][row][:, :n, :n] > 0, seen.expand(vlm.anatomy.n_heads, -1, -1))


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_decoding_after_shown_pairs_equals_recomputation(family: str) -> None:
    vlm = built(family, "sdpa")
    batch = encode(vlm, pictures_of(vlm))
    edits = showing(torch.ones(batch.size, batch.length, batch.length, dtype=torch.bool), queries="all")
    with vlm.apply(Edits(edits)), vlm.trace(sites.logits()) as steps:  # type: ignore[arg-type]
        generation = vlm.generate(batch, max_new_tokens=6, eos_token_id=[])
    whole = generation.teacher_forced()
    assert whole.length - batch.length == 6  # every row has as many, so that places are those of the prompt
    with vlm.trace(sites.logits("before_generated")) as once:
        vlm.forward(whole, edits=edits)
    close(steps["logits"][0], once["logits"][0])


def test_pairs_to_show_that_are_no_bool_are_refused(llava: VLM) -> None:
    batch = llava.encode([random_image(0)], ["<image> what ?"])
    bias = AttentionEdit(0, lambda *_: torch.zeros(1, 1, 1, 1), "last", shows=True)
    with pytest.raises(InputError, match=r"shows pairs must give bool; it gave torch.float32"):
        llava.forward(batch, edits=[bias])
