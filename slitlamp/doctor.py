"""`slitlamp doctor`: what this machine has, and whether slitlamp works on it."""

from __future__ import annotations

import os
import platform
import shutil
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from transformers.utils import import_utils

from slitlamp.decoding import Generation
from slitlamp.errors import SlitlampError
from slitlamp.experiments import load_dataset, registry
from slitlamp.experiments.environment import versions
from slitlamp.tracing import sites
from slitlamp.vlm import VLM

Rows = list[tuple[str, str]]
_OPTIONAL = {
    "accelerate": "device_map and several processes",
    "nnsight": "the backend nnsight",
    "transformer-lens": "activation caches of TransformerLens",
    "torchvision": "the processors of Mistral 3, Llama 4 and LLaVA on a Pixtral tower",
    "flash-attn": "attn_implementation='flash_attention_2'",
}
_TOLERANCE = 1e-4
"""Between attention under sdpa, recomputed row by row, and eager attention, in float32: sums of 73 keys in another order."""
_LITTLE = 2e9
"""Bytes: less free memory than this and not even the embedded model and its tools are comfortable."""


@dataclass
class Examination:
    """What was found.

    Attributes:
        sections: rows of text by title.
        problems: what does not work, and what to do about it.
    """

    sections: dict[str, Rows] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def examine() -> Examination:
    """Look at versions, memory, devices, attention, plug-ins, and run the embedded model once."""
    found = Examination()
    found.sections["Versions"] = _versions()
    found.sections["Memory and disk"] = _memory(found.problems)
    found.sections["Devices"] = _devices()
    found.sections["Attention implementations"] = _attention()
    found.sections["Probes and interventions"] = _plugins(found.problems)
    found.sections["Trial on the embedded model"] = _trial(found.problems)
    return found


def _versions() -> Rows:
    rows = [*versions().items(), ("platform", f"{platform.system()} {platform.release()} {platform.machine()}")]
    for name, purpose in _OPTIONAL.items():
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, f"not installed; only needed for {purpose}"))
    return rows


def _memory(problems: list[str]) -> Rows:
    memory = psutil.virtual_memory()
    if memory.available < _LITTLE:
        problems.append(f"only {_size(memory.available)} of memory are free: close something, or take smaller batches")
    rows = [("memory", f"{_size(memory.available)} free of {_size(memory.total)}")]
    for name, folder in (("here", Path.cwd()), ("models of the hub", Path(HF_HUB_CACHE))):
        there = next(one for one in (folder, *folder.parents) if one.is_dir())
        rows.append((name, f"{_size(shutil.disk_usage(there).free)} free at {folder}"))
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
    if offline:
        rows.append(("hub", f"not reached: {' and '.join(offline)} set"))
    return rows


def _devices() -> Rows:
    rows = [("cpu", f"{psutil.cpu_count(logical=True)} cores, of which torch uses {torch.get_num_threads()}")]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        bfloat16 = "bfloat16" if torch.cuda.get_device_capability(number) >= (8, 0) else "no fast bfloat16"
        name = torch.cuda.get_device_name(number)
        rows.append((f"cuda:{number}", f"{name}, {_size(free)} free of {_size(total)}, {bfloat16}"))
    if torch.backends.mps.is_available():
        rows.append(("mps", f"{_size(torch.mps.recommended_max_memory())} recommended at most"))
    if len(rows) == 1:
        rows.append(("gpu", "none that torch sees; everything runs on the CPU"))
    return rows


def _attention() -> Rows:
    flash = import_utils.is_flash_attn_2_available()
    return [
        ("sdpa", "here: the usual one; attention is recorded by computing the rows asked for a second time"),
        ("eager", "here: attention is recorded as it is; T x T matrices are built by the model"),
        (
            "flash_attention_2",
            "here: attention is recorded as under sdpa, and cannot be edited"
            if flash
            else "not here: needs a CUDA device and the package flash-attn",
        ),
        ("others", "cannot be recorded: load the model with attn_implementation='sdpa'"),
    ]


def _plugins(problems: list[str]) -> Rows:
    rows = []
    for kind in ("probe", "intervention"):
        names = registry.names(kind)
        for name in names:
            try:
                registry.find(kind, name)
            except (SlitlampError, ImportError, AttributeError) as error:
                problems.append(f"the {kind} {name} cannot be loaded: {error}")
        rows.append((f"{kind}s", f"{len(names)}: {', '.join(names)}"))
    return rows


def _trial(problems: list[str]) -> Rows:
    """On every device: write a caption, and record attention in two ways that must agree."""
    places = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    places += ["mps"] if torch.backends.mps.is_available() else []
    rows = []
    for place in places:
        try:
            vlm = VLM.organism(device=place)
            batch = load_dataset("emoji_scenes/captions").take(1).encode(vlm)
            start = time.perf_counter()
            generation = vlm.generate(batch, max_new_tokens=24)
            seconds = time.perf_counter() - start
            recomputed = _attention_weights(vlm, generation)
            vlm.model.set_attn_implementation("eager")
            apart = float((recomputed - _attention_weights(vlm, generation)).abs().max())
        except (SlitlampError, RuntimeError, OSError, ImportError) as error:
            problems.append(f"the embedded model does not run on {place}: {error}")
            continue
        if not apart < _TOLERANCE:
            problems.append(
                f"on {place}, attention recorded under sdpa and under eager differs by {apart:.1e} (at most {_TOLERANCE:.0e} "
                "is expected in float32): do not trust recordings here, and tell us your versions"
            )
        rate = len(generation.tokens[0]) / seconds
        rows.append((place, f"“{generation.texts[0]}”, {rate:.0f} tokens/s; sdpa and eager agree to {apart:.0e}"))
    return rows


def _attention_weights(vlm: VLM, generation: Generation) -> torch.Tensor:
    with vlm.trace(sites.attention(queries="generated", keys="all")) as trace:
        vlm.forward(generation.teacher_forced())
    return trace["attention"].stack()


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
