"""CausalMM: counterfactual weights against loops over single numbers, and contrasts against a copy that attends by them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from contract import close, encode, pictures_of
from hand_attention import by_hand, outputs
from scipy import stats
from tiny_models import BUILDERS

from interventions import CausalContrast
from interventions.counterfactual_attention import KINDS, counterfactual, draws
from slitlamp.decoding import image_free
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import Batch
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

SEED = 3
MASK = 0xFFFFFFFF


@functools.cache
def built(name: str) -> VLM:
    return BUILDERS[name]()


def hashed(value: int) -> int:
    """The hash of the draws, in plain integers."""
    value %= 2**32
    for _ in range(2):
        value = (value ^ (value >> 16)) * 0x45D9F3B % 2**32
    return value ^ (value >> 16)


def draw(tower: str, layer: int, head: int, query: int, key: int) -> int:
    base = hashed(hashed(hashed(SEED) + (tower == "vision")) + layer)
    return hashed(hashed(hashed(base + head) + query) + key)


def one_row(weights: Any, drawn: list[int], kind: str, normalise: bool) -> Any:
    """Other weights for the keys that a query sees, one after the other."""
    n = len(weights)
    if kind == "shuffled":
        order = sorted(range(n), key=lambda key: drawn[key])
        return np.array([weights[key] for key in order])
    if kind == "uniform":
        return np.full(n, 1 / n)
    found = np.array([2 * one / 2**32 for one in drawn]) if kind == "random" else max(weights) - np.asarray(weights)
    if not normalise:
        return found
    return found / found.sum() if found.sum() > 0 else np.full(n, 1 / n)


def by_loops(
    weights: torch.Tensor, starts: list[int], tower: str, layer: int, kind: str, normalise: bool = True
) -> torch.Tensor:
    """Weights [batch, head, T, T] made anew row by row, of the keys with a weight."""
    changed = torch.zeros_like(weights)
    for item, start in enumerate(starts):
        for head in range(weights.shape[1]):
            for query in range(start, weights.shape[2]):
                seen = weights[item, head, query].nonzero()[:, 0].tolist()
                drawn = [draw(tower, layer, head, query - start, key - start) for key in seen]
                found = one_row(weights[item, head, query, seen].double().numpy(), drawn, kind, normalise)
                changed[item, head, query, seen] = torch.from_numpy(found).to(weights)
    return changed


def starts_of(batch: Batch) -> list[int]:
    return [batch.length - n for n in batch.lengths]


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_by_hand(kind: Any, normalise: bool) -> None:
    """Rows with few keys, with one, with equal weights; hidden keys between."""
    weights = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(2, 1, 5, 6, dtype=torch.bool)
    seen[0, 0, 0, 1:] = False
    seen[1, 0, 2, [1, 4]] = False
    seen[1, 0, 3, :2] = False
    weights = weights * seen
    weights[0, :, 4] = 0.25
    weights = weights / weights.sum(dim=-1, keepdim=True)
    drawn = torch.randint(0, 2**32, weights.shape, generator=torch.Generator().manual_seed(1))
    found = counterfactual(weights, seen, kind, drawn, normalise=normalise)
    for item, head, query in np.ndindex(2, 3, 5):
        keys = seen[item, 0, query].nonzero()[:, 0].tolist()
        row = weights[item, head, query, keys].double().numpy()
        wanted = one_row(row, drawn[item, head, query, keys].tolist(), kind, normalise)
        assert found[item, head, query, keys].tolist() == pytest.approx(wanted.tolist(), abs=1e-6)
        assert found[item, head, query].sum().item() == pytest.approx(wanted.sum(), abs=1e-5)


def test_a_key_whose_weight_is_too_small_to_be_told_from_0_is_seen() -> None:
    weights = torch.tensor([[[[1.0, 0.0, 0.0]]]])
    seen = torch.tensor([[[[True, True, False]]]])
    assert counterfactual(weights, seen, "reversed", None, normalise=True).tolist() == [[[[0.0, 1.0, 0.0]]]]
    assert counterfactual(weights, seen, "uniform", None, normalise=True).tolist() == [[[[0.5, 0.5, 0.0]]]]


def test_draws_are_even_and_apart() -> None:
    """A million draws: evenly spread over 64 bins, and not correlated from head to head, row to row or key to key."""
    places = torch.arange(256)[None]
    found = draws(12345, 16, places, places).double() / 2**32
    counts = np.histogram(found.numpy(), bins=64, range=(0, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-4
    for axis in (1, 2, 3):
        first, then = found.narrow(axis, 0, found.shape[axis] - 1), found.narrow(axis, 1, found.shape[axis] - 1)
        both = torch.corrcoef(torch.stack([first.flatten(), then.flatten()]))
        assert abs(float(both[0, 1])) < 0.005  # five standard errors of a million pairs
    assert not torch.equal(draws(12346, 16, places, places), draws(12345, 16, places, places))


FAMILIES = ("llava", "llava siglip", "llava_next", "gemma3", "smolvlm", "paligemma")
"""With and without CLS, tiles, sliding windows and image tokens that see each other, another place of image tokens."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_attends_by_them(kind: Any, family: str) -> None:
    """Against a copy under eager attention whose values are summed by weights from the loops, in two layers on end."""
    vlm = built(family)
    batch = encode(vlm, pictures_of(vlm)).with_continuation([[9, 10], [], []][: len(pictures_of(vlm))])
    method = CausalContrast(modality="language", counterfactual=kind, language_layers=[0, 1], seed=SEED)
    ((view, edits),) = method.views(vlm._context(batch))
    assert view is batch
    rules = [
        (
            layer,
            lambda weights, rows, columns, layer=layer: by_loops(weights, starts_of(batch), "language", layer, kind),
            batch.real_mask,
        )
        for layer in (0, 1)
    ]
    wanted = outputs(by_hand(vlm, rules, {}), batch).logits
    found = vlm.forward(batch, edits=edits).logits
    close(found[batch.real_mask], wanted[batch.real_mask], 1e-4)
    assert (found - vlm.forward(batch).logits)[batch.real_mask].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llava", "llava siglip", "llava_next", "smolvlm"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_attends_by_them(kind: Any, family: str) -> None:
    vlm = built(family)
    batch = encode(vlm, pictures_of(vlm)[:2])
    method = CausalContrast(modality="vision", counterfactual=kind, vision_layers=[0, 1], seed=SEED)
    ((_, edits),) = method.views(vlm._context(batch))
    rules = [
        (
            layer,
            lambda weights, rows, columns, layer=layer: by_loops(weights, [0] * len(weights), "vision", layer, kind),
            None,
        )
        for layer in (0, 1)
    ]
    wanted = outputs(by_hand(vlm, rules, {}, "vision_"), batch).logits
    found = vlm.forward(batch, edits=edits).logits
    close(found[batch.real_mask], wanted[batch.real_mask], 1e-4)
    assert (found - vlm.forward(batch).logits)[batch.real_mask].abs().max() > 1e-3


