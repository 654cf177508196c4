"""Chromium without a window, for tests that look at pages."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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


def answer_of(page: Path, *arguments: str, patience: float = 120.0) -> Any:
    """What a script in a page sends home by `fetch("/found", {method: "POST", body: JSON text})`, in real time.

    The page is served with its folder, since a page's own time runs away from work that other threads do for it.
    """
    assert CHROMIUM is not None
    came: queue.Queue[bytes] = queue.Queue()

    class Home(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            came.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Home, directory=str(page.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/{page.name}"
    profile = f"--user-data-dir={page.parent / 'profile'}"
    browser = subprocess.Popen(
        [CHROMIUM, *_FLAGS, "--remote-debugging-port=0", profile, *arguments, address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return json.loads(came.get(timeout=patience))
    finally:
        browser.terminate()
        browser.wait(timeout=30)
        server.shutdown()
