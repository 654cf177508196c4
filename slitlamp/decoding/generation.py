"""What generation gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slitlamp.models.batch import Batch


@dataclass(frozen=True, eq=False)  # it holds a batch
class Generation:
    """Texts that a VLM generated.

    Attributes:
        batch: the prompts.
        tokens: per row, the generated ids, with the end token when it was emitted.
        texts: per row, the text without special tokens.
        spans: per row and token, the range of characters of `texts` that it stands for; empty for special tokens.
        stopped: per row, whether it ended by an end token rather than by the limit.
    """

    batch: Batch
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    spans: tuple[tuple[tuple[int, int], ...], ...]
    stopped: tuple[bool, ...]

    def teacher_forced(self) -> Batch:
        """The prompts with the generated tokens after them, to be run in one forward pass."""
        return self.batch.with_continuation(self.tokens)

    def __repr__(self) -> str:
        rows = [f"  {name}: {text!r}" for name, text in zip(self.batch.ids, self.texts, strict=True)]
        return "\n".join([f"Generation of {len(self.texts)} texts", *rows[:8], *(["  ..."] if len(rows) > 8 else [])])


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
