"""What a model looks like inside, and what it will take, from its configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slitlamp.errors import InputError
from slitlamp.estimates import DEFAULT_SITES, Estimate, estimate
from slitlamp.experiments.models import organism_seed
from slitlamp.models import Anatomy, family_of, read_anatomy
from slitlamp.vlm import ORGANISM_WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from slitlamp.tracing.sites import Site
    from slitlamp.tracing.sizes import ItemSize

Rows = list[tuple[str, str]]
IMAGE_SIZE = (640, 480)
"""Width and height of the image of an estimate, in pixels, unless another is given."""
TEXT_TOKENS = 64
"""Tokens of text in the prompt of an estimate where there is no processor to count them."""


@dataclass(frozen=True)
class Inspection:
    """A model that was built without its weights.

    Attributes:
        name: what was asked for.
        anatomy: its sizes and module paths.
        n_parameters: of the whole model.
        n_image_tokens: image tokens of one image, where the configuration says so.
        model: the model on the meta device: shapes, no numbers.
    """

    name: str
    anatomy: Anatomy
    n_parameters: int
    n_image_tokens: int | None
    model: PreTrainedModel

    def sections(self) -> dict[str, Rows]:
        """Rows of text by section: anatomy, modules, sites, memory."""
        one = self.anatomy
        cls = "CLS token first" if one.has_cls else "no CLS token"
        kv = "" if one.n_kv_heads == one.n_heads else f" on {one.n_kv_heads} key/value heads"
        tokens = (
            "its number depends on the image" if self.n_image_tokens is None else f"{self.n_image_tokens} per image"
        )
        return {
            f"{self.name} ({one.family.name})": [
                ("decoder", f"{one.n_layers} layers, {one.n_heads} heads{kv} of {one.d_head}, d_model {one.d_model}"),
                (
                    "vision tower",
                    f"{one.n_vision_layers} layers, {one.n_vision_heads} heads, width {one.d_vision}, {cls}",
                ),
                ("vocabulary", f"{one.d_vocab} tokens; image token {one.image_token_id}"),
                ("image tokens", f"{tokens}: {one.family.image_tokens}"),
                ("parameters", f"{self.n_parameters:,}"),
            ],
            "modules": [
                ("blocks", f"{one.blocks[0]} ... {one.blocks[-1]}"),
                ("attention", one.attention(0)),
                ("heads come together in", one.out_proj(0)),
                ("MLP", one.mlp(0)),
                ("vision blocks", f"{one.vision_blocks[0]} ... {one.vision_blocks[-1]}"),
                *((role.replace("_", " "), path or "the model itself") for role, path in one.modules.items()),
            ],
            "sites (numbers per position and layer)": self._sites(),
            "memory of the weights": [
                (name, in_bytes(self.n_parameters * size)) for name, size in (("float32", 4), ("bfloat16, float16", 2))
            ],
        }

    def _sites(self) -> Rows:
        from slitlamp.tracing.sites import ATTENTION_SITES, SITES, Site
        from slitlamp.tracing.sizes import site_width

        rows = []
        for name in SITES:
            layers = self.anatomy.layers(name)
            if not layers:
                continue
            axes = ", ".join(Site(name, label=name).axes)
            width = (
                "" if name in ATTENTION_SITES else f"; {site_width(self.model, self.anatomy, Site(name), layers[0]):,}"
            )
            every = (*range(layers[0], layers[-1] + 1),) == layers
            where = f"layers {layers[0]}-{layers[-1]}" if every else f"layers {', '.join(map(str, layers))}"
            rows.append((name, f"[{axes}]{width}" + (f"; {where}" if len(layers) > 1 else "")))
        return rows


def inspect_model(name: str, *, revision: str | None = None) -> Inspection:
    """Build a model on torch's meta device (shapes, no numbers) and read its anatomy.

    Args:
        name: `organism`, `organism/seed1`, a folder, a configuration file, or a hub id.
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
    anatomy = read_anatomy(model)
    return Inspection(
        name=name,
        anatomy=anatomy,
        n_parameters=sum(one.numel() for one in model.parameters()),
        n_image_tokens=_image_tokens(config, anatomy),
        model=model,
    )


