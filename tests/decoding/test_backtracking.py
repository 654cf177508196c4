"""Decoding that goes back: against the rules by hand, and against the same decoding without a cache, row by row."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import BUILDERS
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

import slitlamp
from interventions import (
    M3ID,
    ActivationAddition,
    ClsPruning,
    CutAttention,
    FastVPruning,
    HeadReinforcement,
    InactiveHeads,
    InformedTokenBoost,
    SinkRedistribution,
)
from slitlamp.decoding import BacktrackingDecoding, Intervention
from slitlamp.decoding.backtracking import CROPPABLE
from slitlamp.decoding.generation import Traceback
from slitlamp.decoding.traceback_rules import Row, Watch
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import Batch
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

Found = tuple[list[int], list[Traceback]]
STOP = 7
"""The full stop of the embedded model."""


@dataclass(eq=False)
class Back(BacktrackingDecoding):
    """Stopped by the projection of the states on a random direction, or by a function of them."""

    layer: int = 3
    threshold: float = 0.0
    seed: int = 0
    score: Callable[[Tensor], Tensor] | None = None
    begins: Callable[[Sequence[int], int], bool] | None = None
    ends_sentence: Callable[[int], bool] = field(default=lambda token: token == STOP)

    name: ClassVar[str] = "Back"

    def project(self, states: Tensor) -> Tensor:
        direction = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(self.seed))
        states = states.float()
        return (states - states.mean(dim=-1, keepdim=True)) @ direction / states.norm(dim=-1)

    def watch(self, run: Any) -> Watch:
        return Watch(self.layer, self.score or self.project, self.threshold, self.begins, self.ends_sentence)


def always(states: Tensor) -> Tensor:
    return torch.ones(len(states), device=states.device)


# -- the rules ------------------------------------------------------------------------------------------------------


def row(fires: Callable[[float], bool] | None = None, *, caps: tuple[int, int] = (2, 9), limit: int = 50) -> Row:
    return Row(Watch(0, lambda states: states, 0.5, None, lambda token: token == 0), None, caps, [99], limit)


def test_going_back_by_hand() -> None:
    """Sentence 11 12 13 with confidences .9 .3 .6: stopped at the fourth step, it goes back to the second."""
    one = row()
    for token, confidence in ((11, 0.9), (12, 0.3), (13, 0.6)):
        assert not one.take(token, 0.0, confidence, [token, token + 100, token + 200])
        one.columns.append(len(one.columns))
    assert one.take(14, 0.7, 0.1, [14, 114, 214])  # the least confident of all, but not among [s, t)
    assert one.tokens == [11, 112]
    assert one.columns == [0]
    assert one.tracebacks == [Traceback(3, 14, 0.7, 1, 12, 112, capped=False)]
    one.columns.append(1)
    # the same place again, where two have been tried by now
    assert one.take(15, 0.9, 0.8, [15, 115, 215])
    assert one.tokens == [11, 212]
    assert one.tracebacks[-1] == Traceback(2, 15, 0.9, 1, 112, 212, capped=False)
    one.columns.append(1)
    # the cap of two: the sentence as it was, with the token that was held back
    assert one.take(16, 0.8, 0.8, [16, 116, 216])
    assert one.tokens == [11, 12]
    assert one.tracebacks[-1] == Traceback(2, 16, 0.8, 1, 212, 12, capped=True)
    for expected in (13, 14):
        one.columns.append(len(one.columns))
        assert not one.take(77, 9.0, 0.5, [77])  # what is chosen, and its score, do not count
        assert one.tokens[-1] == expected
    assert not one.take(17, 9.0, 0.5, [17, 117])  # no longer watched
    assert not one.take(0, 9.0, 0.5, [0, 100])
    assert one.tokens == [11, 12, 13, 14, 17, 0]
    # a new sentence is watched again, and has nothing before its first token
    assert one.take(18, 0.7, 0.5, [18, 118, 218])
    assert one.tokens[-1] == 118
    assert one.tracebacks[-1] == Traceback(6, 18, 0.7, 6, 18, 118, capped=False)
    assert one.n_watched == 3 + 1 + 1 + 1 + 1


def test_steps_without_another_token_are_not_gone_back_to() -> None:
    one = row()
    one.take(11, 0.0, 0.2, [11])
    one.take(12, 0.0, 0.9, [12, 112])
    assert one.take(13, 1.0, 0.5, [13, 113])
    assert one.tokens == [11, 112]
    bare = row()
    bare.take(11, 0.0, 0.2, [11])
    assert not bare.take(12, 1.0, 0.9, [12])
    assert bare.tokens == [11, 12]
    assert bare.tracebacks == []
    assert not bare.take(13, 1.0, 0.9, [13, 113])  # the rest of the sentence is not looked at
    assert bare.n_watched == 2


def test_the_cap_of_a_text_counts_all_sentences() -> None:
    one = row(caps=(2, 1))
    one.take(11, 1.0, 0.5, [11, 111])
    one.take(0, 0.0, 0.5, [0, 100])
    assert not one.take(12, 1.0, 0.5, [12, 112])
    assert one.tokens == [111, 0, 12]
    assert len(one.tracebacks) == one.n_watched - 1 == 1


def test_a_text_ends_at_an_end_token_or_the_limit_also_where_they_are_put_there() -> None:
    one = row()
    one.take(11, 1.0, 0.5, [11, 99])
    assert one.ended
    assert one.tokens == [99]
    two = row(limit=1)
    two.take(11, 0.0, 0.5, [11, 99])
    assert two.ended


# -- against decoding without a cache -------------------------------------------------------------------------------


def slowly(
    vlm: VLM,
    batch: Batch,
    method: Back,
    limit: int,
    ends: Sequence[int],
    processors: Any = None,
    seed: int | None = None,
) -> Found:
    """One row, every step from one forward pass over the whole text; what was tried is known by the text before it."""
    assert batch.size == 1
    generator: Any = vlm.model.get_submodule(vlm.anatomy.modules["generator"])
    suppressed = list(generator.generation_config.suppress_tokens or [])
    text: list[int] = []
    log: list[Traceback] = []
    tried: dict[tuple[int, ...], set[int]] = {}
    original: list[int] | None = None
    waiting: list[int] = []
    here, total, watched = 0, 0, method.max_per_text > 0
    torch.manual_seed(seed or 0)

    def say(token: int) -> bool:
        nonlocal original, here, watched
        text.append(token)
        if method.ends_sentence(token):
            original, here, watched = None, 0, total < method.max_per_text
        return token in ends or len(text) == limit

    while True:
        site = sites.resid_post([method.layer], "last") if method.layer >= 0 else sites.resid_pre(0, "last")
        forced = batch.with_continuation([text])
        with vlm.trace(site) as trace:
            logits = vlm.forward(forced).logits[0, -len(text) - 1 :].float()
        state = trace[site.label][max(method.layer, 0)][:, -1]
        scores = logits.clone()
        scores[:, suppressed] = -torch.inf
        if processors is not None:
            ids = [
                torch.cat([batch.input_ids, torch.tensor([text[:n]], dtype=torch.int64)], 1) for n in range(len(logits))
            ]
            scores = torch.cat([processors(one, each[None]) for one, each in zip(ids, scores, strict=True)])
        if seed is None:
            chosen = int(scores[-1].argmax())
        else:
            chosen = int(torch.multinomial(scores[-1:].softmax(-1), 1))
        if waiting:
            if say(waiting.pop(0)):
                return text, log
            continue
        start = max((n + 1 for n, one in enumerate(text) if method.ends_sentence(one)), default=0)
        looked_at = watched and (method.begins is None or method.begins(text, chosen))
        score = float((method.score or method.project)(state)[0])
        if not looked_at or score <= method.threshold:
            tried[tuple(text)] = {chosen}
            if say(chosen):
                return text, log
            continue
        said, t = [*text, chosen], len(text)
        tried[tuple(text)] = {chosen}
        options = {}
        for place in range(start, t) if t > start else [t]:
            done = tried[tuple(said[:place])]
            left = [one for one in scores[place].argsort(descending=True).tolist() if one not in done]
            if scores[place, left[0]] > -torch.inf:
                options[place] = (float(logits[place].double().softmax(-1).max()), left[0])
        if options and here < method.max_tracebacks and total < method.max_per_text:
            place = min(options, key=lambda one: options[one][0])
            token = options[place][1]
            log.append(Traceback(t, chosen, score, place, said[place], token, capped=False))
            original = original or said[start:]
            here, total = here + 1, total + 1
            tried[tuple(said[:place])].add(token)
            del text[place:]
        else:
            watched = False
            if original is None:
                token = chosen
            else:
                place = start + next(n for n, one in enumerate(original) if one != said[start + n])
                token, *waiting = original[place - start :]
                log.append(Traceback(t, chosen, score, place, said[place], token, capped=True))
                del text[place:]
        if say(token):
            return text, log


def same(found: Sequence[Traceback], wanted: Sequence[Traceback]) -> bool:
    """Equal, scores up to rounding."""
    assert [one.score for one in found] == pytest.approx([one.score for one in wanted], abs=1e-4)
    return [{**vars(one), "score": 0} for one in found] == [{**vars(one), "score": 0} for one in wanted]


ROWS = [
    "Describe this image in detail.",
    "describe the image",
    "what is there ?",
    "describe the picture briefly . what ?",
]


@pytest.fixture(scope="module")
def scenes() -> list[Any]:
    return list(slitlamp.load_dataset("emoji_scenes/captions").take(4).items)


@pytest.fixture(scope="module")
def batch(organism: VLM, scenes: list[Any]) -> Batch:
    return organism.encode([one.image for one in scenes], ROWS)


@pytest.fixture(scope="module")
def alone(organism: VLM, scenes: list[Any]) -> list[Batch]:
    return [organism.encode([one.image], [prompt]) for one, prompt in zip(scenes, ROWS, strict=True)]


METHODS: dict[str, Back] = {
    "few": Back(threshold=1.0, seed=1),
    "many": Back(threshold=0.3, seed=1, max_tracebacks=2),
    "once": Back(threshold=0.5, max_tracebacks=1, max_per_text=100),
    "input": Back(threshold=0.6, layer=-1),
    "words": Back(threshold=-0.2, seed=2, layer=5, begins=lambda before, token: token > 44 and len(before) > 3),
    "text cap": Back(threshold=0.3, seed=1, max_per_text=2),
    "always": Back(score=always),
}


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_decoding_without_a_cache(name: str, organism: VLM, batch: Batch, alone: list[Batch]) -> None:
    """Rows of one batch, which go back at different steps, and each row alone."""
    method = METHODS[name]
    wanted = [slowly(organism, one, method, 28, organism.end_tokens) for one in alone]
    assert any(log for _, log in wanted)
    with organism.apply(method):
        together = organism.generate(batch, max_new_tokens=28)
        singly = [organism.generate(one, max_new_tokens=28) for one in alone]
    assert together.tokens != organism.generate(batch, max_new_tokens=28).tokens or name == "always"
    for number, (text, log) in enumerate(wanted):
        assert together.tokens[number] == singly[number].tokens[0] == tuple(text)
        assert same(together.tracebacks[number], log)
        assert same(singly[number].tracebacks[0], log)


@pytest.mark.parametrize(
    "other",
    [
        HeadReinforcement(alpha=2.0),
        CutAttention("generated", "text", layers=[2, 3]),
        CutAttention("text_after_image", "image", layers=[1]),
        InformedTokenBoost(2.0, 1.0),
        ActivationAddition([(-1.0) ** n for n in range(192)], scale=0.3),
        ClsPruning(0.3),
        ClsPruning(0.3, positions="original"),
        FastVPruning(0.3, layer=1),
        InactiveHeads(2.0),
        SinkRedistribution(tau=2.0, rho=0.3),
    ],
    ids=lambda one: one.name,
)
def test_other_interventions_act_as_in_ordinary_decoding(
    other: Intervention, organism: VLM, batch: Batch, alone: list[Batch]
) -> None:
    method = METHODS["many"]
    with organism.apply(other):
        wanted = [slowly(organism, one, method, 24, organism.end_tokens) for one in alone]
    with organism.apply(method, other):
        generation = organism.generate(batch, max_new_tokens=24)
    assert sum(len(log) for _, log in wanted) > 3
    assert [list(one) for one in generation.tokens] == [text for text, _ in wanted]
    assert all(same(found, log) for found, (_, log) in zip(generation.tracebacks, wanted, strict=True))
    with organism.apply(method):
        assert organism.generate(batch, max_new_tokens=24).tokens != generation.tokens


@pytest.mark.parametrize("seed", [None, 3, 4])
def test_processors_and_warpers_act_as_in_ordinary_decoding(
    seed: int | None, organism: VLM, alone: list[Batch]
) -> None:
    """The next-ranked token is the next by the scores after them; confidence is the model's own."""
    one = alone[0]
    parts: list[Any] = [
        RepetitionPenaltyLogitsProcessor(1.3),
        MinNewTokensLengthLogitsProcessor(one.length, 14, torch.tensor([2])),
    ]
    options: dict[str, Any] = {"repetition_penalty": 1.3, "min_new_tokens": 14}
    if seed is not None:
        parts += [TemperatureLogitsWarper(1.5), TopKLogitsWarper(3)]
        options |= {"do_sample": True, "temperature": 1.5, "top_k": 3, "seed": seed}
    method = METHODS["many"]
    with torch.random.fork_rng():
        text, log = slowly(organism, one, method, 24, organism.end_tokens, LogitsProcessorList(parts), seed)
    with organism.apply(method):
        generation = organism.generate(one, max_new_tokens=24, **options)
    assert list(generation.tokens[0]) == text
    assert len(log) > 2
    assert same(generation.tracebacks[0], log)


