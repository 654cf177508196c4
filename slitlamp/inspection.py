"""What a model looks like inside, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slitlamp.errors import InputError
from slitlamp.experiments.models import organism_seed
from slitlamp.models import Anatomy, family_of, read_anatomy
from slitlamp.vlm import ORGANISM_WEIGHTS


@dataclass(frozen=True)
class Inspection:
    """A model that was built without its weights.

    Attributes:
        name: what was asked for.
        anatomy: its sizes and module paths.
        n_parameters: of the whole model.
        n_image_tokens: image tokens of one image, where the configuration says so.
    """

    name: str
    anatomy: Anatomy
    n_parameters: int
    n_image_tokens: int | None

    def sections(self) -> dict[str, list[tuple[str, str]]]:
        """Rows of text by section: anatomy, modules, sites, memory."""
        one = self.anatomy
        cls = "CLS token first" if one.has_cls else "no CLS token"
        kv = "" if one.n_kv_heads == one.n_heads else f" on {one.n_kv_heads} key/value heads"
        return {
            f"{self.name} ({one.family.name})": [
                ("decoder", f"{one.n_layers} layers, {one.n_heads} heads{kv} of {one.d_head}, d_model {one.d_model}"),
                (
                    "vision tower",
                    f"{one.n_vision_layers} layers, {one.n_vision_heads} heads, width {one.d_vision}, {cls}",
                ),
                ("vocabulary", f"{one.d_vocab} tokens; image token {one.image_token_id}"),
                (
                    "image tokens",
                    "unknown" if self.n_image_tokens is None else f"{self.n_image_tokens} per image or tile",
                ),
                ("parameters", f"{self.n_parameters:,}"),
            ],
            "modules": [
                ("blocks", f"{one.blocks[0]} ... {one.blocks[-1]}"),
                ("attention", one.attention(0)),
                ("heads come together in", one.out_proj(0)),
                ("MLP", one.mlp(0)),
                ("vision blocks", f"{one.vision_blocks[0]} ... {one.vision_blocks[-1]}"),
                *((role.replace("_", " "), path) for role, path in one.modules.items()),
            ],
            "sites (per layer; float32 bytes per item)": self._sites(),
            "memory of the weights": [
                (name, _bytes(self.n_parameters * size)) for name, size in (("float32", 4), ("bfloat16, float16", 2))
            ],
        }

    def _sites(self) -> list[tuple[str, str]]:
        from slitlamp.tracing.sites import SITES

        one, n = self.anatomy, self.n_image_tokens
        state = f"[batch, position, {one.d_model}]; {_bytes(4 * one.d_model)} per position"
        shapes = {
            "resid_pre": state,
            "resid_post": state,
            "mlp_out": state,
            "z": f"[batch, position, {one.n_heads}, {one.d_head}]; {_bytes(4 * one.n_heads * one.d_head)} per position",
            "attention": f"[batch, {one.n_heads}, query, key]"
            + (f"; {_bytes(4 * one.n_heads * n)} per query over the image" if n else ""),
            "vision_resid_post": f"[tile, position, {one.d_vision}]",
            "vision_attention": f"[tile, {one.n_vision_heads}, query, key]",
            "projector_out": f"[tile, position, {one.d_model}]",
        }
        return [(name, shapes.get(name, "")) for name in SITES]


def inspect_model(name: str, *, revision: str | None = None) -> Inspection:
    """Build a model on torch's meta device (shapes, no numbers) and read its anatomy.

    Args:
        name: `organism`, `organism/seed1`, a folder, or a hub id.
        revision: of the hub repository.

    Raises:
        InputError: there is no such model, or its folder has no configuration.
        UnsupportedError: a family that slitlamp does not know.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    place = _place(name)
    try:
        config = AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the configuration of {name!r}: {str(error).splitlines()[0]}") from error
    family_of(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return Inspection(
        name=name,
        anatomy=read_anatomy(model),
        n_parameters=sum(one.numel() for one in model.parameters()),
        n_image_tokens=getattr(config, "image_seq_length", None),
    )


def _place(name: str) -> str | Path:
    seed = None if Path(name).is_dir() else organism_seed(name)
    if seed is None:
        return name
    folder = ORGANISM_WEIGHTS / f"seed{seed}"
    if not folder.is_dir():
        raise InputError(f"this installation has no embedded model of seed {seed}")
    return folder


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            break
        n /= 1000
    return f"{n:.3g} {unit}"
