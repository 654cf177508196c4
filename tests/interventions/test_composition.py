"""Any two interventions together: at neutral strength they change nothing, at any strength they run or are refused by name.

One case of each class, the first of its name in the contract's CASES, so a new intervention joins by its line there.
"""

from __future__ import annotations

from itertools import combinations_with_replacement, product
from typing import Any

import pytest
import torch

from slitlamp.decoding import Intervention
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import Batch
from slitlamp.vlm import VLM

from .test_contract import CASES

FIRST = {name.split()[0]: case for name, case in reversed(CASES.items())}
NAMES = sorted(FIRST)


def neutral(name: str) -> Intervention:
    make, value, _ = FIRST[name]
    return make(value)


def strong(name: str) -> Intervention:
    make, _, value = FIRST[name]
    return make(value)


def refusal(vlm: VLM, *interventions: Intervention) -> str | None:
    """Why `apply` does not take them together; None where it does."""
    try:
        with vlm.apply(*interventions):
            return None
    except (InputError, UnsupportedError) as error:
        return str(error)


@pytest.fixture(scope="module")
def batch(llava: VLM, image: Any) -> Batch:
    """Two rows, one of them padded."""
    return llava.encode(images=[image(0), image(1)], prompts=["<image> is there a dog ?", "describe this <image> ."])


@pytest.fixture(scope="module")
def baseline(llava: VLM, batch: Batch) -> list[list[int]]:
    return [list(row) for row in llava.generate(batch, max_new_tokens=3).tokens]


@pytest.mark.parametrize(("first", "second"), list(product(NAMES, NAMES)))
def test_two_neutral_interventions_change_nothing(
    first: str, second: str, llava: VLM, batch: Batch, baseline: list[list[int]]
) -> None:
    pair = neutral(first), neutral(second)
    reason = refusal(llava, *pair)
    if reason is not None:
        assert all(one.name in reason for one in pair), reason
        return
    with llava.apply(*pair):
        assert [list(row) for row in llava.generate(batch, max_new_tokens=3).tokens] == baseline


@pytest.mark.parametrize(("first", "second"), list(combinations_with_replacement(NAMES, 2)))
def test_two_strong_interventions_run_or_are_refused_by_name(first: str, second: str, llava: VLM, batch: Batch) -> None:
    pair = strong(first), strong(second)
    reason = refusal(llava, *pair)
    assert (reason is None) == (refusal(llava, strong(second), strong(first)) is None), "refused in one order alone"
    if reason is not None:
        assert all(one.name in reason for one in pair), reason
        return
    with llava.apply(*pair):
        logits = llava.forward(batch).logits[:, -1]
        generation = llava.generate(batch, max_new_tokens=3)
    # A contrast gives -inf to tokens that it leaves out, and to nothing else.
    left_out = (
        logits.isneginf() if any(one.kind == "logits" for one in pair) else torch.zeros_like(logits, dtype=torch.bool)
    )
    assert torch.isfinite(logits[~left_out]).all()
    assert not left_out.all(dim=-1).any()
    assert len(generation.tokens) == 2
    assert all(generation.tokens)


def test_each_by_itself_is_taken(llava: VLM) -> None:
    """Else the tests above would hold of anything that is refused."""
    for name in NAMES:
        assert refusal(llava, neutral(name)) is None
        assert refusal(llava, strong(name)) is None