@pytest.mark.parametrize("sample", [False, True])
def test_rows_with_processors_say_what_they_say_alone(
    sample: bool, organism: VLM, batch: Batch, alone: list[Batch]
) -> None:
    """Processors see each row's own text, however far others are; with one token to choose from, sampling is greedy."""
    options: dict[str, Any] = {"min_new_tokens": 12, "no_repeat_ngram_size": 4, "max_new_tokens": 24}
    if sample:
        options |= {"do_sample": True, "top_p": 1e-6, "seed": 0}
    with organism.apply(METHODS["few"]):
        together = organism.generate(batch, **options)
        singly = [organism.generate(one, **options).tokens[0] for one in alone]
    assert list(together.tokens) == singly
    with organism.apply(METHODS["few"]):
        assert together.tokens != organism.generate(batch, max_new_tokens=24).tokens


@pytest.mark.parametrize("name", BUILDERS)
def test_every_family_goes_back_or_is_refused_by_name(name: str, image: Any) -> None:
    """Models that count positions by themselves, generate by a part of theirs, or read the image by cross-attention included."""
    vlm = BUILDERS[name]()
    family = vlm.anatomy.family
    placeholder = "" if family.placeholder is None else getattr(vlm.processor, family.placeholder)
    pictures, texts = [[image(0, 40, 24)], [image(1)]], ["is this red ?", "what is in the image and where ?"]
    prompts = [f"{placeholder} {text}" for text in texts]
    batch = vlm.encode(pictures, prompts)
    method = Back(layer=1, threshold=0.4, ends_sentence=lambda token: token % 4 == 0, max_tracebacks=2)
    if set(vlm.anatomy.attention_types) - set(CROPPABLE):
        with pytest.raises(UnsupportedError, match=f"cache of this {family.name}"), vlm.apply(method):
            pass
        return
    with vlm.apply(method):
        found = vlm.generate(batch, max_new_tokens=14, eos_token_id=[])
    n_back = 0
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        text, log = slowly(vlm, vlm.encode([picture], [prompt]), method, 14, [])
        assert list(found.tokens[number]) == text
        assert same(found.tracebacks[number], log)
        n_back += len(log)
    assert n_back > 0


