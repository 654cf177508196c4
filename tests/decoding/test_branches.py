"""Decode steps over all branches at once: held to the branches one by one, and to the calls that the model really gets.

A trace of the logits, which has to see the clean branch alone, makes the branches run one by one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from contrasts import ROUNDING, Against, Planned, Seen, blind, noise, unequal_prompts, zero
from edits import Edits
from tiny_models import BUILDERS
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from untouched import snapshot

from interventions import ClsPruning, OutlierContrast, SkipPerceptual
from slitlamp.decoding import Generation, branches, image_free
from slitlamp.decoding.edits import replace_tokens, scale_heads
from slitlamp.errors import UnsupportedError
from slitlamp.models import Batch
from slitlamp.tracing import AttentionEdit, Edit, sites
from slitlamp.vlm import VLM

ONE_BY_ONE = {
    "aya_vision": "sliding windows",
    "paligemma gemma2": "sliding windows",
    "gemma3": "sliding windows",
    "llama4": "chunks",
    "mllama": "cross-attention",
}
"""Families whose branches do not run at once, and what keeps them from it."""


@pytest.fixture(scope="module")
def batch(organism: VLM) -> Batch:
    """Three rows of unequal prompts."""
    return unequal_prompts(organism)


@contextlib.contextmanager
def counted(vlm: VLM) -> Iterator[list[int]]:
    """The rows of every forward call of the module that generates."""
    rows: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        rows.append(len(given))

    generator = vlm.model.get_submodule(vlm.anatomy.modules["generator"])
    handle = generator.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def run(vlm: VLM, batch: Batch, seen: Seen, *others: Any, one_by_one: bool = False, **options: Any) -> Generation:
    """A generation under interventions, with the scores of its steps."""
    sees = vlm.trace(sites.logits(positions="last")) if one_by_one else contextlib.nullcontext()
    with vlm.apply(*others), sees:
        return vlm.generate(batch, logits_processor=LogitsProcessorList([seen]), **options)


def both_ways(vlm: VLM, batch: Batch, *others: Any, **options: Any) -> tuple[Generation, torch.Tensor]:
    """A generation at once, once its scores [batch, step, vocab] and its tokens are those of the branches one by one. What
    other interventions run beforehand is not counted.
    """
    n_branches = 1 + len(others[-1].make)
    at_once, one_by_one = Seen(), Seen()
    with counted(vlm) as rows:
        generation = run(vlm, batch, at_once, *others, **options)
    steps = len(at_once.scores)
    wanted_rows = [batch.size] * n_branches + [batch.size * n_branches] * (steps - 1)
    assert rows[-len(wanted_rows) :] == wanted_rows
    with counted(vlm) as rows:
        separate = run(vlm, batch, one_by_one, *others, one_by_one=True, **options)
    assert rows[-n_branches * steps :] == [batch.size] * n_branches * steps
    assert generation.tokens == separate.tokens
    found, wanted = (torch.stack(one.scores, dim=1) for one in (at_once, one_by_one))
    torch.testing.assert_close(found, wanted, rtol=0, atol=ROUNDING)
    return generation, found


METHODS = {
    "shorter rows": Against(),
    "APC": Against(beta=0.1),
    "edits of the prompt": Against(make=(zero,), beta=0.01),
    "equal rows": Against(make=(noise,)),
    "weights that grow": Against(alpha=0.0, growth=0.2),
    "two views": Against(make=(image_free, noise)),
}


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "seed": 5, "temperature": 1.5}], ids=["greedy", "sampling"]
)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_at_once_is_one_by_one(method: Against, options: dict[str, Any], organism: VLM, batch: Batch) -> None:
    """Rows that end, each at its own step, and the draws of a seed included."""
    generation, _ = both_ways(organism, batch, method, max_new_tokens=40, **options)
    plain = organism.generate(batch, max_new_tokens=40, **options)
    assert any(generation.stopped)
    assert len({len(tokens) for tokens in generation.tokens}) > 1
    assert generation.tokens != plain.tokens


@pytest.mark.parametrize("name", BUILDERS)
def test_in_every_family(name: str, image: Any) -> None:
    vlm = BUILDERS[name]()
    family = vlm.anatomy.family
    placeholder = "" if family.placeholder is None else getattr(vlm.processor, family.placeholder)
    texts = ["is this red ?", "what is in the image and where ?"]
    batch = vlm.encode([[image(0, 40, 24)], [image(1)]], [f"{placeholder} {text}" for text in texts])
    for make in (image_free, noise):
        method = Against(alpha=2.0, make=(make,))
        if name in ONE_BY_ONE:
            with counted(vlm) as rows:
                run(vlm, batch, Seen(), method, max_new_tokens=5, eos_token_id=[])
            assert rows == [2] * 10
        else:
            both_ways(vlm, batch, method, max_new_tokens=5, eos_token_id=[])


def test_some_families_share_keys_among_heads() -> None:
    """That is, grouped-query attention is among what the test above runs over."""
    grouped = [name for name in BUILDERS if name not in ONE_BY_ONE]
    sizes = [BUILDERS[name]().anatomy for name in grouped]
    assert any(one.n_kv_heads < one.n_heads for one in sizes)
    assert any(one.n_kv_heads == one.n_heads for one in sizes)


def test_a_view_of_some_tokens_alone(organism: VLM, batch: Batch) -> None:
    """DAMRO's, whose features are put in at the prompt."""
    at_once, one_by_one = Seen(), Seen()
    with counted(organism) as rows:
        run(organism, batch, at_once, OutlierContrast(alpha=1.0), max_new_tokens=6, eos_token_id=[])
    assert rows[-5:] == [6] * 5
    run(organism, batch, one_by_one, OutlierContrast(alpha=1.0), one_by_one=True, max_new_tokens=6, eos_token_id=[])
    torch.testing.assert_close(torch.stack(at_once.scores), torch.stack(one_by_one.scores), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_a_batch_that_brings_features_and_positions(positions: Any, organism: VLM, batch: Batch) -> None:
    """Pruning, after which the clean branch is shorter than a view of the whole image; its last position is where it was."""
    prune = ClsPruning(keep=0.3, positions=positions)
    at_once = both_ways(organism, batch, prune, Against(make=(noise, image_free)), max_new_tokens=6, eos_token_id=[])[1]
    whole = both_ways(organism, batch, Against(make=(noise, image_free)), max_new_tokens=6, eos_token_id=[])[1]
    assert float((at_once - whole).abs().max()) > 1e-2


def test_bfloat16_runs_at_once(organism: VLM, batch: Batch) -> None:
    """The same tokens are forced, so that every step can be compared: 8 bits are 0.4 %, of logits up to 30 in six blocks."""
    half = VLM.wrap(copy.deepcopy(organism.model).to(torch.bfloat16), organism.processor)
    rows = half.encode(batch.images, ["describe the image", "what is there ?", "describe the image on the left"])
    forced = [torch.tensor([7, 8, 9]) + step for step in range(6)]
    at_once, one_by_one = Seen(forced), Seen(forced)
    with counted(half) as calls:
        run(half, rows, at_once, Against(), max_new_tokens=6, eos_token_id=[])
    assert calls == [3, 3] + [6] * 5
    run(half, rows, one_by_one, Against(), one_by_one=True, max_new_tokens=6, eos_token_id=[])
    found, wanted = torch.stack(at_once.scores), torch.stack(one_by_one.scores)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.03 * float(wanted.abs().max()))


