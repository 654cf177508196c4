"""The resumable state of a training run as one safetensors file: no pickle, replaced atomically."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: `step` steps of `stage` are done."""

    stage: str
    step: int


def save_state(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None, progress: Progress
) -> None:
    """Write modules, optimizer moments and progress; a kill at any moment leaves the old file or the new one."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            tensors[f"{prefix}/{name}/value"] = parameter.detach().contiguous()
            moments = {} if optimizer is None else optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in moments:
                    tensors[f"{prefix}/{name}/{key}"] = moments[key].contiguous()
    metadata = {"progress": json.dumps({"stage": progress.stage, "step": progress.step})}
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata=metadata)
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(path)


def read_progress(path: Path) -> Progress:
    """Read only how far the saved run is."""
    with safe_open(path, framework="pt") as stream:
        return Progress(**json.loads(stream.metadata()["progress"]))


def load_state(path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer | None) -> Progress:
    """Restore what `save_state` wrote, in place; moments only where an optimizer is given."""
    progress = read_progress(path)
    with safe_open(path, framework="pt") as stream:
        stored = set(stream.keys())
        for prefix, module in modules.items():
            for name, parameter in module.named_parameters():
                parameter.data.copy_(stream.get_tensor(f"{prefix}/{name}/value"))
                if optimizer is None or f"{prefix}/{name}/exp_avg" not in stored:
                    continue
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(progress.step)),
                    "exp_avg": stream.get_tensor(f"{prefix}/{name}/exp_avg"),
                    "exp_avg_sq": stream.get_tensor(f"{prefix}/{name}/exp_avg_sq"),
                }
    return progress
