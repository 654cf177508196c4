"""What holds for every test: no network, no package installed behind our back; and the tiny random models."""

from __future__ import annotations

import os
from typing import Any

# Before any test imports transformers or huggingface_hub, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
# transformer_lens runs `pip install torchvision` by itself when a processor fails to load; this makes that fail.
os.environ["PIP_NO_INDEX"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
from tiny_models.common import random_image
from tiny_models.llava import build_llava, build_llava_next

from slitlamp.vlm import VLM


@pytest.fixture(scope="session", name="build_llava")
def build_llava_fixture() -> Any:
    """The function that builds a random LLaVA-1.5, for tests that need another configuration."""
    return build_llava


@pytest.fixture(scope="session")
def llava() -> VLM:
    return build_llava()


@pytest.fixture(scope="session")
def llava_chat() -> VLM:
    return build_llava(chat=True)


@pytest.fixture(scope="session")
def llava_siglip() -> VLM:
    return build_llava(siglip=True)


@pytest.fixture(scope="session")
def llava_next() -> VLM:
    return build_llava_next()


@pytest.fixture(params=["llava", "llava_siglip", "llava_next"])
def any_vlm(request: pytest.FixtureRequest) -> VLM:
    """Each family in turn."""
    vlm: VLM = request.getfixturevalue(request.param)
    return vlm


@pytest.fixture(scope="session")
def image() -> Any:
    """A function that makes an image of random pixels from a seed (and a size)."""
    return random_image


@pytest.fixture(scope="session")
def organism() -> VLM:
    """The embedded model."""
    return VLM.organism()
