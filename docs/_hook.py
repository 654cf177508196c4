"""mkdocs hook: takes files of the repository into the site, mends their links, and fills in what is generated.

A page says `<!-- generated: NAME [ARGUMENTS] -->` where a text of `_generated.py` belongs.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from _generated import GENERATED
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

# file of the repository -> page of the site
COPIED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "slitlamp/organism/README.md": "organism.md",
    "datasets/emoji_scenes/README.md": "emoji_scenes.md",
    "benchmarks/results/tracing.md": "benchmarks/tracing.md",
    "benchmarks/results/decoding.md": "benchmarks/decoding.md",
    "benchmarks/results/probes.md": "benchmarks/probes.md",
    "benchmarks/results/tracing.svg": "benchmarks/tracing.svg",
    "benchmarks/results/decoding.svg": "benchmarks/decoding.svg",
}

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
_GENERATED = re.compile(r"<!-- generated: (\w+)([^>]*?) *-->")
_FENCE = re.compile(r"^(```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Put the files of the repository among the pages."""
    for source, page in COPIED.items():
        path = ROOT / source
        content = (
            rewritten(path.read_text(encoding="utf-8"), source, page) if page.endswith(".md") else path.read_bytes()
        )
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what is generated."""
    return filled(markdown)


def filled(markdown: str) -> str:
    """The text with every `<!-- generated: ... -->` replaced by what it names."""
    return _GENERATED.sub(lambda match: GENERATED[match[1]](*match[2].split()), markdown)


def rewritten(text: str, source: str, page: str) -> str:
    """The text of a file of the repository with links that hold on the page; what the site lacks is named by its path."""

    def mended(match: re.Match[str]) -> str:
        image, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        goal = COPIED.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if goal is not None:
            return f"{image}[{label}]({posixpath.relpath(goal, posixpath.dirname(page) or '.')}{anchor})"
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{source} links to {target}, and there is no {path}")
        return f"`{path}`" if label.strip("`") in (path, target) else f"{label} (`{path}`)"

    parts = _FENCE.split(text)  # every second part is a block of code
    return "".join(part if number % 2 else _LINK.sub(mended, part) for number, part in enumerate(parts))
