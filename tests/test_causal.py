"""The causal check against numbers worked out by plain forward passes, and on targets whose effect is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from slitlamp.causal import _table, causal_check, causal_sentences
from slitlamp.decoding.edits import add_direction, remove_direction, replace_tokens, scale_heads, set_heads, skip_block
from slitlamp.errors import InputError
from slitlamp.models import Batch
from slitlamp.tracing import CausalTarget, Edit, sites
from slitlamp.tracing.probe import EditsOf
from slitlamp.vlm import VLM

TOKENS = [[6, 7, 8], [9, 10], [11, 6, 7]]
LABELS = [["object", "hallucinated", "other"], ["object", "hallucinated"], ["hallucinated", "object", "other"]]


def tables() -> list[pd.DataFrame | None]:
    return [pd.DataFrame({"token": range(len(row)), "word": "w", "label": row}) for row in LABELS]


@pytest.fixture(scope="module")
def batch(llava: VLM, image: Any) -> Batch:
    prompts = ["<image> is there a dog ?", "<image> what is in the image and where is it ?", "describe this <image> ."]
    return llava.encode(images=[image(k) for k in range(3)], prompts=prompts).with_continuation(TOKENS)


def nothing(batch: Batch) -> list[Edit]:
    return []


def heads(*which: tuple[int, int]) -> EditsOf:
    return lambda batch: scale_heads(which)


def check(vlm: VLM, batch: Batch, target: EditsOf, *controls: EditsOf, labels: Any = None) -> pd.DataFrame:
    one = CausalTarget("the target", target, controls, "random ones")
    return causal_check(vlm, [one], [(batch, labels)], n_resamples=200).set_index("outcome")


def test_effects_equal_those_of_plain_forward_passes(llava: VLM, batch: Batch) -> None:
    found = check(llava, batch, heads((1, 0), (1, 1)), heads((0, 2)), labels=tables())
    plain = llava.forward(batch).logits.log_softmax(dim=-1)
    edited = llava.forward(batch, edits=scale_heads([(1, 0), (1, 1)])).logits.log_softmax(dim=-1)
    kl, change = [], {"object": [], "hallucinated": []}
    for row, (tokens, labels) in enumerate(zip(TOKENS, LABELS, strict=True)):
        for step, (token, label) in enumerate(zip(tokens, labels, strict=True)):
            if label == "other":
                continue
            here = batch.length - len(tokens) + step - 1  # the position that predicts it
            p, q = plain[row, here], edited[row, here]
            kl.append(float((p.exp() * (p - q)).sum()))
            change[label].append(float(q[token] - p[token]))
    assert found.loc["kl", "effect"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.loc["true_logprob", "effect"] == pytest.approx(np.mean(change["object"]), rel=1e-4)
    assert found.loc["false_logprob", "effect"] == pytest.approx(np.mean(change["hallucinated"]), rel=1e-4)
    gap = np.mean(change["object"]) - np.mean(change["hallucinated"])
    assert found.loc["gap", "effect"] == pytest.approx(gap, rel=1e-3, abs=1e-6)
    assert found.loc["kl", "n_tokens"] == 6
    assert found.loc["kl", "ratio"] == pytest.approx(found.loc["kl", "effect"] / found.loc["kl", "control_effect"])


def test_a_target_that_does_something_beats_controls_that_do_nothing(llava: VLM, batch: Batch) -> None:
    found = check(llava, batch, lambda _: skip_block(1), nothing, nothing)
    assert found.loc["kl", "ratio"] == np.inf
    assert found.loc["kl", "finding"] == "more than every control"  # two draws cannot give p .05
    assert found.loc["kl", "p"] == pytest.approx(1 / 3)
    assert found.loc["kl", "draws_exceeded"] == 2
    assert list(found.index) == ["kl"]  # without labels no token is true or false
    assert found.loc["kl", "n_tokens"] == 8


def test_a_target_that_does_nothing_does_less_than_random(llava: VLM, batch: Batch) -> None:
    found = check(llava, batch, nothing, heads((0, 0), (1, 1)), heads((2, 1)))
    assert found.loc["kl", "effect"] == 0
    assert found.loc["kl", "finding"] == "less than every control"


def test_a_target_like_its_controls_is_not_told_from_them(llava: VLM, batch: Batch) -> None:
    found = check(llava, batch, heads((1, 2)), heads((1, 2)), heads((1, 2)), labels=tables())
    assert found.loc["kl", "ratio"] == pytest.approx(1.0)
    assert set(found["finding"]) == {"not told from random"}


def simulated(seed: int, effect: float, n_draws: int = 19) -> pd.DataFrame:
    """40 images of 5 tokens: what a place changes differs between places (by half, in the log) and between images."""
    rng = np.random.default_rng(seed)
    own = rng.normal(size=1 + n_draws) * 0.5
    own[0] += effect
    sums = np.zeros((1 + n_draws, 40, 6))
    sums[..., 0] = 5
    sums[..., 1] = 5 * np.exp(own[:, None] + 0.3 * rng.normal(size=(1 + n_draws, 40)))
    target = CausalTarget("t", nothing, (nothing,) * n_draws, "c")
    return _table(target, sums[0], sums[1:], {"n_resamples": 200, "level": 0.95, "seed": seed}).set_index("outcome")


def test_a_random_target_is_called_more_than_random_as_often_as_stated() -> None:
    """400 targets that are one of their own controls: at most 5 %, and not never; within binomial limits of 99.9 %.

    An interval over images alone would call about four in ten of them so: it knows nothing of how places differ.
    """
    found = [simulated(seed, 0.0).loc["kl"] for seed in range(400)]
    more = sum(one["finding"] == "more than random" for one in found)
    less = sum(one["finding"] == "less than random" for one in found)
    low, high = stats.binom.ppf([0.001, 0.999], 400, 0.05)
    assert low <= more <= high
    assert low <= less <= high
    assert sum(one["ratio_low"] > 1 for one in found) > 3 * high


def test_a_target_that_stands_out_is_found() -> None:
    found = simulated(0, 3.0).loc["kl"]
    assert found["finding"] == "more than random"
    assert found["p"] == pytest.approx(0.05)
    assert "19 of 19 draws exceeded, p 0.05" in causal_sentences(simulated(0, 3.0).reset_index())[0]
    assert simulated(0, -3.0).loc["kl", "finding"] == "less than random"
    assert simulated(0, 3.0, n_draws=4).loc["kl", "finding"] == "more than every control"


def test_questions_on_one_image_are_one_unit(llava: VLM, batch: Batch) -> None:
    one = CausalTarget("t", heads((1, 0)), (heads((1, 1)),), "c")
    found = causal_check(llava, [one], [(batch.grouped(["a", "b", "a"]), None)], n_resamples=50)
    assert set(found["n_groups"]) == {2}


def test_what_cannot_be_checked_is_refused(llava: VLM, batch: Batch) -> None:
    with pytest.raises(InputError, match="nothing to intervene on"):
        causal_check(llava, [], [(batch, None)])
    with pytest.raises(InputError, match="no matched random target"):
        causal_check(llava, [CausalTarget("t", nothing, (), "c")], [(batch, None)])
    with pytest.raises(InputError, match="no batch holds a generated token"):
        causal_check(llava, [CausalTarget("t", nothing, (nothing,), "c")], [(batch.prompt_only(), [None] * 3)])


# -- the shared edits -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def row(llava: VLM, image: Any) -> Batch:
    """One row, so that positions are those of the recordings: those are packed to the left, without padding."""
    return llava.encode(images=[image(0)], prompts=["<image> is there a dog ?"]).with_continuation([[6, 7]])


def recorded(vlm: VLM, batch: Batch, edits: list[Edit], *wanted: Any) -> Any:
    with vlm.trace(*wanted) as trace:
        vlm.forward(batch, edits=edits)
    return trace


def test_heads_are_scaled_and_set(llava: VLM, row: Batch) -> None:
    site = sites.z(layers=[1])
    plain = recorded(llava, row, [], site)["z"][1]
    scaled = recorded(llava, row, scale_heads([(1, 2)], 3.0), site)["z"][1]
    assert torch.allclose(scaled[:, :, 2], 3 * plain[:, :, 2])
    assert torch.equal(scaled[:, :, :2], plain[:, :, :2])
    means = torch.arange(3 * 4 * plain.shape[-1], dtype=torch.float32).view(3, 4, -1)
    put = recorded(llava, row, set_heads([(1, 0), (1, 3)], means), site)["z"][1]
    assert torch.equal(put[0, 0, [0, 3]], means[1, [0, 3]])
    assert torch.equal(put[:, :, 1:3], plain[:, :, 1:3])


def test_tokens_are_replaced_where_asked(llava: VLM, row: Batch) -> None:
    site = sites.resid_pre(layers=[0])
    plain = recorded(llava, row, [], site)["resid_pre"][0]
    found = recorded(llava, row, replace_tokens(row.image_mask, 2.0), site)["resid_pre"][0]
    assert (found[row.image_mask] == 2.0).all()
    assert torch.equal(found[~row.image_mask], plain[~row.image_mask])


def test_a_direction_is_added_and_taken_out(llava: VLM, row: Batch) -> None:
    site = sites.resid_post(layers=[1])
    plain = recorded(llava, row, [], site)["resid_post"][1]
    direction = torch.randn(plain.shape[-1], generator=torch.Generator().manual_seed(0))
    unit = direction / direction.norm()
    added = recorded(llava, row, add_direction(1, direction, 0.5), site)["resid_post"][1]
    assert torch.allclose(added - plain, 0.5 * plain.norm(dim=-1, keepdim=True) * unit, atol=1e-4)
    fixed = recorded(llava, row, add_direction(1, direction, 0.5, relative=False), site)["resid_post"][1]
    assert torch.allclose(fixed - plain, (0.5 * unit).expand_as(plain), atol=1e-4)
    removed = recorded(llava, row, remove_direction([1], direction), site)["resid_post"][1]
    assert (removed @ unit).abs().max() < 1e-4
    across = plain - (plain @ unit)[..., None] * unit
    assert torch.allclose(removed, across, atol=1e-4)


def test_a_skipped_block_gives_back_its_input(llava: VLM, row: Batch) -> None:
    found = recorded(llava, row, skip_block(1), sites.resid_pre(layers=[1]), sites.resid_post(layers=[1]))
    assert torch.equal(found["resid_pre"][1], found["resid_post"][1])
