"""The words of CHAIR: which words and pairs of words of a caption mention which category.

The rules are those of Rohrbach et al. 2018 ("Object Hallucination in Image Captioning") and its synonyms file of 80
lines for COCO; any file of that format works. What differs from the published script, and why:

- Plurals are made singular by `inflect` instead of a tagger's lemmas; a word that the file lists is never changed, so
  "bus", "skis", "scissors" and "people" stand for themselves. (The script's entry "wine glas" repairs its own
  singular of "glass" and is not needed.)
- Synonyms are compared in lower case and without surrounding space: the COCO file's "iPhone" and (after two spaces)
  "cheesecake" count, which in the script they never could.
- Every synonym of several words is one mention, also "stove top oven", which the script counts twice because it merges
  pairs only.
- A slash or an underscore separates words.

With the same tokens and singulars, 19,983 of 20,000 published captions of five models gave the script's mentions one by
one; the other 17 are the second and third of these points.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from slitlamp.errors import InputError, unknown
from slitlamp.evaluation.files import read_text

# Pairs that are one word, whether or not the synonyms file knows them: "hot dog" is no dog, "train track" no train.
# The published list has 29 entries; "hot dog" and "teddy bear" are in it twice, "stove top oven" is no pair.
DOUBLE_WORDS = (
    "air plane",
    "baseball bat",
    "baseball glove",
    "bow tie",
    "cell phone",
    "fire hydrant",
    "hair drier",
    "home plate",
    "hot dog",
    "laptop computer",
    "mobile phone",
    "motor bike",
    "motor cycle",
    "parking meter",
    "potted plant",
    "sports ball",
    "stop light",
    "stop sign",
    "stove top oven",
    "street light",
    "suit case",
    "teddy bear",
    "tennis racket",
    "traffic light",
    "traffic signal",
    "train track",
    "wine glass",
)
# "Baby" and "adult" are persons on their own, but say only how old an animal is; a passenger jet is no passenger.
ANIMALS = ("animal", "bear", "bird", "cat", "cow", "cub", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
VEHICLES = ("jet", "train")

_TOKEN = re.compile(r"[^\W_]+(?:-[^\W_]+)*|[^\w\s]")


@dataclass(frozen=True)
class Mention:
    """One mention: `text` is `caption[start:end]`; `word` counts the caption's words (see `n_words`) from 0."""

    category: str
    text: str
    start: int
    end: int
    word: int


@dataclass(frozen=True)
class Synonyms:
    """For each category the words that mention it, the category's own name included."""

    words: Mapping[str, tuple[str, ...]]
    _category: dict[str, str] = field(init=False, repr=False, compare=False)
    _phrases: dict[tuple[str, ...], str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        category: dict[str, str] = {}
        for name, synonyms in self.words.items():
            for synonym in (name, *synonyms):
                known = category.setdefault(" ".join(synonym.lower().split()), name)
                if known != name:
                    raise InputError(f"the synonym {synonym!r} stands for both {known!r} and {name!r}")
        object.__setattr__(self, "_category", category)
        object.__setattr__(self, "_phrases", self._make_phrases())

    def __repr__(self) -> str:
        return f"Synonyms({len(self.words)} categories, {len(self._category)} names)"

    @classmethod
    def read(cls, path: str | Path) -> Synonyms:
        """Read a synonyms file: one category a line, comma-separated, its name first."""
        words: dict[str, tuple[str, ...]] = {}
        owner: dict[str, tuple[str, int]] = {}
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            entries = [" ".join(entry.split()).lower() for entry in line.split(",")]
            if not all(entries):
                raise InputError(f"{path}:{number}: has an empty entry between commas")
            name = entries[0]
            for entry in entries:
                first, where = owner.setdefault(entry, (name, number))
                if first != name or where != number:
                    raise InputError(f"{path}:{number}: {entry!r} already stands for {first!r} on line {where}")
            words[name] = tuple(dict.fromkeys(entries))
        if not words:
            raise InputError(f"{path}: holds no category; expected lines such as 'dog, puppy, hound'")
        return cls(words)

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories in the file's order."""
        return tuple(self.words)

    def category(self, name: str) -> str:
        """The category that a word stands for, plural or singular; an unknown one is an error."""
        tokens = tuple(self._normal(word) for word in name.lower().split())
        found = self._category.get(" ".join(name.lower().split())) or self._category.get(
            self._phrases.get(tokens, " ".join(tokens))
        )
        if found is None:
            raise unknown("category", name, self.words)
        return found

    def mentions(self, caption: str) -> list[Mention]:
        """All mentions in a caption, in order; repeated mentions of a category are all listed."""
        tokens = list(_TOKEN.finditer(caption))
        normal = [self._normal(token.group().lower()) for token in tokens]
        starts = _word_starts(caption)
        longest = max(map(len, self._phrases))
        found: list[tuple[str, int, int]] = []
        position = 0
        while position < len(tokens):
            word, length = normal[position], 1
            for size in range(min(longest, len(tokens) - position), 1, -1):
                phrase = self._phrases.get(tuple(normal[position : position + size]))
                if phrase is not None:
                    word, length = phrase, size
                    break
            found.append((word, tokens[position].start(), tokens[position + length - 1].end()))
            position += length
        # "The seat of the toilet" is no chair.
        skip = {"seat"} if any(word == "toilet" for word, _, _ in found) else set()
        return [
            Mention(self._category[word], caption[start:end], start, end, bisect_right(starts, start) - 1)
            for word, start, end in found
            if word in self._category and word not in skip
        ]

    def _normal(self, word: str) -> str:
        return word if word in self._category else _singular(word)

    def _make_phrases(self) -> dict[tuple[str, ...], str]:
        """From the words of a phrase, made singular, to the synonym (or the unlisted word) that it amounts to."""
        stands_for = {phrase: phrase for phrase in (*DOUBLE_WORDS, *self._category) if " " in phrase}
        for animal in ANIMALS:
            stands_for |= {f"baby {animal}": animal, f"adult {animal}": animal}
        stands_for |= {f"passenger {vehicle}": vehicle for vehicle in VEHICLES}
        stands_for |= {"bow tie": "tie", "toilet seat": "toilet"}
        return {tuple(self._normal(word) for word in phrase.split()): target for phrase, target in stands_for.items()}


def n_words(caption: str) -> int:
    """Length of a caption: its pieces between white space that hold a letter or a digit."""
    return len(_word_starts(caption))


def _word_starts(caption: str) -> list[int]:
    return [piece.start() for piece in re.finditer(r"\S+", caption) if any(map(str.isalnum, piece.group()))]


@cache
def _engine() -> Any:
    import inflect  # two seconds of import, which only captions need

    return inflect.engine()


@cache
def _singular(word: str) -> str:
    return str(_engine().singular_noun(word) or word)
