"""Truthful-guided pre-intervention: go back before a hallucination is said (TruthPrInt, ICCV 2025, arXiv 2503.10602)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from interventions.given_tensors import name_of
from probes.truthful_file import Detector, TruthfulFile
from probes.truthful_gather import SENTENCE_ENDS
from slitlamp.decoding.backtracking import BacktrackingDecoding, Decoded
from slitlamp.decoding.intervention import Intervention, RunContext
from slitlamp.decoding.traceback_rules import Watch
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy

Select = Literal["probe", "random_places", "random", "shuffled"]
SELECTS = ("probe", "random_places", "random", "shuffled")
STEPS = ("objects", "every")


@dataclass(eq=False)
class TruthfulPreIntervention(BacktrackingDecoding):
    """Where the state that chose an object's first word looks like one before a hallucination, decoding goes back.

    The score of the residual stream is that of a direction which `TruthfulDirection.save` wrote (the paper's detector is a
    perceptron of three layers, of which the linear one is a baseline); the threshold is where a share `fpr` of true mentions,
    of the images it was fitted on and out of fold, lies above. `slitlamp.decoding.backtracking` says how decoding goes back, and
    what happens at a cap. A token that is put in place of another is not scored at that step.

    What a state is judged by was calibrated on mentions of objects. With `steps="every"` it is asked of all other words too, and
    of answers to questions; how many of these are above the threshold, nobody has measured.

    Attributes:
        probe: a file of `TruthfulDirection.save`, or a mapping of its tensors: direction [d_model], intercept, layer and
            true_scores [mention]; what its control `random` needs, random_directions [n, d_model] and random_true_scores
            [n, mention]; and shuffled_direction, shuffled_intercept and shuffled_true_scores for `shuffled`.
        fpr: share of true mentions above the threshold, between 0 and 1; .01 is the paper's. At 0 nothing is ever above it.
        threshold: of the score, in place of what `fpr` gives; None for that.
        steps: "objects": steps whose chosen token begins one of the words; "every": all. Which the paper's figures have is not
            known [?].
        words: in lower case, plurals included; None for the first words of the mentions that the file's scores are of. A word of
            several tokens is known by its first, which other words may share.
        max_tracebacks: how often it may go back in a sentence; the paper has 1 to 5 [?].
        max_per_text: how often it may go back in a text; ours.
        select: "probe", or a control: "random_places": a decoding under the probe comes first, and then as many steps of those
            that are scored, drawn at random, stop a second one (fewer where that one scores fewer); "random": a random
            direction of the file with its own threshold of the same `fpr`; "shuffled": likewise one of shuffled labels.
        seed: of the random places; for "random", which of the file's directions, from 0.
    """

    probe: str | Path | Mapping[str, Any]
    fpr: float = 0.01
    threshold: float | None = None
    steps: Literal["objects", "every"] = "objects"
    words: Sequence[str] | None = None
    select: Select = "probe"
    seed: int = 0

    name: ClassVar[str] = "TruthfulPreIntervention"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a direction of another model, and parameters out of range."""
        super().check(anatomy)
        for what, value, known in (("steps", self.steps, STEPS), ("select", self.select, SELECTS)):
            if value not in known:
                raise unknown(f"{self.name} {what}", str(value), known)
        if not 0 <= self.fpr <= 1:
            raise InputError(f"{self.name}: fpr must be between 0 and 1, found {self.fpr!r}")
        if self.threshold is not None and math.isnan(self.threshold):
            raise InputError(f"{self.name}: threshold must be a number, found {self.threshold!r}")
        if self.threshold is not None and self.select in ("random", "shuffled"):
            raise InputError(
                f"{self.name}: a threshold of one direction's scores says nothing of those of the control {self.select!r}; give "
                "fpr instead"
            )
        file = self._file()
        detector = self._detector(file)
        if not -1 <= file.layer < anatomy.n_layers or len(detector.direction) != anatomy.d_model:
            raise InputError(
                f"{self.name}: a direction of {len(detector.direction)} numbers of layer {file.layer}, for a model of width "
                f"{anatomy.d_model} with layers 0 to {anatomy.n_layers - 1} (-1 for the input); fit it on this model"
            )
        if self.steps == "objects" and not self._words(file):
            raise InputError(f"{self.name}: steps='objects' needs words, and {name_of(self.probe)} names none")

    def _file(self) -> TruthfulFile:
        return TruthfulFile.read(self.probe, self.name)

    def _words(self, file: TruthfulFile) -> Sequence[str]:
        return file.words if self.words is None else self.words

    def _detector(self, file: TruthfulFile) -> Detector:
        wanted: str = "probe" if self.select == "random_places" else self.select
        if self.select == "random" and self.seed:
            wanted = f"random {self.seed}"
        if wanted not in file.detectors:
            raise unknown(f"direction in {name_of(self.probe)} for select={self.select!r}:", wanted, file.detectors)
        return file.detectors[wanted]

    def watch(self, run: RunContext) -> Watch:
        """The score of the chosen direction, and its threshold."""
        file, tokenizer = self._file(), run.source.tokenizer
        detector = self._detector(file)
        return Watch(
            layer=file.layer,
            score=detector.score,
            threshold=detector.threshold(self.fpr) if self.threshold is None else self.threshold,
            begins=None if self.steps == "every" else word_beginnings(tokenizer, self._words(file), self.name),
            ends_sentence=sentence_end(tokenizer),
        )

    def again(self, watch: Watch, decoded: Decoded) -> Watch | None:
        """For random places: as many among as many steps as the probe has stopped, drawn from what each row said under it."""
        if self.select != "random_places":
            return None
        each = zip(decoded.tokens, decoded.tracebacks, decoded.n_watched, strict=True)
        places = [
            np.random.default_rng([self.seed, *tokens]).choice(n_watched, size=len(stopped), replace=False)
            for tokens, stopped, n_watched in each
        ]
        return replace(watch, places=tuple(frozenset(one.tolist()) for one in places))

    def controls(self) -> dict[str, Intervention]:
        """As many stops at random places; and, where the file has them, a random direction and one of shuffled labels."""
        controls: dict[str, Intervention] = {"random_places": replace(self, select="random_places")}
        held = self._file().detectors
        if self.threshold is None:
            controls |= {one: replace(self, select=one, seed=0) for one in ("random", "shuffled") if one in held}
        return controls

    def describe(self) -> str:
        """What this does, in a few plain words."""
        if self.select == "random_places":
            who = f"as many random steps as have one above the threshold of {name_of(self.probe)}"
        else:
            kinds = {
                "probe": "the direction",
                "random": "a random direction",
                "shuffled": "a direction of shuffled labels",
            }
            who = f"a state above the threshold of {kinds[self.select]} of {name_of(self.probe)}"
        where = "before an object's word" if self.steps == "objects" else "at any step"
        at = f"false-positive rate {self.fpr:g}" if self.threshold is None else f"threshold {self.threshold:g}"
        return (
            f"goes back in the sentence at {who} {where} ({at}; up to {self.max_tracebacks} times a sentence, "
            f"{self.max_per_text} a text)"
        )


