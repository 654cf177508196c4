"""Beam search, against transformers' own on the same prompts, and beside interventions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import BUILDERS

from interventions import M3ID, ClsPruning, HeadReinforcement, ImageAttentionBoost, ImageContrast
from slitlamp.decoding import Generation
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import Batch
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

PROMPTS = ["<image> is there a dog ?", "<image> what is in the image and where is it ?", "describe this <image> ."]
SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 4},
    {"num_beams": 3, "length_penalty": 2.0},
    {"num_beams": 3, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
    {"num_beams": 4, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"num_beams": 3, "min_new_tokens": 6},
]


@pytest.fixture
def batch(llava: VLM, image: Any) -> Batch:
    return llava.encode(images=[image(0), image(1), image(2)], prompts=PROMPTS)


def by_transformers(vlm: VLM, batch: Batch, new_tokens: int, **search: Any) -> list[tuple[int, ...]]:
    """What `generate` of the Hugging Face model says, up to the first end token."""
    ends = list(vlm.end_tokens)
    with torch.no_grad():
        found = vlm.model.generate(  # type: ignore[operator]
            **batch.inputs(), max_new_tokens=new_tokens, do_sample=False, pad_token_id=batch.pad_token_id,
            eos_token_id=ends, **search,
        )[:, batch.length :].tolist()  # fmt: skip
    lengths = [next((at + 1 for at, token in enumerate(row) if token in ends), len(row)) for row in found]
    return [tuple(row[:length]) for row, length in zip(found, lengths, strict=True)]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_it_says_what_transformers_says(search: dict[str, Any], llava: VLM, batch: Batch) -> None:
    found = llava.generate(batch, max_new_tokens=10, **search)
    assert list(found.tokens) == by_transformers(llava, batch, 10, **search)
    assert found.batch is batch
    assert found.n_image == tuple(batch.image_mask.sum(dim=1).tolist())


def test_what_is_not_asked_for_is_the_models_own(llava: VLM, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    config = llava.model.generation_config
    before = llava.generate(batch, max_new_tokens=10, num_beams=3).tokens
    monkeypatch.setattr(config, "length_penalty", -1.0)
    monkeypatch.setattr(config, "early_stopping", "never")
    found = llava.generate(batch, max_new_tokens=10, num_beams=3).tokens
    assert list(found) == by_transformers(llava, batch, 10, num_beams=3)
    assert found != before


def test_where_every_token_is_forbidden_there_is_no_text(llava: VLM, batch: Batch) -> None:
    every = list(range(llava.model.config.text_config.vocab_size))
    with pytest.raises(InputError, match="found no text for prompt 0"):
        llava.generate(batch, max_new_tokens=3, num_beams=2, suppress_tokens=every)


@pytest.mark.parametrize("search", SEARCHES[:2], ids=str)
def test_a_neutral_contrast_changes_nothing(search: dict[str, Any], llava: VLM, batch: Batch) -> None:
    plain = llava.generate(batch, max_new_tokens=8, **search)
    for contrast in (ImageContrast(0.0, "deleted", beta=0.0), M3ID(decay=0.0)):
        with llava.apply(contrast):
            assert llava.generate(batch, max_new_tokens=8, **search).tokens == plain.tokens


def test_the_searches_differ_from_greedy_decoding(llava: VLM, batch: Batch) -> None:
    assert (
        llava.generate(batch, max_new_tokens=10, num_beams=4).tokens != llava.generate(batch, max_new_tokens=10).tokens
    )


def exhaustive(vlm: VLM, batch: Batch, n_beams: int, new_tokens: int) -> list[list[int]]:
    """The texts of a search row by row, beam by beam, each from a forward pass over its whole text; none of them ends."""
    forbidden = [*vlm.model.generation_config.suppress_tokens, *vlm.end_tokens]
    found = []
    for row in range(batch.size):
        beams: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(new_tokens):
            candidates = []
            for total, tokens in beams:
                longer = batch.with_continuation([tokens if one == row else [] for one in range(batch.size)])
                log_p = vlm.forward(longer).logits[row, -1].float().log_softmax(dim=-1)
                log_p[forbidden] = -torch.inf
                candidates += [(total + float(log_p[token]), [*tokens, token]) for token in range(len(log_p))]
            beams = sorted(candidates, key=lambda one: -one[0])[:n_beams]
        found.append(beams[0][1])
    return found


@pytest.mark.parametrize(
    "method",
    [
        ImageContrast(1.0, "deleted"),
        ImageContrast(1.0, "both", beta=0.0),
        M3ID(decay=0.2, offset=2),
        ImageAttentionBoost(2.0),
        HeadReinforcement(3.0, layers=[0, 2]),
        ClsPruning(0.25, positions="original"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_beams_under_interventions_are_those_of_full_passes(method: Any, llava: VLM, batch: Batch) -> None:
    """Caches that follow the beams, in one batch or apart, against no cache at all; fused logits as log probabilities."""
    with llava.apply(method):
        found = llava.generate(batch, max_new_tokens=4, num_beams=3, eos_token_id=[], suppress_tokens=suppressed(llava))
        wanted = exhaustive(llava, batch, 3, 4)
    assert [list(row) for row in found.tokens] == wanted


def suppressed(vlm: VLM) -> list[int]:
    return [*vlm.model.generation_config.suppress_tokens, *vlm.end_tokens]


def test_a_row_alone_says_the_same(llava: VLM, batch: Batch, image: Any) -> None:
    def alone(row: int) -> Generation:
        one = llava.encode(images=[image(row)], prompts=[PROMPTS[row]])
        return llava.generate(one, max_new_tokens=8, num_beams=3)

    with llava.apply(ImageContrast(1.0, "deleted")):
        together = llava.generate(batch, max_new_tokens=8, num_beams=3)
        assert [alone(row).tokens[0] for row in range(3)] == list(together.tokens)


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "blip-2"])
def test_other_families(name: str, image: Any) -> None:
    """Sliding windows, positions from 1, a Q-Former: caches of other kinds are moved as well."""
    vlm = BUILDERS[name]()
    mark = getattr(vlm.processor, vlm.anatomy.family.placeholder or "", "")
    text = "is there a dog ?" if vlm.anatomy.family.images_first or not mark else f"{mark} is there a dog ?"
    batch = vlm.encode([[image(0)], [image(1)]], [text, text], chat=False)
    assert list(vlm.generate(batch, max_new_tokens=6, num_beams=3).tokens) == by_transformers(
        vlm, batch, 6, num_beams=3
    )
    with vlm.apply(ImageContrast(0.0, "deleted", beta=0.0)):
        assert list(vlm.generate(batch, max_new_tokens=6, num_beams=3).tokens) == by_transformers(
            vlm, batch, 6, num_beams=3
        )


def test_what_is_not_well_defined_is_refused_by_name(llava: VLM, batch: Batch, image: Any) -> None:
    with pytest.raises(UnsupportedError, match="without sampling"):
        llava.generate(batch, num_beams=2, do_sample=True, seed=0)
    with pytest.raises(UnsupportedError, match="num_return_sequences"):
        llava.generate(batch, num_beams=2, num_return_sequences=2)
    with pytest.raises(InputError, match="num_beams must be a whole number"):
        llava.generate(batch, num_beams=0)
    with llava.trace(sites.resid_post()), pytest.raises(UnsupportedError, match="beams move between rows"):
        llava.generate(batch, num_beams=2)
    two = llava.encode([[image(0), image(1)]], ["is <image> in <image> ?"])
    with pytest.raises(UnsupportedError, match="cannot be repeated: pixel_values"):
        llava.generate(two, num_beams=2)
    with pytest.raises(UnsupportedError, match="MaxTimeCriteria beside beam search"):
        llava.generate(batch, num_beams=2, max_time=9.0)
