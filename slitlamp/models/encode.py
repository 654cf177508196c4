"""Images and prompts to a `Batch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from PIL.Image import Image
from torch import Tensor

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import Batch
from slitlamp.models.families import Family
from slitlamp.models.images import CenterCrop, load_image, per_prompt
from slitlamp.models.patches import Patches

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def encode(
    processor: Any,
    config: PreTrainedConfig,
    anatomy: Anatomy,
    *,
    images: Sequence[Any] | None,
    prompts: Sequence[str] | str,
    ids: Sequence[str] | None = None,
    chat: bool | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Encode prompts with their images, padded on the left.

    Args:
        processor: the model's Hugging Face processor.
        config: the model's configuration.
        anatomy: the model's anatomy.
        images: None, or one entry per prompt: an image (path, PIL image, uint8 array), None for a text-only prompt, or
            a list of images.
        prompts: one text per row. With a chat template the image placeholders may be left out: the images then come
            before the text. Without one, every image needs its placeholder in the text. Tokens that a family puts
            around it (Qwen-VL: `<|vision_start|>`, `<|vision_end|>`) may be written or left out.
        ids: one id per row, kept in the batch; by default "0", "1", ...
        chat: whether to wrap prompts in the processor's chat template; by default if it has one.
        device, dtype: of the tensors; only floating-point inputs take the dtype.

    Returns:
        The batch.

    Raises:
        InputError: an empty batch, an empty prompt, an unusable image, or placeholders that do not match the images.
        UnsupportedError: a placeholder of a video, or the processor and the family's entry disagree on the number of
            image tokens.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise InputError("the batch is empty: prompts holds no text")
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"prompt {row}: expected a text, found {text!r}")
    names = [str(row) for row in range(len(texts))] if ids is None else [str(one) for one in ids]
    if len(names) != len(texts):
        raise InputError(f"{len(names)} ids for {len(texts)} prompts")
    loaded = [
        [load_image(source, f"image {number} of prompt {row}") for number, source in enumerate(sources)]
        for row, sources in enumerate(per_prompt(images, len(texts)))
    ]

    family = anatomy.family
    placeholder = None if family.placeholder is None else str(getattr(processor, family.placeholder))
    template = getattr(processor, "chat_template", None)
    use_chat = bool(template) if chat is None else chat
    if use_chat and not template:
        raise InputError(
            "chat=True, but this processor has no chat template; pass chat=False and put the placeholders yourself"
        )
    _check_prompts(loaded, texts, processor, family)
    given = loaded if family.text_only else [row_images or [_blank()] for row_images in loaded]
    rows = []
    for row, (text, row_images) in enumerate(zip(texts, loaded, strict=True)):
        _check_no_video(processor, text, row)
        _check_placeholders(text, len(row_images), placeholder, row, may_be_left_out=use_chat or family.images_first)
        if family.images_first and placeholder is not None and placeholder not in text:
            text = placeholder * len(given[row]) + text
        if placeholder is not None:
            text = text.replace(placeholder.join(family.around), placeholder)
        if use_chat:
            rows.append(_chat(processor, text, len(row_images), placeholder))
        else:
            rows.append(text if placeholder is None else text.replace(placeholder, placeholder.join(family.around)))

    processed = _process(processor, rows, given, family)
    input_ids: Tensor = processed["input_ids"]
    image_mask = input_ids == anatomy.image_token_id
    cut = (
        [] if family.tiles is None else [family.tiles(processor, image) for row_images in given for image in row_images]
    )
    patches = _patches(config, anatomy, {**processed, "tile_grids": cut}, [len(row_images) for row_images in given])
    for row, found in enumerate(image_mask.sum(dim=1).tolist()):
        if family.cross is None and found != len(patches[row]):
            raise UnsupportedError(
                f"prompt {row}: the processor made {found} image tokens, but the {anatomy.family.name} entry expects "
                f"{len(patches[row])} for its images; patch size, feature layer and select strategy of processor "
                "and model must agree"
            )
    cross_mask = None if family.cross is None else family.cross(config, processed)
    inputs = {name: _to(value, device, dtype) for name, value in processed.items() if name not in family.unused}
    for name, its_mask in family.own_tokens.items():
        inputs[name], inputs[its_mask] = _padded_right(inputs[name], inputs[its_mask])
    aligned = {name: inputs.pop(name) for name in family.aligned if name in inputs}
    ids_, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    pad, unk = processor.tokenizer.pad_token_id, processor.tokenizer.unk_token_id
    black, white = _shades(processor.image_processor)
    batch = Batch(
        input_ids=ids_,
        attention_mask=mask,
        image_mask=image_mask.to(device),
        patches=tuple(patches),
        images=tuple(tuple(row_images) for row_images in loaded),
        ids=tuple(names),
        n_generated=tuple(0 for _ in texts),
        pad_token_id=int(pad if pad is not None else processor.tokenizer.eos_token_id),
        image_token_id=anatomy.image_token_id,
        extra=inputs,
        aligned=aligned,
        fills=dict(family.aligned),
        cross_mask=None if cross_mask is None else cross_mask.to(device),
        frames=int(getattr(config.vision_config, "temporal_patch_size", None) or 1),
        deepstack_layers=anatomy.deepstack_layers,
        always_pixels=family.always_pixels,
        unk_token_id=None if unk is None else int(unk),
        black=black,
        white=white,
        # processors that cut tiles resize the whole image to a square in place of cropping it, whatever their setting says
        crop=None if family.tiles is not None else CenterCrop.of(processor.image_processor),
    ).padded_left()
    return batch if given is loaded else _without_blanks(batch)


def _check_prompts(images: list[list[Image]], texts: list[str], processor: Any, family: Family) -> None:
    for row, (row_images, text) in enumerate(zip(images, texts, strict=True)):
        if family.max_images is not None and len(row_images) > family.max_images:
            raise InputError(
                f"prompt {row}: {len(row_images)} images; {family.name} takes {family.max_images} per prompt"
            )
        if family.placeholder is None and str(processor.image_token) in text:
            raise InputError(
                f"prompt {row}: found the image token {str(processor.image_token)!r}; {family.name} puts the image before the "
                "prompt by itself, so leave it out"
            )
        start = processor.tokenizer.bos_token
        if family.own_tokens and start is not None and text.startswith(start):
            raise InputError(
                f"prompt {row} starts with the start token {start!r}, which is the decoder's alone; {family.name} reads the "
                "prompt in another vocabulary too, so leave it out"
            )
        if family.images_first and start is not None and start in text:
            raise InputError(
                f"prompt {row}: found the start token {start!r}; {family.name} puts it between the images and the prompt by "
                "itself, so leave it out"
            )


def _padded_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [row, position] and their mask, with the padding moved to the end of every row."""
    order = torch.argsort(mask, dim=1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def _blank() -> Image:
    return PIL.Image.new("RGB", (32, 32))


def _without_blanks(batch: Batch) -> Batch:
    """The batch without the image tokens and pixels of rows that have no image."""
    blank = [not row_images for row_images in batch.images]
    if all(blank):
        return batch.without_images()
    if not any(blank):
        return batch
    kept = torch.tensor([none for none, images in zip(blank, batch.images, strict=True) for _ in images or [None]])
    kept = kept.logical_not().to(batch.device)
    return batch.without_images_of(blank, {name: value[kept] for name, value in batch.extra.items()})


def _to(value: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _shades(image_processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel, what pixels of 0 and of full brightness become."""
    full = 255.0
    if getattr(image_processor, "do_rescale", None) is not False:  # None: the class's own rule, which is to do so
        full *= float(getattr(image_processor, "rescale_factor", 1 / 255))
    if getattr(image_processor, "do_normalize", None) is False:
        return (0.0,) * 3, (full,) * 3
    mean, std = ([float(one) for one in getattr(image_processor, name)] for name in ("image_mean", "image_std"))
    black = tuple(-centre / spread for centre, spread in zip(mean, std, strict=True))
    return black, tuple(one + full / spread for one, spread in zip(black, std, strict=True))


def _check_no_video(processor: Any, text: str, row: int) -> None:
    video = getattr(processor, "video_token", None)
    if video is not None and str(video) in text:
        raise UnsupportedError(
            f"prompt {row}: found the placeholder of a video, {video!r}; slitlamp encodes images only"
        )


def _check_placeholders(text: str, n_images: int, placeholder: str | None, row: int, *, may_be_left_out: bool) -> None:
    if placeholder is None:
        return
    found = text.count(placeholder)
    if found == n_images or (found == 0 and may_be_left_out):
        return
    if found > n_images:
        raise InputError(f"prompt {row}: {found} placeholders {placeholder!r} for {n_images} images")
    hint = "" if found else f"; put {placeholder!r} in the text where each image belongs"
    raise InputError(f"prompt {row}: {n_images} images for {found} placeholders {placeholder!r}{hint}")


def _chat(processor: Any, text: str, n_images: int, placeholder: str | None) -> str:
    """One user turn with the images where the placeholders are, or before the text."""
    content: list[dict[str, str]] = []
    if placeholder is not None and placeholder in text:
        for number, piece in enumerate(text.split(placeholder)):
            if number:
                content.append({"type": "image"})
            if piece.strip():
                content.append({"type": "text", "text": piece.strip()})
    else:
        content = [{"type": "image"} for _ in range(n_images)] + [{"type": "text", "text": text}]
    return str(
        processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    )


def _process(processor: Any, texts: list[str], images: list[list[Image]], family: Family) -> Mapping[str, Any]:
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise InputError("this processor's tokenizer has neither a padding nor an end token; set tokenizer.pad_token")
    options: dict[str, Any] = {"padding": len(texts) > 1, "padding_side": "left", "return_tensors": "pt"}
    start = tokenizer.bos_token
    has_start = [start is not None and text.startswith(start) for text in texts]
    if family.adds_start:
        options["add_special_tokens"] = False  # else a tokenizer that adds it too would make two of it
    elif any(has_start):
        if not all(has_start):
            odd = has_start.index(not has_start[0])
            found = "has" if has_start[odd] else "lacks"
            raise InputError(
                f"prompt {odd} {found} the start token {start!r}, unlike prompt 0; write it in all or in none"
            )
        options["add_special_tokens"] = False  # the chat template, or the user, has put it already
    flat = [image for of_prompt in images for image in of_prompt]
    given = None if not flat else images if family.images == "per prompt" else flat
    processed: Mapping[str, Any] = processor(text=texts, images=given, **options)
    return processed


def _patches(
    config: PreTrainedConfig, anatomy: Anatomy, processed: Mapping[str, Any], images_per_row: list[int]
) -> list[Patches]:
    n_images = sum(images_per_row)
    of_image = anatomy.family.patches(config, processed, n_images, anatomy.has_cls) if n_images else []
    rows, start = [], 0
    for count in images_per_row:
        rows.append(Patches.join(of_image[start : start + count]))
        start += count
    return rows
