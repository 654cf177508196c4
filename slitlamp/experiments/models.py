"""Loading the model that a configuration names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from slitlamp.errors import InputError
from slitlamp.experiments.config import ModelConfig

if TYPE_CHECKING:
    from slitlamp.vlm import VLM

_ORGANISM = re.compile(r"organism(?:[/:](?:seed)?(\d+))?")


def organism_seed(name: str) -> int | None:
    """The seed in `organism`, `organism/seed1` or `organism:1`; None for any other model."""
    found = _ORGANISM.fullmatch(name)
    return None if found is None else int(found.group(1) or 0)


def load_model(spec: ModelConfig) -> VLM:
    """Load a model. Raises SlitlampError with what can be done about it when that fails."""
    from slitlamp.vlm import VLM

    seed = organism_seed(spec.id)
    if seed is not None:
        if spec.revision or spec.device_map:
            raise InputError("the embedded model takes no revision and no device_map")
        return VLM.organism(seed, dtype=spec.dtype or "float32", device=spec.device or "cpu")
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    for key in ("revision", "device", "device_map", "dtype"):
        if (value := getattr(spec, key)) is not None:
            options[key] = value
    try:
        return VLM.from_pretrained(spec.id, **options)
    except OSError as error:  # what transformers raises for ids and folders that hold no model
        raise InputError(f"cannot load the model {spec.id!r}: {str(error).splitlines()[0]}") from error
