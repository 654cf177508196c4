"""Tiny random models of the real Hugging Face classes, one builder per entry in `slitlamp.models.families`.

A builder makes the model from a small configuration and the processor from a small tokenizer, in memory, without a network.
"""

from __future__ import annotations

from collections.abc import Callable

from slitlamp.vlm import VLM

BUILDERS: dict[str, Callable[[], VLM]] = {}
