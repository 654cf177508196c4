"""What holds for every test: no network, and no package installed behind our back."""

from __future__ import annotations

import os

# Before any test imports transformers or huggingface_hub, which read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
# transformer_lens runs `pip install torchvision` by itself when a processor fails to load; this makes that fail.
os.environ["PIP_NO_INDEX"] = "1"