def sentence_end(tokenizer: Any) -> Callable[[int], bool]:
    """Whether a sentence ends with a token: by its own text, as `TruthfulDirection` has it."""
    known: dict[int, bool] = {}

    def ends(token: int) -> bool:
        if token not in known:
            known[token] = tokenizer.decode([token]).strip().endswith(SENTENCE_ENDS)
        return known[token]

    return ends


def word_beginnings(tokenizer: Any, words: Sequence[str], whose: str) -> Callable[[Sequence[int], int], bool]:
    """Whether a token begins one of some words in a text: (tokens before, token) -> bool. Upper case counts as lower case.

    Args:
        tokenizer: of the model.
        words: in lower case.
        whose: the intervention, for messages.

    Raises:
        InputError: the tokenizer knows none of the words.
    """
    pieces = {piece for word in words if (piece := _first_piece(tokenizer, word))}
    if not pieces:
        raise InputError(f"{whose}: the model's tokenizer knows none of the words {', '.join(list(words)[:5])}")
    texts: dict[int, str] = {}

    def begins(before: Sequence[int], token: int) -> bool:
        if token not in texts:
            texts[token] = tokenizer.decode([token], skip_special_tokens=True).strip().lower()
        if texts[token] not in pieces:
            return False
        if not before:
            return True
        pair = tokenizer.decode([before[-1], token], skip_special_tokens=True)
        return not pair[: len(pair) - len(texts[token])][-1:].isalnum()

    return begins


def _first_piece(tokenizer: Any, word: str) -> str:
    """The text of a word's first token in the middle of a text; "" where the tokenizer does not know it."""
    ids = tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        return ""
    rest = ids[len(tokenizer("a", add_special_tokens=False)["input_ids"]) :]
    texts = (tokenizer.decode([one]).strip().lower() for one in rest)
    return next((one for one in texts if one), "")