# -- termination, the cache, traces, what is left behind ------------------------------------------------------------


class Calls:
    """Counts the forward calls of a model, and keeps what they ran with."""

    def __init__(self, vlm: VLM) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.cached: list[int] = []
        self._handle = vlm.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.inputs.append({name: kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids")})
        self.cached.append(kwargs["past_key_values"].get_seq_length())

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


@pytest.mark.parametrize(("per_sentence", "per_text"), [(1, 1), (1, 100), (5, 7), (40, 1000), (0, 5), (3, 0)])
def test_a_detector_that_always_fires_ends(per_sentence: int, per_text: int, organism: VLM, batch: Batch) -> None:
    """Where nothing ends a sentence or a text, it ends with what would have been said without it."""
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": []}
    plain = organism.generate(batch, **options)
    method = Back(score=always, max_tracebacks=per_sentence, max_per_text=per_text, ends_sentence=lambda token: False)
    with organism.apply(method), Calls(organism) as calls:
        generation = organism.generate(batch, **options)
    assert generation.tokens == plain.tokens
    n_back = min(per_sentence, per_text)
    for log in generation.tracebacks:
        assert [one.capped for one in log] == ([False] * n_back + [True] if n_back else [])
    assert len(calls.inputs) <= (2 * n_back + 1) * 12
    sentences = Back(score=always, max_tracebacks=per_sentence, max_per_text=per_text)
    with organism.apply(sentences), Calls(organism) as calls:
        generation = organism.generate(batch, max_new_tokens=30)
    assert all(sum(not one.capped for one in log) <= per_text for log in generation.tracebacks)
    assert len(calls.inputs) <= batch.size * (2 * min(per_text, 30 * per_sentence) + 1) * 30


def test_the_cache_is_cut_off(organism: VLM, batch: Batch, alone: list[Batch]) -> None:
    """Alone, it holds the prompt and the text at every step; in a batch, no more than the steps that some row still needs."""
    method = METHODS["many"]
    with organism.apply(method):
        for one in alone:
            with Calls(organism) as calls:
                generation = organism.generate(one, max_new_tokens=28)
            cached = calls.cached[1:]
            back = any(entry.back_to < entry.step for entry in generation.tracebacks[0])
            assert any(a >= b for a, b in pairwise(cached)) == back
            for length, inputs in zip(calls.cached[1:], calls.inputs[1:], strict=True):
                assert inputs["attention_mask"] is None  # nothing is hidden
                assert int(inputs["position_ids"][0, -1]) == length
        with Calls(organism) as calls:
            generation = organism.generate(batch, max_new_tokens=28)
    ends = torch.tensor([len(one) - 1 for one in generation.tokens])
    assert not all(bool(inputs["attention_mask"][:, batch.length :].all()) for inputs in calls.inputs)
    for length, inputs in zip(calls.cached[1:], calls.inputs[1:], strict=True):
        assert inputs["attention_mask"].shape[1] == length + 1
        prompt, text = inputs["attention_mask"].split([batch.length, length + 1 - batch.length], dim=1)
        assert torch.equal(prompt, batch.attention_mask)
        assert bool(text[:, -1].all())
        place = inputs["position_ids"][:, -1] - prompt.sum(1)
        assert bool(((place == text.sum(1) - 1) | (place == ends)).all())  # rows that have ended see anything


def test_rows_of_equal_prompts_which_need_no_mask_at_first(organism: VLM, scenes: list[Any]) -> None:
    method, prompts = METHODS["many"], ["describe the image"] * 4
    with organism.apply(method), Calls(organism) as calls:
        together = organism.generate(organism.encode([one.image for one in scenes], prompts), max_new_tokens=28)
    masks = [inputs["attention_mask"] is None for inputs in calls.inputs]
    assert masks[1]
    assert not all(masks)
    for number, scene in enumerate(scenes):
        one = organism.encode([scene.image], prompts[:1])
        text, log = slowly(organism, one, method, 28, organism.end_tokens)
        assert list(together.tokens[number]) == text
        assert same(together.tracebacks[number], log)


def test_traces_are_those_of_a_plain_generation_of_the_final_text(organism: VLM, batch: Batch) -> None:
    wanted = [
        sites.resid_post(positions="all"),
        sites.attention(queries="last", keys="all"),
        sites.logits(positions="before_generated"),
    ]
    method = METHODS["many"]
    with organism.apply(method):
        bare = organism.generate(batch, max_new_tokens=16)
        with organism.trace(*wanted) as trace:
            generation = organism.generate(batch, max_new_tokens=16)
    assert bare.tokens == generation.tokens
    assert bare.tracebacks == generation.tracebacks
    assert bare.n_image == generation.n_image == (64,) * batch.size
    assert bare.seconds > 0
    assert any(generation.tracebacks)
    assert len(trace.steps) == max(map(len, generation.tokens))
    forced = generation.teacher_forced()
    with organism.trace(
        sites.resid_post(positions="before_generated"), sites.logits(positions="before_generated")
    ) as once:
        organism.forward(forced)
    with organism.trace(sites.resid_post(positions="before_generated")) as steps, organism.apply(method):
        organism.generate(batch, max_new_tokens=16)
    assert torch.equal(steps.mask("resid_post"), once.mask("resid_post"))
    for layer in range(organism.anatomy.n_layers):
        torch.testing.assert_close(steps["resid_post"][layer], once["resid_post"][layer], rtol=0, atol=1e-4)
    torch.testing.assert_close(trace["logits"][0], once["logits"][0], rtol=0, atol=1e-4)


def test_traces_of_a_sampled_text_with_processors(organism: VLM, batch: Batch) -> None:
    options: dict[str, Any] = {
        "do_sample": True,
        "seed": 5,
        "temperature": 1.4,
        "min_new_tokens": 9,
        "max_new_tokens": 14,
    }
    state = torch.get_rng_state()
    with organism.apply(METHODS["few"]):
        bare = organism.generate(batch, **options)
        with organism.trace(sites.z(layers=[1], positions="last")):
            assert organism.generate(batch, **options).tokens == bare.tokens
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3, "temperature": 1.2, "top_k": 20}])
def test_a_detector_that_never_fires_leaves_the_text(options: dict[str, Any], organism: VLM, batch: Batch) -> None:
    plain = organism.generate(batch, max_new_tokens=40, repetition_penalty=1.1, **options)
    with organism.apply(Back(threshold=torch.inf)):
        generation = organism.generate(batch, max_new_tokens=40, repetition_penalty=1.1, **options)
    assert generation.tokens == plain.tokens
    assert generation.tracebacks == ((),) * batch.size
    assert plain.tracebacks == ()
    assert repr(generation) == repr(plain)