def test_prompts_without_padding_need_no_mask(organism: VLM, batch: Batch) -> None:
    one = organism.encode(batch.images[0], ["describe the image"])
    masks: list[Any] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs.get("attention_mask"))

    handle = organism.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        for method, hidden in ((Against(make=(noise,)), None), (Against(), int(one.image_mask.sum()))):
            masks.clear()
            run(organism, one, Seen(), method, max_new_tokens=4, eos_token_id=[])
            last = masks[-1]
            assert (None if last is None else (last == 0).sum(dim=1).tolist()) == (
                None if hidden is None else [0, hidden]
            )
    finally:
        handle.remove()


def test_what_the_branches_held_is_given_back(organism: VLM, batch: Batch) -> None:
    """The first branch's cache is that of all; the others hold nothing from then on."""
    caches: list[DynamicCache] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs["past_key_values"]
        caches.extend([] if any(one is cache for one in caches) else [cache])

    handle = organism.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run(organism, batch, Seen(), Against(make=(image_free, zero)), max_new_tokens=4, eos_token_id=[])
    finally:
        handle.remove()
    assert [one.get_seq_length() for one in caches] == [batch.length + 3, 0, 0]
    assert caches[0].layers[0].keys.shape[0] == 3 * batch.size


def test_the_room_ahead_grows(organism: VLM, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are written into room for so many positions; 12 steps need it four times over."""
    wanted = both_ways(organism, batch, Against(), max_new_tokens=12, eos_token_id=[])[1]
    monkeypatch.setattr(branches, "ROOM", 3)
    found = both_ways(organism, batch, Against(), max_new_tokens=12, eos_token_id=[])[1]
    assert torch.equal(found, wanted)


def decodes(values: torch.Tensor, calls: Any) -> torch.Tensor:
    """An edit that does nothing, which nobody says to be one of the prompt."""
    return values


def thinned(queries: Any) -> AttentionEdit:
    """No attention of some positions to every fifth key, but for themselves."""

    def cut(rows: torch.Tensor, columns: torch.Tensor, calls: Any) -> torch.Tensor:
        return (columns % 5 == 3) & (rows[:, None, :, None] != columns)

    return AttentionEdit(1, cut, queries)


IN_DECODING: dict[str, Callable[[Batch], Any]] = {
    "of states": lambda batch: Edit("z", 1, decodes),
    "of attention": lambda batch: thinned("all"),
    "of attention of what is generated": lambda batch: thinned("generated"),
}
IN_THE_PROMPT: dict[str, Callable[[Batch], Any]] = {
    "of states": lambda batch: Edit("z", 1, lambda values, calls: 2 * values, prefill_only=True),
    "of the tower": lambda batch: Edit("vision_resid_post", 1, lambda values, calls: 0.5 * values),
    "of the projector": lambda batch: Edit("projector_out", 0, lambda values, calls: 0.5 * values),
    "of tokens": lambda batch: replace_tokens(batch.image_mask)[0],
    "of attention by a mask": lambda batch: thinned(batch.image_mask),
    "of attention of the image": lambda batch: thinned("image"),
}


@pytest.mark.parametrize("make", IN_DECODING.values(), ids=IN_DECODING)
@pytest.mark.parametrize("in_view", [False, True], ids=["clean", "view"])
def test_edits_of_decode_steps_keep_branches_apart(
    make: Callable[[Batch], Any], in_view: bool, organism: VLM, batch: Batch
) -> None:
    edit = make(batch)
    method = Against(make=(lambda other: (other, [edit]),)) if in_view else Against(make=(noise,))
    with counted(organism) as rows:
        run(organism, batch, Seen(), Edits([] if in_view else [edit]), method, max_new_tokens=3, eos_token_id=[])
    assert rows == [3] * 6


@pytest.mark.parametrize("make", IN_THE_PROMPT.values(), ids=IN_THE_PROMPT)
@pytest.mark.parametrize("in_view", [False, True], ids=["clean", "view"])
def test_edits_of_the_prompt_do_not(make: Callable[[Batch], Any], in_view: bool, organism: VLM, batch: Batch) -> None:
    edit = make(batch)
    method = Against(make=(lambda other: (other, [edit]),)) if in_view else Against(make=(noise,))
    _, edited = both_ways(organism, batch, Edits([] if in_view else [edit]), method, max_new_tokens=4, eos_token_id=[])
    other = Against(make=(noise,)) if not in_view else Against(make=(lambda view: (view, ()),))
    plain = Seen()
    run(organism, batch, plain, other, max_new_tokens=4, eos_token_id=[])
    assert float((plain.scores[0] - edited[:, 0]).abs().max()) > 1e-3


def test_skipping_in_the_prompt_alone_says_so(organism: VLM, batch: Batch) -> None:
    both_ways(organism, batch, SkipPerceptual(interval=1), Against(), max_new_tokens=4, eos_token_id=[])
    with counted(organism) as rows:
        skip = SkipPerceptual(interval=1, tokens="all", when="both")
        run(organism, batch, Seen(), skip, Against(), max_new_tokens=3, eos_token_id=[])
    assert rows == [3] * 6


def test_without_a_growing_cache_branches_stay_apart(organism: VLM, batch: Batch) -> None:
    fixed, grown = Seen(), Seen()
    with counted(organism) as rows:
        run(organism, batch, fixed, Against(), max_new_tokens=4, eos_token_id=[], cache_implementation="static")
    assert rows == [3] * 8
    run(organism, batch, grown, Against(), max_new_tokens=4, eos_token_id=[])
    torch.testing.assert_close(torch.stack(fixed.scores), torch.stack(grown.scores), rtol=0, atol=ROUNDING)
    with pytest.raises(UnsupportedError, match="forward call 1 ran over input ids"):
        run(organism, batch, Seen(), Against(), max_new_tokens=4, eos_token_id=[], use_cache=False)


class Fails(LogitsProcessor):
    """Fails at the third step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise Planned
        return scores


def test_an_error_while_all_run_at_once_leaves_the_model_as_it_was(organism: VLM, batch: Batch) -> None:
    organism.forward(batch)  # transformers puts its own output hooks on at the first call
    before = snapshot(organism)
    heads = [Edit(one.site, one.layer, one.function, prefill_only=True) for one in scale_heads([(1, 2)], 3.0)]
    with organism.apply(Edits(heads), Against(make=(zero,))), counted(organism) as rows, pytest.raises(Planned):
        organism.generate(batch, max_new_tokens=5, logits_processor=LogitsProcessorList([Fails()]))
    assert rows == [3, 3, 6, 6]
    assert snapshot(organism) == before
    with organism.apply(Against(make=(blind,))):
        organism.generate(batch, max_new_tokens=2)
    assert snapshot(organism) == before
