"""When decoding goes back, and where to: the rules, for one text as it is said (see `slitlamp.decoding.backtracking`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from slitlamp.decoding.generation import Traceback


@dataclass(frozen=True)
class Watch:
    """What stops decoding.

    Attributes:
        layer: the block whose output is looked at; -1 for the input of the first.
        score: the states [batch, d_model] that choose the next tokens -> [batch].
        threshold: the score above which it fires.
        begins: (tokens of the text so far, chosen token) -> whether the step is looked at; None for every step.
        ends_sentence: token -> whether a sentence ends with it.
        places: fires, whatever the scores, at these of the steps that are looked at in a row, counted from 0 as they come; None
            for the threshold.
    """

    layer: int
    score: Callable[[Tensor], Tensor]
    threshold: float
    begins: Callable[[Sequence[int], int], bool] | None
    ends_sentence: Callable[[int], bool]
    places: tuple[frozenset[int], ...] | None = None


class Step:
    """A step of the sentence that is being said: how sure the model was, and what may be said there."""

    def __init__(self, chosen: int, confidence: float, ranked: Sequence[int]) -> None:
        self.confidence = confidence
        self._ranked = ranked
        self._tried = {chosen}

    @property
    def next_ranked(self) -> int | None:
        """The best token that has not been tried here; None where there is none."""
        return next((one for one in self._ranked if one not in self._tried), None)

    def retry(self, token: int) -> None:
        """Try a token."""
        self._tried.add(token)


class Row:
    """One text as it is said: the rules of going back. It knows nothing of the model, nor of other rows.

    Attributes:
        tokens: so far.
        columns: of each token that has been fed back, the column of the cache after the prompt; the last token has not been.
        ended: whether an end token was said or the limit is reached.
        tracebacks: so far.
        n_watched: how many steps have been looked at.
    """

    def __init__(
        self,
        watch: Watch,
        places: frozenset[int] | None,
        caps: tuple[int, int],
        ends: Sequence[int],
        max_new_tokens: int,
    ) -> None:
        self.tokens: list[int] = []
        self.columns: list[int] = []
        self.ended = False
        self.tracebacks: list[Traceback] = []
        self.n_watched = 0
        self._watch = watch
        self._places = places
        self._per_sentence, self._per_text = caps
        self._ends = frozenset(ends)
        self._limit = max_new_tokens
        self._n_back = 0
        self._put_back: list[int] = []
        self._begin_sentence()

    def _begin_sentence(self) -> None:
        self._start = len(self.tokens)
        self._steps: list[Step] = []
        self._original: list[int] | None = None
        self._n_back_here = 0
        self._unwatched = self._n_back >= self._per_text

    def take(self, chosen: int, score: float, confidence: float, ranked: Sequence[int]) -> bool:
        """Take a token that was chosen, or go back; returns whether tokens were taken out.

        Args:
            chosen: the token.
            score: of the state that chose it.
            confidence: the largest probability of the step.
            ranked: the best tokens of the step that may be said, in order; one more than there may be tracebacks in a sentence.
        """
        if self._put_back:
            self._say(self._put_back.pop(0))
            return False
        step = Step(chosen, confidence, ranked)
        self._steps.append(step)
        if self._unwatched or not self._fires(chosen, score):
            self._say(chosen)
            return False
        return self._go_back(chosen, score)

    def _fires(self, chosen: int, score: float) -> bool:
        if self._watch.begins is not None and not self._watch.begins(self.tokens, chosen):
            return False
        number = self.n_watched
        self.n_watched += 1
        return score > self._watch.threshold if self._places is None else number in self._places

    def _go_back(self, chosen: int, score: float) -> bool:
        said = [*self.tokens[self._start :], chosen]
        open_steps = [n for n in range(max(len(said) - 1, 1)) if self._steps[n].next_ranked is not None]
        place = min(open_steps, key=lambda n: self._steps[n].confidence, default=None)
        if place is None or self._n_back_here >= self._per_sentence or self._n_back >= self._per_text:
            return self._give_up(said, score)
        token = self._steps[place].next_ranked
        assert token is not None
        self._log(said, score, place, token, capped=False)
        if self._original is None:
            self._original = said
        self._n_back += 1
        self._n_back_here += 1
        del self._steps[place + 1 :]
        self._steps[place].retry(token)
        return self._replace(place, token)

    def _give_up(self, said: list[int], score: float) -> bool:
        self._unwatched = True
        if self._original is None:
            self._say(said[-1])
            return False
        place = next(n for n, (old, new) in enumerate(zip(self._original, said, strict=False)) if old != new)
        token, *self._put_back = self._original[place:]
        self._log(said, score, place, token, capped=True)
        return self._replace(place, token)

    def _log(self, said: Sequence[int], score: float, place: int, token: int, *, capped: bool) -> None:
        step = self._start + len(said) - 1
        self.tracebacks.append(Traceback(step, said[-1], score, self._start + place, said[place], token, capped))

    def _replace(self, place: int, token: int) -> bool:
        del self.tokens[self._start + place :]
        del self.columns[self._start + place :]
        self._say(token)
        return True

    def _say(self, token: int) -> None:
        self.tokens.append(token)
        self.ended = token in self._ends or len(self.tokens) >= self._limit
        if self._watch.ends_sentence(token):
            self._begin_sentence()