def logits_of(vlm: VLM, batch: Batch, method: CausalContrast) -> list[torch.Tensor]:
    return [vlm.forward(view, edits=edits).logits[:, -1] for view, edits in method.views(vlm._context(batch))]


def test_the_formulas_of_one_and_of_two_modalities(llava: VLM, image: Any) -> None:
    batch = llava.encode([image(0), image(1)], ["<image> is there a dog ?", "what <image> ?"])
    clean = llava.forward(batch).logits[:, -1]
    (vision,) = logits_of(llava, batch, CausalContrast(modality="vision"))
    (language,) = logits_of(llava, batch, CausalContrast(modality="language"))
    assert not torch.allclose(vision, language, atol=1e-2)
    (noise,) = logits_of(llava, batch, CausalContrast(against="noise", seed=2))
    assert torch.equal(noise, llava.forward(image_free(batch, "noise", 2)[0]).logits[:, -1])
    for method, wanted in (
        (CausalContrast(0.7, "vision", beta=0.0), 1.7 * clean - 0.7 * vision),
        (CausalContrast(0.7, "language", beta=0.0), 1.7 * clean - 0.7 * language),
        (CausalContrast(0.7, beta=0.0), 2.4 * clean - 0.7 * vision - 0.7 * language),
        (CausalContrast(0.7, against="noise", seed=2, beta=0.0), 2.4 * clean - 1.4 * noise),
        (CausalContrast(0.7, "vision", against="noise", seed=2, beta=0.0), 1.7 * clean - 0.7 * noise),
    ):
        with llava.apply(method):
            close(llava.forward(batch).logits[:, -1], wanted, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_says_what_one_pass_says(kind: Any, llava: VLM, image: Any) -> None:
    """Rows of unequal prompts, step by step and all at once: every decoded row attends by the same draws."""
    batch = llava.encode(
        [image(0), image(1), image(2)],
        ["<image> is there a dog ?", "<image> what is in the image and where is it ?", "describe this <image> ."],
    )
    with llava.apply(CausalContrast(1.5, counterfactual=kind, beta=0.0)):
        generation = llava.generate(batch, max_new_tokens=8, eos_token_id=[])
        logits = llava.forward(generation.teacher_forced()).logits[:, -9:-1]
    logits[..., [0, 1, 4]] = -torch.inf  # the tiny models may not say these
    assert [list(tokens) for tokens in generation.tokens] == logits.argmax(dim=-1).tolist()
    plain = llava.generate(batch, max_new_tokens=8, eos_token_id=[])
    assert generation.tokens != plain.tokens


def test_all_items_get_the_same_draws_and_another_seed_gets_others(llava: VLM, image: Any) -> None:
    twice = llava.encode([image(0), image(0)], ["<image> is there a dog ?"] * 2)
    for modality in ("vision", "language"):
        method = CausalContrast(modality=modality)  # type: ignore[arg-type]
        (found,) = logits_of(llava, twice, method)
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
        (other,) = logits_of(llava, twice, CausalContrast(modality=modality, seed=1))  # type: ignore[arg-type]
        assert not torch.allclose(found, other, atol=1e-3)


def test_rows_as_they_come_are_not_normalised(llava: VLM, image: Any) -> None:
    batch = llava.encode([image(0)], ["<image> is there a dog ?"])
    for normalise in (True, False):
        method = CausalContrast(modality="language", counterfactual="random", normalise=normalise)
        ((_, edits),) = method.views(llava._context(batch))
        weights = llava._extra_pass(batch, [sites.attention("last", "all", layers=0)], edits)["attention"][0]
        total, n_keys = weights.sum(dim=-1), weights.shape[-1]
        if normalise:
            torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)
        else:  # even from 0 to 2: n on average, with a standard error of sqrt(n / 3)
            assert (total - n_keys).abs().max() < 5 * (n_keys / 3) ** 0.5
            assert (total - 1).abs().min() > 1


