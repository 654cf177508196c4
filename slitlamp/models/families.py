"""What slitlamp knows about each family of Hugging Face VLMs: one declarative entry per family.

An entry says where the parts of the model are, as module paths, and how its image tokens lie on the image. Nothing in
it is used before `slitlamp.models.anatomy.read_anatomy` has checked it against the loaded model: a wrong path is an
error when the model is loaded, never an empty result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slitlamp.errors import UnsupportedError, nearest
from slitlamp.models.patches import Patches, llava_next_patches, llava_patches

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PatchRule = Callable[["PreTrainedConfig", Mapping[str, Any], int, bool], list[Patches]]
"""(model config, processor output, number of images, whether the tower has a CLS token) -> the patches of every image,
in the order of its tokens."""


@dataclass(frozen=True)
class VisionTower:
    """Where the parts of a vision tower are, relative to the tower's module.

    `blocks` lists the paths that name the block list in the transformers versions that are supported; the first that
    exists is used. `has_cls` says whether the tower's first token is a CLS token.
    """

    blocks: tuple[str, ...]
    attention: str
    has_cls: bool


@dataclass(frozen=True)
class Family:
    """Where the parts of one family of VLMs are, relative to the model's module.

    `attention`, `out_proj` and `mlp` are relative to a block (`out_proj` to its attention). `patches` places the image
    tokens of a prompt on its images.
    """

    name: str
    model_type: str
    blocks: str
    attention: str
    out_proj: str
    mlp: str
    final_norm: str
    head: str
    vision_tower: str
    projector: str
    patches: PatchRule
    image_tokens: str


VISION_TOWERS: dict[str, VisionTower] = {
    "clip_vision_model": VisionTower(("encoder.layers", "vision_model.encoder.layers"), "self_attn", has_cls=True),
    "siglip_vision_model": VisionTower(("encoder.layers", "vision_model.encoder.layers"), "self_attn", has_cls=False),
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            name="LLaVA-1.5",
            model_type="llava",
            blocks="model.language_model.layers",
            attention="self_attn",
            out_proj="o_proj",
            mlp="mlp",
            final_norm="model.language_model.norm",
            head="lm_head",
            vision_tower="model.vision_tower",
            projector="model.multi_modal_projector",
            patches=llava_patches,
            image_tokens="one grid per image",
        ),
        Family(
            name="LLaVA-NeXT",
            model_type="llava_next",
            blocks="model.language_model.layers",
            attention="self_attn",
            out_proj="o_proj",
            mlp="mlp",
            final_norm="model.language_model.norm",
            head="lm_head",
            vision_tower="model.vision_tower",
            projector="model.multi_modal_projector",
            patches=llava_next_patches,
            image_tokens="the whole image, then its tiles as one grid with a newline token after each row",
        ),
    )
}


def family_of(config: PreTrainedConfig) -> Family:
    """The entry of a model's family.

    Raises:
        UnsupportedError: the family has no entry; the message names the nearest known ones and what an entry must
            provide.
    """
    model_type = str(getattr(config, "model_type", "?"))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    close = nearest(model_type, FAMILIES) or sorted(FAMILIES)
    raise UnsupportedError(
        f"slitlamp does not know the family {model_type!r}. Nearest known: {', '.join(close)}. "
        "A new entry in slitlamp/models/families.py must give the paths of the decoder blocks, their attention, output "
        "projection and MLP, the final norm, the head, the vision tower and the projector, and a rule that places "
        "image tokens on the image (see CONTRIBUTING, 'A family')."
    )


def vision_tower_of(config: PreTrainedConfig) -> VisionTower:
    """The entry of a vision tower, from its configuration.

    Raises:
        UnsupportedError: no entry for this type of tower.
    """
    model_type = str(getattr(config, "model_type", "?"))
    if model_type in VISION_TOWERS:
        return VISION_TOWERS[model_type]
    raise UnsupportedError(
        f"slitlamp does not know the vision tower {model_type!r}. Known: {', '.join(sorted(VISION_TOWERS))}. "
        "A new entry in VISION_TOWERS (slitlamp/models/families.py) must give the path of its blocks and whether it "
        "has a CLS token."
    )


def families_table() -> str:
    """The known families as a Markdown table: name, `model_type`, vision towers, and what their image tokens are."""
    towers = ", ".join(
        f"{name.removesuffix('_vision_model')}{'' if one.has_cls else ' (no CLS)'}"
        for name, one in VISION_TOWERS.items()
    )
    rows = [f"| {one.name} | `{one.model_type}` | {towers} | {one.image_tokens} |" for one in FAMILIES.values()]
    return "\n".join(["| family | `model_type` | vision towers | image tokens |", "|---|---|---|---|", *rows])
