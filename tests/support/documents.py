"""Reading the documentation for its tests: pages, blocks of code with what they print, numbers with their intervals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

_BLOCK = re.compile(
    r"(?P<skip><!-- not run: (?P<why>[^>]*?) -->\s*)?"
    r"^```(?P<language>\w+)\n(?P<code>.*?)^```\n"
    r"(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
_NUMBER = re.compile(r"[-+]?(?:\d+\.\d+|\.\d+|\d+)(?:e[-+]?\d+)?")
_INTERVAL = re.compile(rf"({_NUMBER.pattern})(?: %| nats)? \[({_NUMBER.pattern}), ({_NUMBER.pattern})\]")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        language: what stands behind the fence.
        code: what is in it.
        output: the block of text right behind a block of code: what it prints. None where there is none.
        skipped: why it is not run; empty for those that are.
    """

    language: str
    code: str
    output: str | None
    skipped: str


def pages() -> list[str]:
    """The pages that lie in docs/, and the README, by their paths in the repository."""
    return ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]


def text_of(page: str) -> str:
    """The Markdown of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[Block]:
    """The blocks of a language on a page, in order."""
    found = [
        Block(match["language"], match["code"], match["output"], match["why"] or "")
        for match in _BLOCK.finditer(text_of(page))
    ]
    return [block for block in found if block.language == language]


def same_output(shown: str, printed: str) -> bool:
    """Whether two texts are the same but for spaces, and for 1 in the last digit of decimals that are shown."""
    if _NUMBER.sub("#", shown).split() != _NUMBER.sub("#", printed).split():
        return False
    return all(
        abs(float(one) - float(other)) <= 1.5 * 10.0 ** -len(one.partition(".")[2]) if "." in one else one == other
        for one, other in zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True)
    )


def intervals(text: str) -> Iterator[tuple[str, str, str]]:
    """Every `value [low, high]`, as written."""
    for match in _INTERVAL.finditer(text.replace("\\", "")):
        yield match[1], match[2], match[3]


def rounds_to(full: str, shown: str) -> bool:
    """Whether a number, as it is shown, is another one with fewer digits."""
    return abs(float(full) - float(shown)) <= 0.5000001 * 10.0 ** -len(shown.partition(".")[2])
