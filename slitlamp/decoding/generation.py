"""What generation gives back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from slitlamp.decoding.beam_search import Beams
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models.batch import Batch
from slitlamp.reporters import html_of


@dataclass(frozen=True)
class Traceback:
    """Once that decoding went back in a text (see `slitlamp.decoding.backtracking`).

    Attributes:
        step: the step at which it was stopped, counted from 0 in the text as it stood.
        token: the id that was about to be said there.
        score: the detector's, of the state that chose it.
        back_to: the step it went back to.
        removed: the id that was taken out there.
        replacement: the id that was put there.
        capped: whether a cap ended it: what the sentence said before it was first gone back in was put back from `back_to`, the
            first step at which that differs, on (`removed` and `replacement` are those of this step).
    """

    step: int
    token: int
    score: float
    back_to: int
    removed: int
    replacement: int
    capped: bool


@dataclass(frozen=True, eq=False)  # it holds a batch
class Generation:
    """Texts that a VLM generated.

    Attributes:
        batch: the prompts.
        tokens: per row, the generated ids, with the end token when it was emitted.
        texts: per row, the text without special tokens.
        spans: per row and token, the range of characters of `texts` that it stands for; empty for special tokens.
        stopped: per row, whether it ended by an end token rather than by the limit.
        n_image: per row, how many image tokens the language model was given: those of the prompt, or what edits of visual tokens
            left of them. For families that read the image by cross-attention, those that stand for it in the prompt.
        seconds: wall time of the whole generation, with all extra passes of interventions.
        tracebacks: per row, where decoding went back, in order; () under no intervention that does.
    """

    batch: Batch
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    stopped: tuple[bool, ...]
    n_image: tuple[int, ...] = ()
    seconds: float = float("nan")
    tracebacks: tuple[tuple[Traceback, ...], ...] = ()

    def teacher_forced(self) -> Batch:
        """The prompts with the generated tokens after them, to be run in one forward pass."""
        return self.batch.with_continuation(self.tokens)

    def token_of(self, word: str, row: int = 0) -> int:
        """The number of the generated token that begins a word (or several), where it first occurs in a row's text.

        Raises:
            InputError: the text does not hold it.
        """
        found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", self.texts[row])
        if found is None:
            raise InputError(f"row {row} does not say {word!r}; its text is {self.texts[row]!r}")
        return next(token for token, (_, end) in enumerate(self.spans[row]) if end > found.start())

    @staticmethod
    def of(
        batch: Batch, tokenizer: Any, rows: Sequence[Sequence[int]], ends: Sequence[int], **measured: Any
    ) -> Generation:
        """From what the model generated after each prompt: per row, ids up to the longest row's end.

        Args:
            batch: the prompts.
            tokenizer: which decodes the ids.
            rows: of ids.
            ends: ids that end a row.
            measured: `n_image`, `seconds` and `tracebacks`.
        """
        tokens, stopped = [], []
        for row in rows:
            end = next((place for place, token in enumerate(row) if token in ends), None)
            stopped.append(end is not None)
            tokens.append(tuple(row if end is None else row[: end + 1]))
        decoded = [token_spans(tokenizer, row) for row in tokens]
        return Generation(
            batch=batch,
            tokens=tuple(tokens),
            texts=tuple(text for text, _ in decoded),
            spans=tuple(spans for _, spans in decoded),
            stopped=tuple(stopped),
            **measured,
        )

    def __repr__(self) -> str:
        rows = [f"  {name}: {text!r}" for name, text in zip(self.batch.ids, self.texts, strict=True)]
        lines = [f"Generation of {len(self.texts)} texts", *rows[:8], *(["  ..."] if len(rows) > 8 else [])]
        back = [one for row in self.tracebacks for one in row]
        if back:
            n_texts, n_capped = sum(map(bool, self.tracebacks)), sum(one.capped for one in back)
            lines.append(
                f"  tracebacks: {len(back) - n_capped} in {n_texts} texts, {n_capped} times a sentence put back"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str | None:
        return html_of("generation_html", self)


def token_spans(tokenizer: Any, tokens: Sequence[int]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Decode tokens, and find which characters each stands for.

    A token stands for the characters that the text gains when it is added to those before it. Tokens that make up one
    character together (bytes of it) all get that character.

    Returns:
        (text without special tokens, per token its range of characters).
    """
    text = ""
    spans: list[tuple[int, int]] = []
    for end in range(1, len(tokens) + 1):
        longer = tokenizer.decode(list(tokens[:end]), skip_special_tokens=True)
        shared = len(text) if longer.startswith(text) else 0
        while shared < min(len(text), len(longer)) and text[shared] == longer[shared]:
            shared += 1
        start = shared
        while start < len(longer) and longer[start] == " ":
            start += 1
        if len(longer) > shared:  # text that has given way stood for a character that was not complete
            spans = [(min(a, start), len(longer)) if b > shared else (a, b) for a, b in spans]
            spans.append((start, len(longer)))
        else:
            spans.append((len(longer), len(longer)))
        text = longer
    return text, tuple(spans)


