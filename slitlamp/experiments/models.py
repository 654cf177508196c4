"""Loading the model that a configuration names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from slitlamp.errors import InputError
from slitlamp.experiments.config import ModelConfig

if TYPE_CHECKING:
    from slitlamp.experiments.processes import Processes
    from slitlamp.vlm import VLM

_ORGANISM = re.compile(r"organism(?:[/:](?:seed)?(\d+))?")


def organism_seed(name: str) -> int | None:
    """The seed in `organism`, `organism/seed1` or `organism:1`; None for any other model."""
    found = _ORGANISM.fullmatch(name)
    return None if found is None else int(found.group(1) or 0)


def load_model(spec: ModelConfig, processes: Processes | None = None) -> VLM:
    """Load a model, in one of several processes on the device that is that process's own.

    Raises SlitlampError with what can be done about it when that fails.
    """
    from slitlamp.vlm import VLM

    if processes is not None and processes.size > 1:
        spec = _for_process(spec, processes)
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


def _for_process(spec: ModelConfig, processes: Processes) -> ModelConfig:
    """The same with the device of this process.

    Raises:
        InputError: a device or a device_map that all processes would share.
    """
    if spec.device_map is not None:
        raise InputError(
            f"device_map {spec.device_map!r} spreads one model over all devices, but {processes.size} processes would each "
            "do so; run one process, or leave device_map out, so that each process holds the model on a device of its own"
        )
    if spec.device is not None and ":" in spec.device:
        raise InputError(
            f"device {spec.device!r} would hold the models of all {processes.size} processes; write "
            f"{spec.device.partition(':')[0]!r}, or leave it out: each process then takes a device of its own"
        )
    own = processes.device
    if spec.device is None and own is not None and own.type != "cpu":
        return spec.model_copy(update={"device": str(own)})
    return spec
