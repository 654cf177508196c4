"""What slitlamp knows about each family of Hugging Face VLMs: one declarative entry per family.

An entry says where the parts of the model are, as module paths, how its processor wants images and prompts, and how its
image tokens lie on the image. Nothing in it is used before `slitlamp.models.anatomy.read_anatomy` has checked it against
the loaded model: a wrong path is an error when the model is loaded, never an empty result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from PIL.Image import Image
from torch import Tensor

from slitlamp.errors import UnsupportedError, nearest
from slitlamp.models.patches import Patches, llava_next_patches
from slitlamp.models.patches_gemma import gemma3_patches, paligemma_patches
from slitlamp.models.patches_idefics import idefics3_patches
from slitlamp.models.patches_llama4 import llama4_patches
from slitlamp.models.patches_llava import llava_onevision_patches, vipllava_patches
from slitlamp.models.patches_mllama import mllama_cross_keys, mllama_patches
from slitlamp.models.patches_pixtral import llava_tower_patches, pixtral_patches
from slitlamp.models.patches_qformer import qformer_patches
from slitlamp.models.patches_qwen import qwen_patches
from slitlamp.models.patches_tiles import aya_vision_patches, canvas_grid, internvl_patches

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PatchRule = Callable[["PreTrainedConfig", Mapping[str, Any], int, bool], list[Patches]]
"""(model config, processor output, number of images, whether the tower has a CLS token) -> the patches of every image,
in the order of its tokens."""

CrossRule = Callable[["PreTrainedConfig", Mapping[str, Any]], Tensor | None]
"""(model config, inputs of the model) -> bool [batch, key]: which keys of cross-attention stand for tokens of an image;
None for a batch without images."""


TileRule = Callable[[Any, Image], tuple[int, int]]
"""(processor, image) -> rows and columns of the tiles into which the processor cuts the image."""


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
        around: what the model expects before and after a placeholder; put there where the prompt lacks it.
        images: whether the processor takes all images of a batch in one list, or one list per prompt.
        max_images: how many images a prompt may have; None for any number.
        tiles: for processors whose output does not say how they cut an image: given to `patches` as `tile_grids`.
        first_position: the position id of a row's first token; None where the model counts positions by itself.
        aligned: inputs of the model that run along the positions besides the ids, [batch, position, ...], each with its
            value at generated tokens: a number, or "last" for that of the token before.
        images_first: whether the images stand before the prompt wherever it has no placeholders.
        adds_start: whether the processor puts the start token into prompts that have none, besides what the tokenizer does.
        text_only: whether the processor takes prompts without an image. Where it does not, such a prompt is processed with
            a blank image, whose tokens and pixels are taken out again.
        always_pixels: whether the model runs its tower also where no prompt has an image, and must be given pixels then,
            of which nothing comes.
        own_tokens: inputs of tokens that are read by another part than the decoder -> their masks. Their padding comes
            last, since that part counts positions from the first.
        unused: what the processor returns and the model is not to get.
        generator: path of the module whose `generate` makes the tokens; "" for the model. A forward call of a generation is
            a call of it.
        kept: attributes that the model writes into itself as it runs; after a run they are what they were.
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
    around: tuple[str, str] = ("", "")
    images: Literal["flat", "per prompt"] = "flat"
    max_images: int | None = None
    tiles: TileRule | None = None
    first_position: int | None = 0
    aligned: Mapping[str, int | Literal["last"]] = field(default_factory=dict)
    images_first: bool = False
    adds_start: bool = False
    text_only: bool = True
    always_pixels: bool = False
    own_tokens: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    generator: str = ""
    cross: CrossRule | None = None
    notes: str = ""

    def __repr__(self) -> str:
        return f"Family({self.name}, model_type {self.model_type})"


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            name="LLaVA-1.5",
            model_type="llava",
            patches=llava_tower_patches,
            image_tokens="one grid per image (on a Pixtral tower: of its own size, a text token after each row)",
            notes="on a Pixtral tower the processor needs torchvision",
        ),
        Family(
            name="LLaVA-NeXT",
            model_type="llava_next",
            patches=llava_next_patches,
            image_tokens="the whole image, then its tiles as one grid with a newline token after each row",
        ),
        Family(
            name="LLaVA-OneVision",
            model_type="llava_onevision",
            patches=llava_onevision_patches,
            image_tokens="as LLaVA-NeXT, shrunk where there are many tiles; each of several images of a prompt: the whole image "
            "and one newline token",
            images="per prompt",
            notes="no video",
        ),
        Family(
            name="VipLLaVA",
            model_type="vipllava",
            patches=vipllava_patches,
            image_tokens="one grid per image",
            notes="the projector reads several layers of the tower",
        ),
        *(
            Family(
                name=name,
                model_type=model_type,
                patches=qformer_patches,
                image_tokens="the queries of a Q-Former, before the prompt, which have no place on the image",
                decoder=("language_model.model.decoder", "language_model.model"),
                head=("language_model.lm_head",),
                vision_tower="vision_model",
                projector="language_projection",
                placeholder=None,
                max_images=1,
                text_only=False,
                always_pixels=True,
                own_tokens=own_tokens,
                generator="language_model",
                notes="one image per prompt; decoders that are not part of an encoder-decoder (no T5); no sites in the Q-Former"
                + notes,
            )
            for name, model_type, own_tokens, notes in (
                ("BLIP-2", "blip-2", {}, ""),
                (
                    "InstructBLIP",
                    "instructblip",
                    {"qformer_input_ids": "qformer_attention_mask"},
                    ", which reads the prompt too",
                ),
            )
        ),
        Family(
            name="InternVL",
            model_type="internvl",
            patches=internvl_patches,
            image_tokens="tiles row by row, then the whole image; 1 token for a square of patches",
            tiles=canvas_grid,
            notes="no video",
        ),
        Family(
            name="Aya Vision",
            model_type="aya_vision",
            patches=aya_vision_patches,
            image_tokens="tiles row by row, then the whole image, each after a text token; 1 token for a square of patches",
            tiles=canvas_grid,
            notes="attention and MLP side by side: no `resid_mid`, no `ln2`",
        ),
        *(
            Family(
                name=name,
                model_type=model_type,
                patches=idefics3_patches,
                image_tokens="tiles row by row, then the whole image, each between text tokens; 1 token for a square of patches",
                decoder=("model.text_model",),
                vision_tower="model.vision_model",
                projector="model.connector",
                images="per prompt",
            )
            for name, model_type in (("Idefics3", "idefics3"), ("SmolVLM", "smolvlm"))
        ),
        Family(
            name="PaliGemma",
            model_type="paligemma",
            patches=paligemma_patches,
            image_tokens="one grid per image, before the prompt",
            images="per prompt",
            images_first=True,
            text_only=False,
            first_position=1,
            aligned={"token_type_ids": 1},
            unused=("labels",),
            notes="1 and 2; the prompt is read in both directions",
        ),
        Family(
            name="Gemma 3",
            model_type="gemma3",
            patches=gemma3_patches,
            image_tokens="one grid per image; 1 token for the mean of a square of patches",
            placeholder="boi_token",
            images="per prompt",
            aligned={"token_type_ids": 0},
            notes="an image is read in both directions; no pan and scan",
        ),
        Family(
            name="Mistral 3",
            model_type="mistral3",
            patches=pixtral_patches,
            image_tokens="one grid per image, of its own size, a text token after each row; 1 token for a square of patches",
            notes="Pixtral tower: the images of a batch are one sequence; the processor needs torchvision",
        ),
        Family(
            name="Mllama (Llama 3.2 Vision)",
            model_type="mllama",
            patches=mllama_patches,
            image_tokens="keys of cross-attention: of each tile a CLS token and its patches. The prompt has 1 token per image, "
            "which no feature replaces",
            vision_tower="model.vision_model",
            images="per prompt",
            aligned={"cross_attention_mask": "last"},
            adds_start=True,
            cross=mllama_cross_keys,
            notes="`attention` in self-attention layers, `cross_attention` in the others, which text without an image skips; "
            "tiles of an image see each other, and `vision_attention` gives the weights within a tile",
        ),
        *(
            Family(
                name=name,
                model_type=model_type,
                patches=qwen_patches,
                image_tokens="one grid per image, of its own size; 1 token for a square of patches",
                vision_tower="model.visual",
                projector="model.visual.merger",
                around=("<|vision_start|>", "<|vision_end|>"),
                first_position=None,
                aligned={"mm_token_type_ids": 0},
                kept=("model.rope_deltas",),
                notes=notes + "no video",
            )
            for name, model_type, notes in (
                ("Qwen2-VL", "qwen2_vl", ""),
                ("Qwen2.5-VL", "qwen2_5_vl", "most layers of the tower attend within windows; "),
                ("Qwen3-VL", "qwen3_vl", "DeepStack: the first blocks are followed by features of the tower; "),
            )
        ),
        Family(
            name="Llama 4",
            model_type="llama4",
            patches=llama4_patches,
            image_tokens="tiles row by row, a text token after each, then the whole image; 1 token for a square of patches",
            decoder=("language_model.model",),
            head=("language_model.lm_head",),
            vision_tower="vision_model",
            projector="multi_modal_projector",
            notes="no `mlp_pre` and `mlp_post` in layers with experts; most layers attend within chunks; the processor needs "
            "torchvision",
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
