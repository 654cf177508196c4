"""Post-hoc debiasing of the first token of an answer (Zhang et al., "Debiasing LVLMs", arXiv 2403.05262)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from slitlamp.decoding.intervention import Intervention, RunContext
from slitlamp.decoding.two_branch import ContrastDecoding, ContrastView
from slitlamp.decoding.views import image_free
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy

Variant = Literal["affine", "shift"]
ContentFree = Literal["deleted", "unk", "both", "noise"]
Assigned = Literal["own", "next"]
VARIANTS: tuple[str, ...] = ("affine", "shift")
CONTENT_FREE: dict[str, str] = {
    "deleted": "no image",
    "unk": "an unknown word for the image",
    "both": "no image and an unknown word for it, on average",
    "noise": "an image of noise",
}
ASSIGNED: tuple[str, ...] = ("own", "next")
FLOOR = 1e-4
"""Of the published W; and, here, the least share of an answer under "shift"."""


@dataclass
class PosthocDebias(ContrastDecoding):
    """The first token of the answer, corrected for what the model would answer without looking.

    Among a set of answers, p is the model's distribution at the first generated token, and p_cf that of the same question with a
    content-free image. The corrected one is q proportional to W p + b: "affine", W = diag(1 / (p_cf + 1e-4)), b = 0; "shift",
    W = I, b = -p_cf. All else stays as it is: the probability of all answers together, that of other tokens, the spellings of an
    answer among each other, and every later token; in a caption, where the answers are improbable, next to nothing changes.
    There is no APC. The cost is one more forward pass per step (two for
    "both"), of which only the first step's counts, and none with a given `prior`.

    The paper ranks answers by W p + b. A distribution with a strength s between is ours [?]: "affine" takes
    (p_cf + 1e-4)^(-s) for the weights, and "shift" max(p - s p_cf, 1e-4 s), so that no answer is ruled out; s = 1 has the
    published order.

    An answer stands for the first tokens of its spellings: as given and with a capital, each at the start of a text and after a
    space. Spellings that the tokenizer does not know are left out.

    Attributes:
        strength: s; 0 changes nothing, 1 is the published correction.
        answers: words, at least two, whose first tokens differ.
        variant: "affine" or "shift".
        view: the content-free image: "deleted", "unk", or the mean of p_cf over both ("both"), which are the paper's; "noise", a
            control.
        prior: p_cf, one per answer, in place of the view: that of a whole data set, for example its mean over items.
        assign: "own", or, as a control, "next": each answer is corrected by the p_cf of the next one (the last by the first's).
        seed: of the noise, for `view="noise"`.
    """

    strength: float = 1.0
    answers: Sequence[str] = ("yes", "no")
    variant: Variant = "affine"
    view: ContentFree = "deleted"
    prior: Sequence[float] | None = None
    assign: Assigned = "own"
    seed: int = 0
    tokens_: tuple[tuple[int, ...], ...] = field(default=(), init=False, repr=False, compare=False)
    """Of the last run, per answer, the tokens that begin it."""

    name: ClassVar[str] = "PosthocDebias"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters out of range."""
        super().check(anatomy)
        if not 0 <= self.strength < math.inf:
            raise InputError(f"{self.name}: strength must be 0 or more, found {self.strength!r}")
        if self.beta:
            raise InputError(f"{self.name} has no APC: beta must be 0, found {self.beta!r}")
        for what, value, known in (
            ("variant", self.variant, VARIANTS),
            ("view", self.view, CONTENT_FREE),
            ("assign", self.assign, ASSIGNED),
        ):
            if value not in known:
                raise unknown(f"{self.name} {what}", str(value), known)
        if isinstance(self.answers, str) or len(set(self.answers)) < max(2, len(self.answers)):
            raise InputError(f"{self.name}: answers must be a list of two words or more, found {self.answers!r}")
        if self.prior is not None:
            if len(self.prior) != len(self.answers):
                raise InputError(
                    f"{self.name}: a prior of {len(self.prior)} numbers for the answers {', '.join(self.answers)}; give one each"
                )
            if not (min(self.prior) >= 0 and abs(math.fsum(self.prior) - 1) < 1e-3):
                raise InputError(f"{self.name}: a prior must be 0 or more and sum to 1, found {list(self.prior)}")

    def views(self, run: RunContext) -> Sequence[ContrastView]:
        """The batch with a content-free image, in one or two ways; none where the prior is given."""
        self.tokens_ = first_tokens(run.source.tokenizer, self.answers, self.name)
        if self.prior is not None:
            return []
        if self.view == "both":
            return [image_free(run.batch, "deleted"), image_free(run.batch, "unk")]
        return [image_free(run.batch, self.view, self.seed)]

    def combine(self, clean: Tensor, contrasts: Sequence[Tensor], step: Tensor) -> Tensor:
        """The logits, with q in place of p among the answers at the first step."""
        if self.strength == 0:
            return clean
        given = self._log_shares(clean)
        if self.prior is not None:
            prior = torch.tensor(list(self.prior), device=clean.device).expand_as(given)
        else:
            prior = torch.stack([self._log_shares(one).exp() for one in contrasts]).mean(dim=0)
        if self.assign == "next":
            prior = prior.roll(-1, dims=-1)
        if self.variant == "affine":
            wanted = given - self.strength * (prior + FLOOR).log()
        else:
            wanted = (given.exp() - self.strength * prior).clamp(min=self.strength * FLOOR).log()
        change = wanted.log_softmax(dim=-1) - given
        debiased = clean.clone()
        for number, tokens in enumerate(self.tokens_):
            debiased[..., list(tokens)] += change[..., number, None]
        return torch.where((step == 0)[..., None], debiased, clean)

    def _log_shares(self, logits: Tensor) -> Tensor:
        """log p over the answers, [..., answer], from logits [..., vocab]."""
        per_answer = [logits[..., list(tokens)].logsumexp(dim=-1) for tokens in self.tokens_]
        return torch.stack(per_answer, dim=-1).log_softmax(dim=-1)

    def controls(self) -> dict[str, Intervention]:
        """Each answer corrected by the prior of another; and, unless the prior is given, by what is said of noise."""
        found: dict[str, Intervention] = {"next": replace(self, assign="next" if self.assign == "own" else "own")}
        if self.prior is None:
            other: ContentFree = "deleted" if self.view == "noise" else "noise"
            found[other] = replace(self, view=other)
        return found

    def describe(self) -> str:
        """What this does, in a few plain words."""
        source = (
            f"given ({', '.join(f'{one:g}' for one in self.prior)})"
            if self.prior is not None
            else CONTENT_FREE[self.view]
        )
        whose = "" if self.assign == "own" else ", each by that of the next answer"
        return (
            f"the first token among {', '.join(self.answers)} corrected by the prior: {source}{whose}; {self.variant}, strength "
            f"{self.strength:g}"
        )


def first_tokens(tokenizer: Any, answers: Sequence[str], whose: str) -> tuple[tuple[int, ...], ...]:
    """Per answer, the tokens with which its spellings begin: as given and with a capital, at the start and after a space.

    Raises:
        InputError: an answer of which the tokenizer knows no spelling, or two answers that begin alike.
    """
    found: list[tuple[int, ...]] = []
    for answer in answers:
        spellings = dict.fromkeys(
            space + word for word in (answer, answer[:1].upper() + answer[1:]) for space in ("", " ")
        )
        begins = [tokenizer.encode(spelling, add_special_tokens=False)[:1] for spelling in spellings]
        tokens = tuple(
            dict.fromkeys(
                token
                for of_spelling in begins
                for token in of_spelling
                if token != tokenizer.unk_token_id and tokenizer.decode([token]).strip()  # not a space by itself
            )
        )
        if not tokens:
            raise InputError(f"{whose}: this model's tokenizer knows no spelling of the answer {answer!r}")
        for other, taken in zip(answers, found, strict=False):
            shared = sorted(set(tokens) & set(taken))
            if shared:
                raise InputError(
                    f"{whose}: the answers {other!r} and {answer!r} begin with the same token "
                    f"({tokenizer.decode(shared[:1])!r}), by which they cannot be told apart"
                )
        found.append(tokens)
    return tuple(found)
