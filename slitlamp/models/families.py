"""What slitlamp knows about each family of Hugging Face VLMs: one declarative entry per family.

An entry says where the parts of the model are, as module paths, how its processor wants images and prompts, and how its
image tokens lie on the image. Nothing in it is used before `slitlamp.models.anatomy.read_anatomy` has checked it against
the loaded model: a wrong path is an error when the model is loaded, never an empty result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from slitlamp.errors import UnsupportedError, nearest
from slitlamp.models.patches import Patches, llava_next_patches, llava_patches

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PatchRule = Callable[["PreTrainedConfig", Mapping[str, Any], int, bool], list[Patches]]
"""(model config, processor output, number of images, whether the tower has a CLS token) -> the patches of every image,
in the order of its tokens."""

CrossRule = Callable[["PreTrainedConfig", Mapping[str, Any]], Tensor]
"""(model config, inputs of the model) -> bool [batch, key]: which keys of cross-attention stand for tokens of an image."""


@dataclass(frozen=True)
class Family:
    """One family of VLMs. Paths are from the model's module.

    Attributes:
        name: as people call it.
        model_type: of its configuration.
        patches: places the image tokens of a prompt on its images.
        image_tokens: what its image tokens are, in words.
        decoder: paths of the text decoder; the first that exists is used. What is inside is said by the decoder's own
            entry (`slitlamp.models.decoders`).
        head: paths of the output head; the first that exists is used.
        vision_tower: path of the vision tower. What is inside is said by the tower's own entry (`slitlamp.models.towers`).
        projector: path of what maps the tower's output to the decoder's width.
        placeholder: attribute of the processor that holds the placeholder of an image in a prompt; None for processors
            that put image tokens before every prompt by themselves.
        images: whether the processor takes all images of a batch in one list, or one list per prompt.
        first_position: the position id of a row's first token; None where the model counts positions by itself.
        aligned: inputs of the model that run along the positions besides the ids, [batch, position, ...], each with its
            value at generated tokens: a number, or "last" for that of the token before.
        cross: for families whose decoder reads the image by cross-attention.
        notes: what else is particular about it, in words.
    """

    name: str
    model_type: str
    patches: PatchRule
    image_tokens: str
    decoder: tuple[str, ...] = ("model.language_model",)
    head: tuple[str, ...] = ("lm_head",)
    vision_tower: str = "model.vision_tower"
    projector: str = "model.multi_modal_projector"
    placeholder: str | None = "image_token"
    images: Literal["flat", "per prompt"] = "flat"
    first_position: int | None = 0
    aligned: Mapping[str, int | Literal["last"]] = field(default_factory=dict)
    cross: CrossRule | None = None
    notes: str = ""


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            name="LLaVA-1.5",
            model_type="llava",
            patches=llava_patches,
            image_tokens="one grid per image",
        ),
        Family(
            name="LLaVA-NeXT",
            model_type="llava_next",
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
        "A new entry in slitlamp/models/families.py must give the paths of the text decoder, the head, the vision tower "
        "and the projector, and a rule that places image tokens on the image (see CONTRIBUTING, 'A family')."
    )


def families_table() -> str:
    """The known families as a Markdown table: name, `model_type`, what their image tokens are, and notes."""
    rows = [f"| {one.name} | `{one.model_type}` | {one.image_tokens} | {one.notes} |" for one in FAMILIES.values()]
    return "\n".join(["| family | `model_type` | image tokens | notes |", "|---|---|---|---|", *rows])