def test_forward_is_the_plain_one(organism: VLM, batch: Batch) -> None:
    plain = organism.forward(batch).logits
    with organism.apply(Back(score=always)):
        assert torch.equal(organism.forward(batch).logits, plain)


def test_the_log_is_counted_in_the_repr(organism: VLM, batch: Batch) -> None:
    with organism.apply(METHODS["many"]):
        generation = organism.generate(batch, max_new_tokens=28)
    every = [one for log in generation.tracebacks for one in log]
    capped = sum(one.capped for one in every)
    assert 0 < capped < len(every)
    line = f"tracebacks: {len(every) - capped} in {sum(map(bool, generation.tracebacks))} texts, {capped} times"
    assert line in repr(generation).splitlines()[-1]


def test_what_is_refused(organism: VLM, batch: Batch) -> None:
    for pair in ((Back(), Back()), (M3ID(), Back()), (Back(), M3ID())):
        match = r"Back and (Back|M3ID) both have a decoding loop"
        with pytest.raises(UnsupportedError, match=match), organism.apply(*pair):
            pass
        with (
            organism.apply(pair[0]),
            pytest.raises(UnsupportedError, match="apply one at a time"),
            organism.apply(pair[1]),
        ):
            pass
    for caps in ({"max_tracebacks": -1}, {"max_per_text": -2}):
        with pytest.raises(InputError, match=f"{next(iter(caps))} must be 0 or more"), organism.apply(Back(**caps)):
            pass
    with organism.apply(Back()):
        for match, options in [
            ("past_key_values beside Back", {"past_key_values": DynamicCache(config=organism.model.config)}),
            ("custom_generate beside Back", {"custom_generate": print}),
            ("streamer beside Back", {"streamer": object()}),
            ("dola_generation beside Back", {"dola_layers": "low"}),
            ("use_cache=False beside Back", {"use_cache": False}),
            ("MaxTimeCriteria beside Back", {"max_time": 5.0}),
            ("found StaticLayer", {"cache_implementation": "static"}),
        ]:
            with pytest.raises(UnsupportedError, match=match):
                organism.generate(batch, max_new_tokens=2, **options)