@dataclass(frozen=True)
class Plan:
    """How to generate: the arguments of Hugging Face's `generate` beside the batch's inputs, the ids that end a row, and the
    beams of a search (None for other decoding).
    """

    arguments: dict[str, Any]
    ends: tuple[int, ...]
    beams: Beams | None = None

    def saying(self, rows: Sequence[Sequence[int]], pad_token_id: int) -> Plan:
        """The plan of a plain generation that can only say these tokens: per row, ids up to its end."""
        arguments = {
            "max_new_tokens": max(map(len, rows)),
            "num_beams": 1,
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "pad_token_id": pad_token_id,
            "eos_token_id": list(self.ends) or None,
            "logits_processor": LogitsProcessorList([_Saying(rows, pad_token_id)]),
        }
        return Plan(arguments, self.ends)


class _Saying(LogitsProcessor):
    """Leaves at every step one token to choose."""

    def __init__(self, rows: Sequence[Sequence[int]], pad_token_id: int) -> None:
        self._rows = rows
        self._pad = pad_token_id
        self._step = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Zero at the next token of each row, -inf elsewhere."""
        step = self._step
        self._step += 1
        chosen = [row[step] if step < len(row) else self._pad for row in self._rows]
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)


def check_criteria(criteria: Sequence[Any], whose: str) -> None:
    """Refuse what ends rows otherwise than by their tokens and their length.

    Raises:
        UnsupportedError: there is such a criterion.
    """
    odd = [type(one).__name__ for one in criteria if not isinstance(one, EosTokenCriteria | MaxLengthCriteria)]
    if odd:
        raise UnsupportedError(f"{', '.join(odd)} beside {whose}: rows end at an end token or at max_new_tokens")


def plan_generation(
    batch: Batch,
    max_new_tokens: int,
    seed: int | None,
    options: Mapping[str, Any],
    default_ends: Sequence[int],
    config: GenerationConfig,
) -> Plan:
    """Check the options of a generation.

    Args:
        batch: prompts.
        max_new_tokens: limit of new tokens.
        seed: of sampling; None for greedy decoding.
        options: further arguments of Hugging Face's `generate`.
        default_ends: the model's own end tokens.
        config: the model's own, for what a beam search is not told.

    Raises:
        InputError: a batch with a continuation, a seed without sampling or sampling without a seed, no new tokens.
        UnsupportedError: decoding that does not follow one sequence per row, token by token.
    """
    options = dict(options)
    if any(batch.n_generated):
        raise InputError("generate takes prompts; this batch has a continuation (see Batch.prompt_only)")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be 1 or more, found {max_new_tokens}")
    sample = bool(options.setdefault("do_sample", False))
    if sample == (seed is None):
        raise InputError(
            "sampling needs a seed, so that it can be repeated" if sample else "greedy decoding takes no seed"
        )
    n_beams = options.pop("num_beams", 1)
    if not isinstance(n_beams, int) or n_beams < 1:
        raise InputError(f"num_beams must be a whole number of 1 or more, found {n_beams!r}")
    if n_beams > 1 and sample:
        raise UnsupportedError("num_beams with do_sample: beams are searched for without sampling")
    beams = None
    if n_beams > 1:  # transformers is told of one beam, and so must not be told how to search
        found = {name: options.pop(name, getattr(config, name)) for name in ("length_penalty", "early_stopping")}
        beams = Beams(n_beams, **{name: value for name, value in found.items() if value is not None})
    if options.pop("num_return_sequences", 1) != 1:
        raise UnsupportedError("num_return_sequences other than 1: slitlamp follows one text per prompt")
    for option in ("stop_strings", "stopping_criteria", "assistant_model", "prompt_lookup_num_tokens"):
        if options.get(option) is not None:
            raise UnsupportedError(f"{option}: rows must end at an end token or at max_new_tokens, token by token")
    ends = options.pop("eos_token_id", default_ends)
    ends = (ends,) if isinstance(ends, int) else tuple(ends or ())
    if not sample:  # a model's own defaults for sampling would only make transformers warn
        options = {"temperature": None, "top_p": None, "top_k": None, **options}
    arguments = {
        "max_new_tokens": max_new_tokens,
        "num_beams": 1,
        "pad_token_id": batch.pad_token_id,
        "eos_token_id": list(ends) or None,
        **options,
    }
    return Plan(arguments, ends, beams)
