"""Chromium without a window, for tests that look at pages."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (chromium, chromium-browser or google-chrome on the path)"
)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --hide-scrollbars "
    "--disable-component-update --disable-sync --allow-file-access-from-files"
).split()


def browse(folder: Path, *arguments: str, budget: int = 20_000) -> subprocess.CompletedProcess[str]:
    """Run it with a profile in a folder; `budget` is how many milliseconds of the page's own time it waits."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *_FLAGS, f"--virtual-time-budget={budget}", f"--user-data-dir={folder / 'profile'}"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=180, check=True)