def test_sliding_windows_that_only_the_cache_knows_of_are_refused(build_llava: Any, image: Any) -> None:
    """Mistral's configuration has a window, and no list of layers with it."""
    from transformers import MistralConfig

    vlm = build_llava()
    text = vlm.model.config.text_config
    windowed = copy.deepcopy(vlm.model)
    windowed.config.text_config = MistralConfig(**{**text.to_dict(), "model_type": "mistral", "sliding_window": 8})
    windowed.config.text_config._attn_implementation = "sdpa"
    other = VLM.wrap(windowed, vlm.processor)
    batch = other.encode([image(0)], ["<image> is there a dog ?"])
    with other.apply(Back(layer=1)), pytest.raises(UnsupportedError, match="found DynamicSlidingWindowLayer"):
        other.generate(batch, max_new_tokens=3)


def test_after_an_error_on_the_way_the_model_is_as_it_was(organism: VLM, batch: Batch) -> None:
    organism.forward(batch)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in organism.model.modules()]
    n_calls = 0

    def fail(states: Tensor) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 6:
            raise RuntimeError("planned")
        return always(states)

    with organism.apply(Back(score=fail)), pytest.raises(RuntimeError, match="planned"):
        organism.generate(batch, max_new_tokens=20)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in organism.model.modules()] == hooks
