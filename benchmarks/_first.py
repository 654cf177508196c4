"""Imported first by every script here: puts its folder last on `sys.path`, where probes.py does not hide the package `probes`."""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:] = sorted(sys.path, key=lambda entry: bool(entry) and Path(entry).resolve() == _HERE)
