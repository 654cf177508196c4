"""Decoding from the logits of several branches: held to both branches recomputed without a cache at every step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from contrasts import ROUNDING, Against, MakeView, Planned, Seen, blind, noise, same, unequal_prompts, zero
from edits import Edits
from tiny_models import BUILDERS
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from untouched import snapshot

import slitlamp
from slitlamp.decoding import RunContext, image_free
from slitlamp.decoding.edits import knock_out, scale_heads
from slitlamp.decoding.two_branch import plausible
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import Batch
from slitlamp.tracing import Edit, GatheringProbe, sites
from slitlamp.vlm import VLM


@pytest.fixture(scope="module")
def batch(organism: VLM) -> Batch:
    """Three rows of unequal prompts, as the embedded model was trained and not."""
    return unequal_prompts(organism)


def branches(vlm: VLM, method: Against, forced: Batch) -> tuple[Tensor, Tensor]:
    """The logits of the steps of a decoding, from one pass of each branch over everything: clean and fused, before APC, each
    [batch, step, vocab].
    """
    n_steps = max(forced.n_generated)
    clean = vlm.forward(forced).logits[:, -n_steps - 1 : -1]
    others = [
        vlm.forward(view, edits=edits).logits[:, -n_steps - 1 : -1] for view, edits in method.views(context(forced))
    ]
    weight = (method.alpha + method.growth * torch.arange(n_steps))[None, :, None]
    return clean, clean + weight * (clean - sum(others) / len(others))


def kept(clean: Tensor, beta: float) -> Tensor:
    probability = clean.softmax(dim=-1)
    return probability >= beta * probability.amax(dim=-1, keepdim=True)


def recomputed(vlm: VLM, method: Against, forced: Batch) -> Tensor:
    clean, fused = branches(vlm, method, forced)
    return fused.masked_fill(~kept(clean, method.beta), -torch.inf)


def context(batch: Batch) -> Any:
    return RunContext(batch=batch, anatomy=None, trace=None, source=None)  # type: ignore[arg-type]  # the views read the batch


METHODS = {
    "shorter rows": Against(),
    "APC": Against(beta=0.1),
    "edits of the prompt": Against(make=(zero,), beta=0.01),
    "edits of attention in every step": Against(make=(blind,)),
    "weights that grow": Against(alpha=0.0, growth=0.2),
    "two views": Against(make=(image_free, noise)),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_step_equals_both_branches_recomputed(method: Against, organism: VLM, batch: Batch) -> None:
    """With two forward passes without a cache as the reference: a branch that reads the cache of another fails here."""
    seen = Seen()
    with organism.apply(method):
        generation = organism.generate(
            batch, max_new_tokens=9, eos_token_id=[], logits_processor=LogitsProcessorList([seen])
        )
    plain = organism.generate(batch, max_new_tokens=9, eos_token_id=[])
    assert generation.tokens != plain.tokens
    forced = generation.teacher_forced()
    wanted = recomputed(organism, method, forced)
    torch.testing.assert_close(torch.stack(seen.scores, dim=1), wanted, rtol=0, atol=ROUNDING)
    assert [list(tokens) for tokens in generation.tokens] == wanted.argmax(dim=-1).tolist()
    assert bool(wanted.isneginf().any()) == (method.beta > 0)
    with organism.apply(method):
        torch.testing.assert_close(organism.forward(forced).logits[:, -10:-1], wanted, rtol=0, atol=ROUNDING)


def one_by_one(vlm: VLM) -> Any:
    """A trace that has to see the clean branch alone, so that the branches do not decode at once."""
    return vlm.trace(sites.logits(positions="last"))


def test_every_branch_has_a_cache_and_positions_of_its_own(organism: VLM, batch: Batch) -> None:
    """The forward calls of the decoder, by the cache that they were given."""
    calls: dict[int, list[tuple[int, list[int]]]] = {}
    caches: dict[int, DynamicCache] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs["past_key_values"]
        caches[id(cache)] = cache
        calls.setdefault(id(cache), []).append((cache.get_seq_length(), kwargs["position_ids"][:, -1].tolist()))

    decoder = organism.model.get_submodule(organism.anatomy.modules["decoder"])
    handle = decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with organism.apply(Against(alpha=0.0)), one_by_one(organism):  # the branches run where the weight is 0 too
            organism.generate(batch, max_new_tokens=4, eos_token_id=[])
    finally:
        handle.remove()
    assert len(caches) == 2
    found = list(calls.values())
    for view in (batch, batch.without_images()):
        places = [n - 1 for n in view.lengths]
        wanted = [(0, places), *[(view.length + step, [one + 1 + step for one in places]) for step in range(3)]]
        assert wanted in found


def test_at_once_every_branch_keeps_its_positions(organism: VLM, batch: Batch) -> None:
    """The rows of the views come after those of the batch, with padding before them up to the longest."""
    calls: list[tuple[list[int], list[int]]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append((kwargs["position_ids"][:, -1].tolist(), kwargs["attention_mask"].sum(dim=1).tolist()))

    handle = organism.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with organism.apply(Against(make=(noise, image_free))):
            organism.generate(batch, max_new_tokens=4, eos_token_id=[])
    finally:
        handle.remove()
    lengths = [*batch.lengths, *batch.lengths, *batch.without_images().lengths]
    assert calls[3:] == [([n + step for n in lengths], [n + step + 1 for n in lengths]) for step in range(3)]


ROPE = ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids")
"""What Qwen-VL counts positions by."""


def test_what_a_model_keeps_in_itself_is_that_of_the_branch_that_runs(image: Any) -> None:
    """Qwen-VL writes into itself how far positions are behind tokens; without the image they are not."""
    vlm = BUILDERS["qwen2_vl"]()
    batch = vlm.encode([[image(0, 40, 24)]], ["<|image_pad|> is this red ?"])
    model: Any = vlm.model
    kept: dict[int, list[int]] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["past_key_values"].get_seq_length():
            kept.setdefault(id(kwargs["past_key_values"]), []).append(int(model.model.rope_deltas))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with vlm.apply(Against()), one_by_one(vlm):
            vlm.generate(batch, max_new_tokens=4, eos_token_id=[])
    finally:
        handle.remove()
    behind = int(model.model.get_rope_index(**{name: batch.inputs()[name] for name in ROPE})[1])
    assert behind < 0
    assert sorted(kept.values()) == [[behind] * 3, [0] * 3]


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "seed": 3, "temperature": 1.3}], ids=["greedy", "sampling"]
)
def test_at_weight_0_it_is_the_plain_model(options: dict[str, Any], organism: VLM, batch: Batch) -> None:
    plain = organism.generate(batch, max_new_tokens=30, repetition_penalty=1.1, **options)
    with organism.apply(Against(alpha=0.0)):
        generation = organism.generate(batch, max_new_tokens=30, repetition_penalty=1.1, **options)
    assert generation.tokens == plain.tokens
    assert any(plain.stopped)


def test_a_view_that_is_the_batch_leaves_the_logits(organism: VLM, batch: Batch) -> None:
    seen, plain = Seen(), Seen()
    with organism.apply(Against(alpha=2.0, make=(same,))):
        generation = organism.generate(
            batch, max_new_tokens=8, eos_token_id=[], logits_processor=LogitsProcessorList([seen])
        )
        forward = organism.forward(batch).logits
    organism.generate(batch, max_new_tokens=8, eos_token_id=[], logits_processor=LogitsProcessorList([plain]))
    assert generation.tokens == organism.generate(batch, max_new_tokens=8, eos_token_id=[]).tokens
    torch.testing.assert_close(torch.stack(seen.scores), torch.stack(plain.scores), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(forward, organism.forward(batch).logits, rtol=0, atol=ROUNDING)


def test_the_formula_by_hand() -> None:
    """Probabilities 0.6, 0.3, 0.06, 0.04: with beta 0.1 the third is kept at the bound, and the fourth is not."""
    clean = torch.tensor([[0.6, 0.3, 0.0601, 0.0399]]).log() + 5.0  # logits know no constant
    other = torch.tensor([[0.9, 0.05, 0.025, 0.025]]).log()
    method = Against(alpha=1.0, growth=0.5, beta=0.1)
    assert plausible(clean, 0.1).tolist() == [[True, True, True, False]]
    assert plausible(clean, 0.0).all()
    assert plausible(clean, 1.0).tolist() == [[True, False, False, False]]
    fused = method.fused(clean, [other], torch.tensor([2]))[0]  # weight 1 + 0.5 x 2
    for token, (p, q) in enumerate([(0.6, 0.9), (0.3, 0.05), (0.0601, 0.025)]):
        assert float(fused[token]) == pytest.approx(3 * (math.log(p) + 5) - 2 * math.log(q), abs=1e-4)
    assert float(fused[3]) == -math.inf
    assert int(fused.argmax()) == 1  # the plain choice is 0


LEAST = 14
"""The least number of new tokens, in decoding by hand."""


def by_hand(vlm: VLM, method: Against, batch: Batch, steps: int, processors: Any, seed: int | None) -> list[list[int]]:
    """Decoding without a cache, without `generate`: both branches over everything, fusion, APC, processors, choice."""
    rows: list[list[int]] = [[] for _ in range(batch.size)]
    ended = [False] * batch.size
    with torch.random.fork_rng():
        torch.manual_seed(seed or 0)
        for _ in range(steps):
            forced = batch.with_continuation([[*row, 0] for row in rows])  # a token more, so that the last is predicted
            clean, fused = (one[:, -1] for one in branches(vlm, method, forced))
            keeps = kept(clean, method.beta)
            if len(rows[0]) < LEAST:  # where the end alone is plausible and forbidden: the rule on the others
                alone = keeps[:, 2:3] & (keeps.sum(dim=-1, keepdim=True) == 1)
                anew = kept(clean.index_fill(1, torch.tensor([2]), -torch.inf), method.beta)
                keeps = torch.where(alone, anew, keeps)
            scores = fused.masked_fill(~keeps, -torch.inf)
            ids = torch.cat([batch.input_ids, torch.tensor(rows, dtype=torch.int64).view(batch.size, -1)], dim=1)
            scores = processors(ids, scores)
            chosen = scores.argmax(dim=-1) if seed is None else torch.multinomial(scores.softmax(dim=-1), 1)[:, 0]
            for row, token in enumerate(chosen.tolist()):
                rows[row].append(batch.pad_token_id if ended[row] else token)
                ended[row] |= token == 2
            if all(ended):
                break
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows]


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_processors_and_warpers_act_on_what_is_fused(seed: int | None, organism: VLM, batch: Batch) -> None:
    """Against decoding by hand; every option changes what is said, so that none is passed by."""
    method = Against(make=(zero,), beta=0.05)
    pad = (batch.attention_mask != 0).int().argmax(dim=1)
    parts = [
        RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=pad),
        MinNewTokensLengthLogitsProcessor(batch.length, LEAST, torch.tensor([2])),
    ]
    options: dict[str, Any] = {"repetition_penalty": 1.3, "min_new_tokens": LEAST}
    if seed is not None:
        parts += [TemperatureLogitsWarper(2.5), TopKLogitsWarper(2)]
        options |= {"do_sample": True, "temperature": 2.5, "top_k": 2, "seed": seed}
    with organism.apply(method):
        generation = organism.generate(batch, max_new_tokens=18, **options)
        others = []
        for name in ("repetition_penalty", "min_new_tokens", *(["temperature", "top_k"] if seed is not None else [])):
            left = {key: value for key, value in options.items() if key != name}
            others.append(organism.generate(batch, max_new_tokens=18, **left).tokens)
    wanted = by_hand(organism, method, batch, 18, LogitsProcessorList(parts), seed)
    assert [list(row) for row in generation.tokens] == wanted
    assert all(other != generation.tokens for other in others)


def test_processors_see_the_fusion_before_anything_else(organism: VLM, batch: Batch) -> None:
    """A bias on the clean logits would move APC; on the fused ones it does not."""
    token = 5
    scores = []
    for options in ({}, {"sequence_bias": {(token,): 100.0}}):
        seen = Seen()
        with organism.apply(Against(beta=0.1)):
            organism.generate(batch, max_new_tokens=1, logits_processor=LogitsProcessorList([seen]), **options)
        scores.append(seen.scores[0])
    others = torch.arange(scores[0].shape[1]) != token
    assert torch.equal(scores[0][:, others], scores[1][:, others])
    assert torch.equal(scores[0][:, token] + 100.0, scores[1][:, token])


def test_where_processors_forbid_all_that_apc_keeps_it_is_taken_anew(organism: VLM, batch: Batch) -> None:
    """With beta 1 APC keeps the most probable token alone: any contrast is then the plain greedy decoding, and where its choice,
    the end, is forbidden, the most probable of the others.
    """
    options: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40}
    plain = organism.generate(batch, **options)
    with organism.apply(Against(alpha=3.0, beta=1.0)):
        assert organism.generate(batch, **options).tokens == plain.tokens
    assert plain.tokens != organism.generate(batch, max_new_tokens=40, eos_token_id=[]).tokens  # the end would be said


def test_rows_end_by_the_fused_token_alone(organism: VLM, batch: Batch) -> None:
    method = Against(make=(zero,))
    with organism.apply(method):
        free = organism.generate(batch, max_new_tokens=12, eos_token_id=[])
        end = next(token for token in free.tokens[0][3:] if token not in free.tokens[0][:3])
        cut = organism.generate(batch, max_new_tokens=12, eos_token_id=end)
    for whole, row, stopped in zip(free.tokens, cut.tokens, cut.stopped, strict=True):
        assert stopped == (end in whole)
        assert row == (whole[: whole.index(end) + 1] if stopped else whole)


EDITS: list[Edit] = scale_heads([(1, 2), (3, 0)], 3.0)
RECORDED = (
    sites.resid_post(positions="all"),
    sites.z(layers=[2], positions="last"),
    sites.attention(queries="last", keys="image"),
    sites.logits(positions="last"),
    sites.vision_attention(),
    sites.vision_resid_post(layers=[1]),
)


@pytest.mark.parametrize("make", [image_free, zero, noise, blind], ids=["deleted", "zero", "noise", "attention"])
def test_traces_record_the_clean_branch_and_edits_change_it_alone(make: MakeView, organism: VLM, batch: Batch) -> None:
    """Bit for bit what a plain run records that is made to say the same, under the same edits."""
    method = Against(make=(make,))
    with organism.apply(Edits(EDITS), method), organism.trace(*RECORDED) as contrast:
        generation = organism.generate(batch, max_new_tokens=5, eos_token_id=[])
    forced = list(torch.tensor(generation.tokens).T)
    with organism.apply(Edits(EDITS)), organism.trace(*RECORDED) as plain:
        organism.generate(
            batch, max_new_tokens=5, eos_token_id=[], logits_processor=LogitsProcessorList([Seen(forced)])
        )
    assert len(contrast.steps) == len(plain.steps) == 5
    for site in RECORDED:
        assert contrast[site.label].layers == plain[site.label].layers
        for layer in plain[site.label]:
            assert torch.equal(contrast[site.label][layer], plain[site.label][layer])
        assert torch.equal(contrast.mask(site.label), plain.mask(site.label))
    clean, seen = contrast["logits"][0], Seen()
    with organism.apply(Edits(EDITS), method):
        organism.generate(batch, max_new_tokens=5, eos_token_id=[], logits_processor=LogitsProcessorList([seen]))
    view, edits = make(generation.teacher_forced())  # the contrast: without the edits of the clean branch
    without = organism.forward(view, edits=edits).logits[:, -6:-1]
    torch.testing.assert_close(torch.stack(seen.scores, dim=1), 2 * clean - without, rtol=0, atol=ROUNDING)


def test_forward_fuses_the_steps_of_decoding_alone(organism: VLM, batch: Batch) -> None:
    """Rows with continuations of 3, 0 and 1 tokens: the last 4, 1 and 2 positions are those of steps."""
    forced = batch.with_continuation([[7, 8, 9], [], [7]])
    plain = organism.forward(forced).logits
    without = organism.forward(forced.without_images()).logits
    with organism.apply(Against(alpha=0.5, growth=1.0)):
        fused = organism.forward(forced).logits
        last = organism.forward(forced, logits_to_keep=2).logits
    for row, n in enumerate(forced.n_generated):
        assert torch.equal(fused[row, : -n - 1], plain[row, : -n - 1])
        for step in range(n + 1):
            at = step - n - 1
            wanted = plain[row, at] + (0.5 + step) * (plain[row, at] - without[row, at])
            torch.testing.assert_close(fused[row, at], wanted, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(last, fused[:, -2:], rtol=0, atol=ROUNDING)


class LastLogits(GatheringProbe):
    """Keeps the logits of the last batch."""

    name: ClassVar[str] = "last_logits"

    def sites(self, anatomy: Any) -> list[Any]:
        return [sites.logits(positions="last")]

    def update(self, batch: Batch, trace: Any, labels: Any = None) -> None:
        self.seen = trace["logits"][0]

    def result(self) -> Any:
        return self.seen


def test_a_probe_measures_the_clean_branch_and_no_contrast_runs(organism: VLM, batch: Batch) -> None:
    calls: list[int] = []
    handle = organism.model.register_forward_pre_hook(lambda module, args: calls.append(1))
    try:
        with organism.apply(Against()):
            probe = LastLogits()
            organism.measure(probe, batch)
    finally:
        handle.remove()
    assert len(calls) == 1
    assert torch.equal(probe.result()[:, 0], organism.forward(batch, logits_to_keep=1).logits[:, 0])


def test_a_row_alone_says_what_it_says_in_a_batch(organism: VLM, batch: Batch) -> None:
    scenes = slitlamp.load_dataset("emoji_scenes/captions").take(3).items
    prompts = [scenes[0].prompt, "describe the image", f"{scenes[0].prompt} what is on the left side ?"]
    for make in (image_free, zero, noise):
        with organism.apply(Against(make=(make,), beta=0.1)):
            together = organism.generate(batch, max_new_tokens=20).tokens
            for row, (scene, prompt) in enumerate(zip(scenes, prompts, strict=True)):
                alone = organism.encode([scene.image], [prompt])
                assert organism.generate(alone, max_new_tokens=20).tokens[0] == together[row]


@pytest.mark.parametrize("name", BUILDERS)
def test_in_every_family_steps_equal_one_forward_pass(name: str, image: Any) -> None:
    """Models that count positions by themselves, generate by a part of theirs, or read the image by cross-attention included."""
    vlm = BUILDERS[name]()
    family = vlm.anatomy.family
    placeholder = "" if family.placeholder is None else getattr(vlm.processor, family.placeholder)
    texts = ["is this red ?", "what is in the image and where ?"]
    batch = vlm.encode([[image(0, 40, 24)], [image(1)]], [f"{placeholder} {text}" for text in texts])
    generator: Any = vlm.model.get_submodule(vlm.anatomy.modules["generator"])
    for make in (image_free, noise):
        with vlm.apply(Against(alpha=2.0, make=(make,))):
            generation = vlm.generate(batch, max_new_tokens=5, eos_token_id=[])
            logits = vlm.forward(generation.teacher_forced()).logits[:, -6:-1]
        logits[..., generator.generation_config.suppress_tokens] = -torch.inf
        assert [list(tokens) for tokens in generation.tokens] == logits.argmax(dim=-1).tolist()


def test_the_model_is_as_it_was_after_a_run_and_after_errors_in_either_branch(organism: VLM, batch: Batch) -> None:
    organism.forward(batch)  # transformers puts its own output hooks on at the first call
    before = snapshot(organism)
    weights = copy.deepcopy(organism.model.state_dict())

    def fails_at(step: int) -> MakeView:
        def fail(values: Tensor, calls: Any) -> Tensor:
            if calls.number == step:
                raise Planned
            return values

        return lambda batch: (batch, [Edit("mlp_out", 2, fail), *knock_out([2], "all", "image")])

    of_clean = Edits([fails_at(2)(batch)[1][0]])  # type: ignore[list-item]  # the first is an edit of states
    failing: list[tuple[tuple[Any, ...], Callable[[], Any]]] = [
        ((Against(make=(fails_at(0),)),), lambda: organism.forward(batch)),
        ((Against(make=(fails_at(0),)),), lambda: organism.generate(batch, max_new_tokens=4)),
        ((Against(make=(fails_at(2),)),), lambda: organism.generate(batch, max_new_tokens=4)),
        ((of_clean, Against(make=(blind,))), lambda: organism.generate(batch, max_new_tokens=4)),
    ]
    for interventions, run in failing:
        with organism.apply(*interventions), organism.trace(*RECORDED), pytest.raises(Planned):
            run()
        assert snapshot(organism) == before
    with organism.apply(Against(make=(blind,))), organism.trace(*RECORDED):
        organism.generate(batch, max_new_tokens=4, do_sample=True, seed=0)
    assert snapshot(organism) == before
    for name, tensor in organism.model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_what_is_refused(organism: VLM, batch: Batch) -> None:
    with (
        pytest.raises(UnsupportedError, match="Against and Against are both contrasts"),
        organism.apply(Against(), Against()),
    ):
        pass
    with organism.apply(Against()):
        with pytest.raises(UnsupportedError, match="apply one at a time"), organism.apply(Against()):
            pass
        for match, options in [
            ("streamer beside Against", {"num_beams": 2, "streamer": object()}),
            ("past_key_values beside Against", {"past_key_values": DynamicCache(config=organism.model.config)}),
            ("custom_generate beside Against", {"custom_generate": print}),
            ("dola_generation beside Against", {"dola_layers": "low"}),
        ]:
            with pytest.raises(UnsupportedError, match=match):
                organism.generate(batch, max_new_tokens=2, **options)
        with (
            pytest.raises(UnsupportedError, match="interventions run with hooks"),
            organism.trace(sites.z(), backend="nnsight"),
        ):
            organism.forward(batch)
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="beta must be between 0 and 1"), organism.apply(Against(beta=beta)):
            pass


def test_a_streamer_is_given_the_chosen_tokens(organism: VLM, batch: Batch) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.given: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.given.append(value.flatten().tolist())

        def end(self) -> None:
            self.given.append([])

    streamer = Streamer()
    one = organism.encode(batch.images[0], ["describe the image"])
    with organism.apply(Against()):
        generation = organism.generate(one, max_new_tokens=4, streamer=streamer)
    prompt, *tokens, end = streamer.given
    assert prompt == one.input_ids[0].tolist()
    assert tuple(token for (token,) in tokens) == generation.tokens[0]
    assert end == []