def estimate_model(
    name: str,
    sites: Sequence[Site | str] = DEFAULT_SITES,
    *,
    revision: str | None = None,
    image_size: tuple[int, int] | None = None,
    image_tokens: int | None = None,
    text_tokens: int | None = None,
    new_tokens: int = 0,
    dtype: str = "bfloat16",
    batch: int = 1,
    gpus: int = 1,
    items: int = 1,
) -> Estimate:
    """What a model, a trace and a store will take, from the configuration alone.

    Args:
        name: as in `inspect_model`.
        sites: what is recorded, or texts for `slitlamp.estimates.parse_site`.
        revision: of the hub repository.
        image_size: width and height of an image in pixels, from which the processor makes the tokens; by default 640 x 480.
        image_tokens: image tokens of an item, in place of those that the processor would make.
        text_tokens: text tokens of the prompt; by default those of a short request, or 64 without a processor.
        new_tokens: tokens that continue the prompt.
        dtype: of weights, cache and recordings.
        batch, gpus, items: as in `slitlamp.estimates.estimate`.

    Raises:
        InputError, UnsupportedError: no such model or site, or image tokens that neither a processor nor the configuration
            tells.
    """
    import torch

    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise InputError(f"dtype must be a floating-point dtype such as bfloat16 or float32; found {dtype!r}")
    inspected = inspect_model(name, revision=revision)
    item = _item(inspected, revision, image_size or IMAGE_SIZE, image_tokens, text_tokens, new_tokens)
    return estimate(inspected.model, inspected.anatomy, item, sites, dtype=kind, batch=batch, gpus=gpus, items=items)


def estimate_sections(one: Estimate) -> dict[str, Rows]:
    """Rows of text by section: weights, item, cache, recordings, GPUs, store."""
    item, kind = one.item, str(one.dtype).removeprefix("torch.")
    tiles = f" in {item.tiles} tiles" if item.tiles > 1 else ""
    read = f", {item.cross_keys} keys of cross-attention" if item.cross_keys else ""
    new = f", {item.new_tokens} new tokens" if item.new_tokens else ""
    found = {
        "weights (tied ones once)": [
            (str(dtype).removeprefix("torch."), in_bytes(size)) for dtype, size in one.weights.items()
        ],
        "one item": [
            ("positions", f"{item.image_tokens} image tokens{tiles}, {item.text_tokens} text tokens{new}{read}")
        ],
        f"cache of keys and values while generating ({kind})": [
            ("per token", in_bytes(one.cache_per_token)),
            ("per item", in_bytes(one.cache_per_item)),
        ],
        f"recordings of one item ({kind}; float32 where reduced)": [
            *((label, in_bytes(size)) for label, size in one.recordings.items()),
            ("together", in_bytes(one.trace)),
        ],
        f"memory per GPU, {one.batch} item{'s' if one.batch > 1 else ''} per batch "
        "(on top: what a block needs while it computes)": _gpu_rows(one),
    }
    if one.items > 1:
        found[f"store of {one.items:,} items"] = [
            *((label, in_bytes(one.items * size)) for label, size in one.recordings.items()),
            ("together", in_bytes(one.store)),
        ]
    return found


def _gpu_rows(one: Estimate) -> Rows:
    each = one.weights[one.dtype] + one.batch * (one.cache_per_item + one.trace)
    rows = []
    if len(one.gpus) > 1:
        fullest = max(one.gpus, key=lambda share: share.total)
        text = (
            f"{in_bytes(fullest.total)} on the fullest: {len(fullest.blocks)} blocks, weights {in_bytes(fullest.weights)}, "
            f"cache {in_bytes(fullest.cache)}, recordings {in_bytes(fullest.recordings)}"
        )
        rows.append((f"one model on {len(one.gpus)} GPUs (device_map)", text))
    return [*rows, ("a model on every GPU (accelerate launch)", in_bytes(each))]


# -- the size of an item ----------------------------------------------------------------------------------------------


def _item(
    inspected: Inspection,
    revision: str | None,
    image_size: tuple[int, int],
    image_tokens: int | None,
    text_tokens: int | None,
    new_tokens: int,
) -> ItemSize:
    for name, number in (("image_tokens", image_tokens), ("text_tokens", text_tokens), ("new_tokens", new_tokens)):
        if number is not None and number < 0:
            raise InputError(f"{name} must be 0 or more, found {number}")
    why = "another number is given"
    if image_tokens is None:
        found = _encoded(inspected, revision, image_size)
        if not isinstance(found, str):
            more = 0 if text_tokens is None else text_tokens - found.text_tokens
            fields = {"text_tokens": found.text_tokens + more, "after_image": max(0, found.after_image + more)}
            return replace(found, new_tokens=new_tokens, **fields)
        why, image_tokens = found, inspected.n_image_tokens
    if image_tokens is None:
        raise InputError(
            f"how many image tokens {inspected.name!r} makes of an image depends on its processor, and {why}; give the "
            "number (--image-tokens)"
        )
    return _from_config(inspected, image_tokens, TEXT_TOKENS if text_tokens is None else text_tokens, new_tokens)