def test_packed_towers_and_missing_layers_are_refused_by_name() -> None:
    for family in ("qwen2_5_vl", "mllama"):
        vlm = built(family)
        with pytest.raises(UnsupportedError, match="runs over all tiles as one sequence"):
            CausalContrast().check(vlm.anatomy)
        CausalContrast(modality="language").check(vlm.anatomy)
    cross = next(iter(built("mllama").anatomy.places["cross_attention"]))
    with pytest.raises(UnsupportedError, match="has no 'attention'"):
        CausalContrast(modality="language", language_layers=[cross]).check(built("mllama").anatomy)
    vlm = built("qwen2_5_vl")
    batch = encode(vlm, pictures_of(vlm)[:1])
    with vlm.apply(CausalContrast(modality="language")):
        assert len(vlm.generate(batch, max_new_tokens=3).texts) == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (CausalContrast(-0.5), "g must be 0 or more, found -0.5"),
        (CausalContrast(modality="visoin"), "did you mean 'vision'"),  # type: ignore[arg-type]
        (CausalContrast(counterfactual="shuffle"), "did you mean 'shuffled'"),  # type: ignore[arg-type]
        (CausalContrast(against="nois"), "did you mean 'noise'"),  # type: ignore[arg-type]
        (CausalContrast(language_layers=[3]), "layer 3 is not one of 0 to 2"),
        (CausalContrast(vision_layers=[-1]), "vision_layers: layer -1 is not one of 0 to 2"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(method: CausalContrast, message: str, llava: VLM) -> None:
    with pytest.raises(InputError, match=message), llava.apply(method):
        pass


def test_text_alone_has_no_tower_to_change(llava: VLM) -> None:
    text = llava.encode(prompts=["is there a dog ?"])
    with llava.apply(CausalContrast()), pytest.raises(InputError, match="needs an image in every row"):
        llava.generate(text, max_new_tokens=2)
    with llava.apply(CausalContrast(modality="language")):
        assert len(llava.generate(text, max_new_tokens=2).texts) == 1


def test_descriptions_and_controls() -> None:
    assert CausalContrast().describe() == (
        "contrast with shuffled attention in the vision tower and, apart from it, the language model, g 0.5, beta 0.1"
    )
    controls = CausalContrast(1.0, "vision", "reversed", normalise=False).controls()
    assert controls["noise"].describe() == (
        "contrast with an image of noise in place of reversed attention (rows as they come) in the vision tower, g 1, beta 0.1"
    )
    assert controls["apc_only"].g == 0  # type: ignore[attr-defined]
