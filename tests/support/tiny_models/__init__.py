"""Tiny random models of the real Hugging Face classes, one builder per entry in `slitlamp.models.families`.

A builder makes the model from a small configuration and the processor from a small tokenizer, in memory, without a network.
Each module of a group of families has a `BUILDERS` of its own: the configuration's `model_type`, with a word after it for a
variant ("llava siglip"), to the function that builds it.
"""

from __future__ import annotations

from collections.abc import Callable

from slitlamp.vlm import VLM
from tiny_models import blip, cohere, gemma, idefics, internvl, llama4, llava, mllama, pixtral, qwen

BUILDERS: dict[str, Callable[[], VLM]] = {
    **llava.BUILDERS,
    **blip.BUILDERS,
    **internvl.BUILDERS,
    **cohere.BUILDERS,
    **idefics.BUILDERS,
    **gemma.BUILDERS,
    **pixtral.BUILDERS,
    **mllama.BUILDERS,
    **qwen.BUILDERS,
    **llama4.BUILDERS,
}