def _encoded(inspected: Inspection, revision: str | None, image_size: tuple[int, int]) -> ItemSize | str:
    """The size of a request about a grey image, as the model's processor makes it; or why there is no processor."""
    import PIL.Image

    from slitlamp.models.encode import encode
    from slitlamp.models.loading import complete, load_processor
    from slitlamp.tracing.sizes import ItemSize

    if Path(inspected.name).is_file():
        return "a configuration file has none"
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        processor = load_processor(_place(inspected.name), **options)
    except (OSError, ValueError, ImportError, TypeError) as error:
        return f"it cannot be loaded ({str(error).strip().splitlines()[0][:120]})"
    anatomy, config = inspected.anatomy, inspected.model.config
    complete(processor, config, has_cls=anatomy.has_cls)
    prompt = "Describe this image in detail."
    if anatomy.family.placeholder is not None and not getattr(processor, "chat_template", None):
        prompt = f"{getattr(processor, anatomy.family.placeholder)} {prompt}"
    picture = PIL.Image.new("RGB", image_size, (128, 128, 128))
    return ItemSize.of(encode(processor, config, anatomy, images=[picture], prompts=[prompt]), anatomy, config)


def _image_tokens(config: PreTrainedConfig, anatomy: Anatomy) -> int | None:
    """Image tokens of one image, for families that make the same number of each; None where it depends on the image."""
    if config.model_type in _OF_THE_IMAGE:
        return None
    if config.model_type == "mllama":
        return 1
    if config.model_type in (
        "llava",
        "vipllava",
    ):  # what their configuration says is a default that may not fit the tower
        positions = _fixed_positions(config, anatomy)
        keeps_cls = getattr(config, "vision_feature_select_strategy", "default") == "full"
        return positions if positions is None or keeps_cls else positions - int(anatomy.has_cls)
    for holder in (config, config.get_text_config(decoder=True)):
        for name in ("image_seq_length", "mm_tokens_per_image", "num_image_tokens", "num_query_tokens"):
            if (value := getattr(holder, name, None)) is not None:
                return int(value)
    return None


def _fixed_positions(config: PreTrainedConfig, anatomy: Anatomy) -> int | None:
    """Positions of a tile in towers whose tiles have one size; None for the others."""
    from slitlamp.tracing.sizes import tile_positions

    side = getattr(config.vision_config, "image_size", None)
    if side is None or (anatomy.tower.unpack is not None and not anatomy.family.cross):
        return None
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return tile_positions(int(height), int(width), config.vision_config, anatomy)


_OF_THE_IMAGE = ("llava_next", "llava_onevision", "internvl", "aya_vision", "idefics3", "smolvlm")
"""Families that cut an image into tiles: what their configuration names is the number per tile."""


def _from_config(inspected: Inspection, image_tokens: int, text_tokens: int, new_tokens: int) -> ItemSize:
    """The size of an item with so many image tokens, as far as the configuration tells it: one tile, or for Mllama as many
    as an image can have.
    """
    from slitlamp.tracing.sizes import ItemSize

    anatomy, config = inspected.anatomy, inspected.model.config
    positions, projected, tiles = _fixed_positions(config, anatomy), image_tokens, 1
    if merge := getattr(config.vision_config, "spatial_merge_size", None):
        positions = image_tokens * int(merge) ** 2
    elif anatomy.family.cross and positions is not None:
        tiles, projected = image_tokens * int(config.vision_config.max_num_tiles), positions
    return ItemSize(
        image_tokens=image_tokens,
        text_tokens=text_tokens,
        after_image=text_tokens,
        new_tokens=new_tokens,
        tiles=tiles,
        tile_positions=positions,
        projected=None if positions is None else projected,
        cross_keys=tiles * (positions or 0) if anatomy.family.cross else 0,
    )


def _place(name: str) -> str | Path:
    seed = None if Path(name).is_dir() else organism_seed(name)
    if seed is None:
        return name
    folder = ORGANISM_WEIGHTS / f"seed{seed}"
    if not folder.is_dir():
        raise InputError(f"this installation has no embedded model of seed {seed}")
    return folder


def in_bytes(n: float) -> str:
    """A number of bytes with three digits and a decimal unit: 1.45 GB is 1,450,000,000 bytes."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 999.5 or unit == "TB":
            break
        n /= 1000
    return f"{n:.3g} {unit}" if n < 999.5 else f"{n:,.0f} {unit}"
