"""Post-hoc debiasing: the published formula by hand, what stays as it is, and which tokens stand for an answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import slitlamp
from interventions import PosthocDebias
from interventions.posthoc_debias import first_tokens
from slitlamp.decoding import image_free
from slitlamp.errors import InputError
from slitlamp.models import Batch
from slitlamp.vlm import VLM

YES, NO, OTHER = (0, 3), (1,), (2, 4)
"""Tokens of a vocabulary of five: two spellings of yes, one of no."""


def softmax(logits: Any) -> Any:
    weights = np.exp(np.asarray(logits, dtype=np.float64))
    return weights / weights.sum()


def of_answers(logits: Any) -> Any:
    p = softmax(logits)
    shares = np.array([p[list(YES)].sum(), p[list(NO)].sum()])
    return shares / shares.sum()


def debiased(method: PosthocDebias, clean: list[float], others: list[list[float]], step: int = 0) -> Any:
    method.tokens_ = (YES, NO)
    found = method.combine(torch.tensor([clean]), [torch.tensor([one]) for one in others], torch.tensor([step]))
    return found[0].double().numpy()


CLEAN = [2.0, 1.4, 0.5, -1.0, 0.3]
PRIOR = [3.0, 0.5, 0.0, 0.5, 0.0]
ALSO = [0.2, 0.1, 0.0, 1.0, 2.0]


@pytest.mark.parametrize("variant", ["affine", "shift"])
@pytest.mark.parametrize("assign", ["own", "next"])
@pytest.mark.parametrize("others", [[PRIOR], [PRIOR, ALSO]])
def test_the_published_formula_by_hand(variant: Any, assign: Any, others: list[list[float]]) -> None:
    """q among the answers; the rest of the distribution, and the spellings of an answer among each other, as they were."""
    p, p_cf = of_answers(CLEAN), np.mean([of_answers(one) for one in others], axis=0)
    if assign == "next":
        p_cf = p_cf[::-1]
    weights, bias = (1 / (p_cf + 1e-4), 0) if variant == "affine" else (np.ones(2), -p_cf)
    q = np.maximum(weights * p + bias, 1e-4)
    found = debiased(PosthocDebias(variant=variant, assign=assign), CLEAN, others)
    assert of_answers(found) == pytest.approx(q / q.sum(), abs=1e-5)
    before, after = softmax(CLEAN), softmax(found)
    assert after[[*YES, *NO]].sum() == pytest.approx(before[[*YES, *NO]].sum(), abs=1e-6)
    assert found[list(OTHER)].tolist() == pytest.approx([CLEAN[token] for token in OTHER], abs=1e-7)
    assert after[3] / after[0] == pytest.approx(before[3] / before[0], abs=1e-6)


def test_a_planted_prior_is_taken_out() -> None:
    """A model that says yes without looking, and a little less so where the answer is no."""
    lying, clean = [4.0, 1.0, -9.0, -9.0, -9.0], [3.0, 2.0, -9.0, -9.0, -9.0]
    assert of_answers(clean).argmax() == 0
    for variant in ("affine", "shift"):
        assert of_answers(debiased(PosthocDebias(variant=variant), clean, [lying])).argmax() == 1
    given = PosthocDebias(prior=of_answers(lying).tolist())
    assert debiased(given, clean, []) == pytest.approx(debiased(PosthocDebias(), clean, [lying]), abs=1e-5)


def test_strengths_between_and_later_steps() -> None:
    p, p_cf = of_answers(CLEAN), of_answers(PRIOR)
    for strength in (0.3, 2.0):
        q = p / (p_cf + 1e-4) ** strength
        found = debiased(PosthocDebias(strength), CLEAN, [PRIOR])
        assert of_answers(found) == pytest.approx(q / q.sum(), abs=1e-5)
        q = np.maximum(p - strength * p_cf, 1e-4 * strength)
        found = debiased(PosthocDebias(strength, variant="shift"), CLEAN, [PRIOR])
        assert of_answers(found) == pytest.approx(q / q.sum(), abs=1e-5)
    for method, step in ((PosthocDebias(0.0), 0), (PosthocDebias(), 1)):
        assert debiased(method, CLEAN, [PRIOR], step).tolist() == torch.tensor(CLEAN).double().tolist()


@pytest.fixture(scope="module")
def batch(organism: VLM) -> Batch:
    questions = slitlamp.load_dataset("emoji_scenes/pope_adversarial").take(2).items[:6]
    return organism.encode([one.image for one in questions], [one.prompt for one in questions])


def shares(vlm: VLM, batch: Batch, edits: Any = ()) -> torch.Tensor:
    """p(yes), p(no) of the embedded model, which has one token for each."""
    tokens = vlm.tokenizer.convert_tokens_to_ids(["yes", "no"])
    return vlm.forward(batch, edits=edits).logits[:, -1].softmax(dim=-1)[:, tokens]


def test_on_a_model_it_is_the_formula_and_touches_the_first_step_alone(organism: VLM, batch: Batch) -> None:
    """All three content-free views against runs of their own; the logits of later steps bit for bit."""
    plain = shares(organism, batch)
    free = [shares(organism, image_free(batch, "deleted")[0]), shares(organism, image_free(batch, "unk")[0])]
    normal = [one / one.sum(dim=1, keepdim=True) for one in (plain, *free)]
    priors = {"deleted": normal[1], "unk": normal[2], "both": (normal[1] + normal[2]) / 2}
    for view, prior in priors.items():
        with organism.apply(PosthocDebias(view=view)):  # type: ignore[arg-type]
            found = shares(organism, batch)
        wanted = normal[0] / (prior + 1e-4)
        wanted = wanted / wanted.sum(dim=1, keepdim=True)
        torch.testing.assert_close(found / found.sum(dim=1, keepdim=True), wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.sum(dim=1), plain.sum(dim=1), rtol=0, atol=1e-5)
    tokens = organism.tokenizer.convert_tokens_to_ids(["no", "cat", "."])
    forced = batch.with_continuation([tokens] * batch.size)
    clean = organism.forward(forced).logits
    with organism.apply(PosthocDebias()):
        changed = organism.forward(forced).logits
    assert torch.equal(changed[:, -3:], clean[:, -3:])
    assert torch.equal(changed[:, :-4], clean[:, :-4])
    assert not torch.allclose(changed[:, -4], clean[:, -4], atol=1e-3)


def test_decoding_says_what_one_pass_says(organism: VLM, batch: Batch) -> None:
    """A prior so one-sided that answers flip: the first tokens chosen are those of the fused logits of one pass."""
    plain = organism.generate(batch, max_new_tokens=3)
    with organism.apply(PosthocDebias(3.0, prior=[0.999, 0.001])):
        found = organism.generate(batch, max_new_tokens=3)
        logits = organism.forward(found.teacher_forced()).logits
    assert found.tokens != plain.tokens
    for row, tokens in enumerate(found.tokens):
        assert logits[row, -len(tokens) - 1].argmax() == tokens[0]
    assert {tokens[0] for tokens in found.tokens} == set(organism.tokenizer.convert_tokens_to_ids(["no"]))


def test_captions_are_left_as_they_are(organism: VLM) -> None:
    scenes = slitlamp.load_dataset("emoji_scenes/captions").take(3).items
    prompts = organism.encode([one.image for one in scenes], [one.prompt for one in scenes])
    plain = organism.generate(prompts, max_new_tokens=20)
    with organism.apply(PosthocDebias()):
        assert organism.generate(prompts, max_new_tokens=20).tokens == plain.tokens


def byte_level(words: list[str], unk: str | None = "<unk>") -> PreTrainedTokenizerFast:
    """A tokenizer in which a word after a space is another token than the word by itself."""
    vocabulary = {word: number for number, word in enumerate(["<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unk)


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, a space among them."""
    alphabet = {letter: number for number, letter in enumerate("ĠyesnopYN")}
    backend = Tokenizer(models.BPE(alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_an_answer_stands_for_the_first_tokens_of_its_spellings(organism: VLM) -> None:
    words = ["yes", "Ġyes", "Yes", "ĠYes", "no", "ĠNo"]
    assert first_tokens(byte_level(words), ["yes", "no"], "it") == ((1, 2, 3, 4), (5, 6))
    assert first_tokens(letters(), ["yes", "no"], "it") == ((1, 7), (4, 8))  # never the space
    assert first_tokens(organism.tokenizer, ["yes", "no"], "it") == tuple(
        (one,) for one in organism.tokenizer.convert_tokens_to_ids(["yes", "no"])
    )
    with pytest.raises(InputError, match="knows no spelling of the answer 'maybe'"):
        first_tokens(byte_level(words), ["yes", "maybe"], "it")
    with pytest.raises(InputError, match="'yes' and 'yep' begin with the same token"):
        first_tokens(letters(), ["yes", "yep"], "it")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (PosthocDebias(-1.0), "strength must be 0 or more, found -1.0"),
        (PosthocDebias(beta=0.1), "has no APC"),
        (PosthocDebias(variant="shfit"), "did you mean 'shift'"),  # type: ignore[arg-type]
        (PosthocDebias(view="bot"), "did you mean 'both'"),  # type: ignore[arg-type]
        (PosthocDebias(assign="nxt"), "did you mean 'next'"),  # type: ignore[arg-type]
        (PosthocDebias(answers="yes"), "a list of two words or more"),
        (PosthocDebias(answers=["yes"]), "a list of two words or more"),
        (PosthocDebias(answers=["yes", "yes"]), "a list of two words or more"),
        (PosthocDebias(prior=[1.0]), "a prior of 1 numbers for the answers yes, no"),
        (PosthocDebias(prior=[0.9, 0.2]), "sum to 1"),
        (PosthocDebias(prior=[1.1, -0.1]), "must be 0 or more"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(method: PosthocDebias, message: str, llava: VLM) -> None:
    with pytest.raises(InputError, match=message), llava.apply(method):
        pass


def test_controls_and_descriptions() -> None:
    controls = PosthocDebias().controls()
    assert {name: (one.assign, one.view) for name, one in controls.items()} == {  # type: ignore[attr-defined]
        "next": ("next", "deleted"),
        "noise": ("own", "noise"),
    }
    assert list(PosthocDebias(prior=[0.5, 0.5]).controls()) == ["next"]
    assert PosthocDebias(view="both").describe() == (
        "the first token among yes, no corrected by the prior: no image and an unknown word for it, on average; affine, "
        "strength 1"
    )
    assert PosthocDebias(0.5, variant="shift", prior=[0.75, 0.25], assign="next").describe() == (
        "the first token among yes, no corrected by the prior: given (0.75, 0.25), each by that of the next answer; shift, "
        "strength 0.5"
    )
