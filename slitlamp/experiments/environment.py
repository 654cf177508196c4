"""What a run was made with: versions, commit, platform, model and seed."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import slitlamp
from slitlamp.flops import BlockSizes

if TYPE_CHECKING:
    from slitlamp.vlm import VLM

_PACKAGES = ("torch", "transformers", "numpy", "pandas", "tokenizers", "pillow")
IDENTITY = ("model", "revision", "weights_hash", "device", "dtype", "seed", "versions", "data")
"""What has to be the same for a run to go on in its folder."""


def versions() -> dict[str, str]:
    """Versions of Python, of slitlamp and of what its numbers depend on."""
    found = {"python": platform.python_version(), "slitlamp": slitlamp.__version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def git_commit() -> str | None:
    """The commit of the checkout that slitlamp runs from, with "+changes" when files differ from it; None elsewhere."""
    root = Path(slitlamp.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def describe_device(device: Any) -> str:
    """The kind of device, with the name of a GPU; not its number."""
    import torch

    return f"{device.type} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device.type)


def describe(vlm: VLM, revision: str | None, seed: int, data: dict[str, str], processes: int = 1) -> dict[str, Any]:
    """The environment of a run, the time of its steps aside."""
    import torch

    one = vlm.anatomy
    return {
        "model": vlm.name,
        "revision": revision,
        "weights_hash": vlm.weights_hash,
        "family": one.family.name,
        "n_layers": one.n_layers,
        "n_heads": one.n_heads,
        "block_sizes": asdict(BlockSizes.of(one)),
        "device": describe_device(vlm.device),
        "dtype": str(vlm.dtype).removeprefix("torch."),
        "seed": seed,
        "versions": versions(),
        "git_commit": git_commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "processes": processes,
        "data": data,
    }
