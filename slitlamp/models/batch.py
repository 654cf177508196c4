"""A batch of encoded prompts: the tensors a VLM takes and where the image tokens are in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models.images import WHOLE, CenterCrop, Window
from slitlamp.models.patches import Patches

POSITIONS = "position_ids"
"""The input of the model that numbers its positions, where a batch brings one: 0-based, by row, 0 at padding."""


@dataclass(frozen=True, eq=False)  # comparing tensors has no single truth value
class Batch:
    """Encoded prompts, padded on the left.

    Attributes:
        input_ids: int64 [batch, position].
        attention_mask: int64 [batch, position], 0 at padding.
        image_mask: bool [batch, position], true at image tokens. A mask, never a range: image tokens need not be
            contiguous.
        patches: per row, the place on its images of every image token, in the order of the tokens. In families that read
            the image by cross-attention, of every key that `cross_mask` marks, and not of the tokens that `image_mask`
            marks in the prompt, which no feature of the image replaces.
        images: per row, its images.
        ids: per row, the item's id.
        n_generated: per row, how many tokens at the end continue the prompt (see `with_continuation`).
        extra: the other inputs of the model (`pixel_values`, ...).
        aligned: inputs that run along the positions, [batch, position, ...], 0 at padding (`token_type_ids`, ...).
        fills: the value of each aligned input at tokens put after the prompt: a number, "last" for that of the token
            before, or "next" for numbers that go on counting from it.
        features: [batch, position, d_model], what stands at image tokens at the input of the first block in place of what
            the model makes of pixels; None where it makes it.
        cross_mask: for families that read the image by cross-attention, bool [batch, key]: which keys of it are tokens
            of an image. None for all others.
        frames: for pixels given as patches, how many times each has the same pixels (Qwen-VL: an image is a film of 2
            frames).
        deepstack_layers: see `Anatomy.deepstack_layers`.
        always_pixels: whether the model must be given pixels also where no row has an image; nothing comes of them.
        pad_token_id: the id at padding positions.
        image_token_id: the id at image positions.
        unk_token_id: the tokenizer's id of a word that it does not know; None where it has none.
        black, white: per channel, what the image processor makes of pixels of 0 and of full brightness.
        crop: what the processor cuts out of a picture; None where the model sees the whole.
        groups: per row, what it shares with rows that are not independent of it: its image (see `grouped`). By default
            its id.
    """

    input_ids: Tensor
    attention_mask: Tensor
    image_mask: Tensor
    patches: tuple[Patches, ...]
    images: tuple[tuple[Image, ...], ...]
    ids: tuple[str, ...]
    n_generated: tuple[int, ...]
    pad_token_id: int
    image_token_id: int
    extra: dict[str, Any] = field(default_factory=dict)
    aligned: dict[str, Tensor] = field(default_factory=dict)
    fills: Mapping[str, int | Literal["last", "next"]] = field(default_factory=dict)
    features: Tensor | None = None
    cross_mask: Tensor | None = None
    frames: int = 1
    deepstack_layers: tuple[int, ...] = ()
    always_pixels: bool = False
    unk_token_id: int | None = None
    black: tuple[float, ...] = ()
    white: tuple[float, ...] = ()
    crop: CenterCrop | None = None
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.groups:
            object.__setattr__(self, "groups", self.ids)

    def grouped(self, groups: Sequence[str]) -> Batch:
        """The batch with the group of each row: the unit that a bootstrap resamples.

        Raises:
            InputError: not one group per row.
        """
        if len(groups) != self.size:
            raise InputError(f"{len(groups)} groups for {self.size} rows")
        return replace(self, groups=tuple(str(one) for one in groups))

    def window(self, row: int, image: int = 0) -> Window:
        """The part of an image that the model sees, on which the grid of the whole image lies (see `Patches`)."""
        return WHOLE if self.crop is None else self.crop.window(self.images[row][image].size)

    def seen(self, row: int, image: int = 0) -> Image:
        """An image as far as the model sees it, in its own pixels."""
        picture = self.images[row][image]
        left, top, right, bottom = self.window(row, image)
        width, height = picture.size
        box = (round(left * width), round(top * height), round(right * width), round(bottom * height))
        return picture if box == (0, 0, width, height) else picture.crop(box)

    @property
    def size(self) -> int:
        """Number of rows."""
        return int(self.input_ids.shape[0])

    @property
    def length(self) -> int:
        """Number of positions, padding included."""
        return int(self.input_ids.shape[1])

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.input_ids.device

    @cached_property
    def lengths(self) -> list[int]:
        """Per row, the number of positions that are not padding."""
        return [int(n) for n in self.attention_mask.sum(dim=1).tolist()]

    @property
    def prompt_lengths(self) -> list[int]:
        """Per row, the number of prompt positions (no padding, no continuation)."""
        return [n - generated for n, generated in zip(self.lengths, self.n_generated, strict=True)]

    @property
    def tiles(self) -> tuple[int, ...]:
        """Per row, how many pictures its images make for the vision tower."""
        return tuple(one.n_tiles for one in self.patches)

    @property
    def has_images(self) -> bool:
        """Whether every row has at least one image token."""
        return bool(self.image_mask.any(dim=1).all())

    @cached_property
    def real_mask(self) -> Tensor:
        """bool [batch, position], true where there is no padding."""
        return self.attention_mask.bool()

    @cached_property
    def text_mask(self) -> Tensor:
        """bool [batch, position], true at tokens that are neither image nor padding."""
        return self.real_mask & ~self.image_mask

    @cached_property
    def text_after_image_mask(self) -> Tensor:
        """bool [batch, position], true at text after the row's last image token; nowhere in a row without an image."""
        images_to_come = self.image_mask.flip(1).cumsum(dim=1).flip(1)
        return self.text_mask & (images_to_come == 0) & self.image_mask.any(dim=1, keepdim=True)

    @cached_property
    def generated_mask(self) -> Tensor:
        """bool [batch, position], true at the tokens of the continuation."""
        place = torch.arange(self.length, device=self.device)
        start = self.length - torch.tensor(self.n_generated, device=self.device)
        return place[None, :] >= start[:, None]

    @cached_property
    def before_generated_mask(self) -> Tensor:
        """bool [batch, position], true where the state predicts a token of the continuation.

        For a row without a continuation that is its last position, which predicts the first token to come.
        """
        before = torch.zeros_like(self.generated_mask)
        before[:, :-1] = self.generated_mask[:, 1:]
        bare = torch.tensor([n == 0 for n in self.n_generated], device=self.device)
        before[:, -1] |= bare
        return before

    @cached_property
    def last_prompt_position(self) -> Tensor:
        """int64 [batch], the position of the last prompt token, whose state predicts the first generated token."""
        return self.length - 1 - torch.tensor(self.n_generated, device=self.device)

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for the Hugging Face model."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.aligned, **self.extra}

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        extra = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.extra.items()}
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            image_mask=self.image_mask.to(device),
            extra=extra,
            aligned={name: value.to(device) for name, value in self.aligned.items()},
            cross_mask=None if self.cross_mask is None else self.cross_mask.to(device),
            features=None if self.features is None else self.features.to(device),
        )

    def _repacked(self, rows: Sequence[tuple[Tensor, Sequence[int]]], **changes: Any) -> Batch:
        """The batch with other tokens, padded on the left again: per row, the positions that stay and the ids that follow."""
        length = max(len(kept) + len(more) for kept, more in rows)
        ids = self.input_ids.new_full((len(rows), length), self.pad_token_id)
        mask = self.attention_mask.new_zeros(len(rows), length)
        image = self.image_mask.new_zeros(len(rows), length)
        aligned = {
            name: values.new_zeros(len(rows), length, *values.shape[2:]) for name, values in self.aligned.items()
        }
        old = self.features
        features = None if old is None else old.new_zeros(len(rows), length, old.shape[-1])
        for row, (kept, more) in enumerate(rows):
            start, end = length - len(kept) - len(more), length - len(more)
            if features is not None and old is not None:
                features[row, start:end] = old[row, kept.to(old.device)]
            ids[row, start:end] = self.input_ids[row, kept]
            ids[row, end:] = torch.tensor(list(more), dtype=ids.dtype, device=ids.device)
            mask[row, start:] = 1
            image[row, start:end] = self.image_mask[row, kept]
            for name, values in aligned.items():
                values[row, start:end] = self.aligned[name][row, kept]
                fill = self.fills[name]
                values[row, end:] = values[row, end - 1].clone() if isinstance(fill, str) else fill
                if fill == "next":
                    values[row, end:] += torch.arange(1, len(more) + 1, device=values.device)
        found = {
            "input_ids": ids,
            "attention_mask": mask,
            "image_mask": image,
            "aligned": aligned,
            "features": features,
        }
        return replace(self, **{**found, **changes})

    def _positions(self, mask: Tensor) -> list[Tensor]:
        """Per row, the positions at which a mask [batch, position] is true."""
        return [row.nonzero()[:, 0] for row in mask]

    def without_images(self) -> Batch:
        """The same prompts with every image token deleted: shorter rows, no pixels (the image-free input of VHD)."""
        extra = {name: value[:1] for name, value in self.extra.items()} if self.always_pixels else {}
        bare = self.without_images_of([True] * self.size, extra)
        aligned = {name: values for name, values in bare.aligned.items() if name != POSITIONS}
        return replace(bare, cross_mask=None, features=None, aligned=aligned)

    def repeated(self, times: int) -> Batch:
        """The batch with every row so many times, one after the other.

        Raises:
            UnsupportedError: inputs of the images that are not row by row.
        """
        some = [name for name, value in self.extra.items() if isinstance(value, Tensor)]
        odd = [name for name in some if len(self.extra[name]) != self.size]
        if some and (odd or any(len(one) != 1 for one in self.images)):
            raise UnsupportedError(
                f"these prompts cannot be repeated: {', '.join(odd or some)} are not row by row (one image for each prompt, in "
                "one picture)"
            )
        rows = torch.arange(self.size, device=self.device).repeat_interleave(times)

        def taken(value: Any) -> Any:
            return value[rows.to(value.device)] if isinstance(value, Tensor) else value

        def each(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(one for one in values for _ in range(times))

        return replace(
            self,
            input_ids=taken(self.input_ids),
            attention_mask=taken(self.attention_mask),
            image_mask=taken(self.image_mask),
            patches=each(self.patches),
            images=each(self.images),
            ids=each(self.ids),
            n_generated=each(self.n_generated),
            groups=each(self.groups),
            extra={name: taken(value) for name, value in self.extra.items()},
            aligned={name: taken(value) for name, value in self.aligned.items()},
            cross_mask=taken(self.cross_mask),
            features=taken(self.features),
        )

    def padded_left(self) -> Batch:
        """The batch with its padding before every row, wherever it was."""
        real = self.real_mask
        if bool((real[:, 1:] >= real[:, :-1]).all()):
            return self
        return self._repacked([(kept, ()) for kept in self._positions(real)])

    def without_images_of(self, rows: Sequence[bool], extra: dict[str, Any]) -> Batch:
        """The batch with every image token of some rows deleted.

        Args:
            rows: per row, whether its images go.
            extra: what is left of the other inputs of the model.
        """
        gone = torch.tensor(rows, device=self.device)[:, None] & self.image_mask
        empty = Patches.join([])
        return self._repacked(
            [(kept, ()) for kept in self._positions(self.real_mask & ~gone)],
            patches=tuple(empty if without else one for without, one in zip(rows, self.patches, strict=True)),
            images=tuple(() if without else one for without, one in zip(rows, self.images, strict=True)),
            extra=extra,
        )

    def with_image_tokens(
        self, chosen: Sequence[Tensor], features: Sequence[Tensor], *, keep_positions: bool = False
    ) -> Batch:
        """The batch with some image tokens alone, and given features in place of pixels.

        The kept ones stay marked by `image_mask`, under the id of padding: the model would look for the image of an image id.

        Args:
            chosen: per row, int64 [kept], which image tokens are kept, numbered from 0 among the row's, in the order in which
                they are to stand; they stand where, in the prompt's order, the kept ones stood.
            features: per row, [kept, d_model], what stands at them at the input of the first block.
            keep_positions: whether every token has the position that it has in this batch, so that there are gaps where tokens
                went, rather than one after the other.
        """
        kept, patches = [], []
        for row, numbers in enumerate(chosen):
            stays = self.real_mask[row] & ~self.image_mask[row]
            stays[self.image_mask[row].nonzero()[:, 0][numbers.to(self.device)]] = True
            kept.append(stays.nonzero()[:, 0])
            patches.append(self.patches[row].take(numbers))
        extra = {name: value[:1] for name, value in self.extra.items()} if self.always_pixels else {}
        none: tuple[Image, ...] = ()
        whole = self._counted() if keep_positions else self
        shorter = whole._repacked(
            [(one, ()) for one in kept], patches=tuple(patches), images=(none,) * self.size, extra=extra
        )
        ids = shorter.input_ids.masked_fill(shorter.image_mask, self.pad_token_id)
        return replace(shorter, input_ids=ids, features=None).with_features(features)

    def _counted(self) -> Batch:
        """The batch with the number of every position among the row's as an input of the model."""
        numbers = (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        return replace(self, aligned={POSITIONS: numbers, **self.aligned}, fills={**self.fills, POSITIONS: "next"})

    def with_features(self, features: Sequence[Tensor]) -> Batch:
        """The batch with given features at its image tokens, whatever its pixels are.

        Args:
            features: per row, [image token, d_model], what stands at them at the input of the first block.
        """
        table = features[0].new_zeros(*self.image_mask.shape, features[0].shape[-1])
        for row, values in enumerate(features):
            table[row, self.image_mask[row].to(table.device)] = values
        return replace(self, features=table)

    def with_image_slots(self, n: int) -> Batch:
        """The batch with `n` tokens in the place of each image, and no pixels, for what is put there by hand.

        They stand where the image's first token stood, marked by `image_mask`, under the id of padding; what runs along the
        positions is 0 at them, as at text of a prompt.

        Args:
            n: at least 1.
        """
        rows = []
        for row, real in enumerate(self._positions(self.real_mask)):
            inside = self.image_mask[row, real]
            first = torch.ones(int(inside.sum()), dtype=torch.bool, device=real.device)
            if self.cross_mask is None:  # else each image has one token already
                image = self.patches[row].image.to(real.device)
                first[1:] = image[1:] != image[:-1]
            times = torch.ones_like(real)
            times[inside] = n * first.long()
            rows.append((real.repeat_interleave(times), ()))
        extra = {name: value[:1] for name, value in self.extra.items()} if self.always_pixels else {}
        none: tuple[tuple[Image, ...], ...] = ((),) * self.size
        shorter = self._repacked(
            rows, patches=(Patches.join([]),) * self.size, images=none, extra=extra, cross_mask=None, features=None
        )
        aligned = {
            name: values.masked_fill(shorter.image_mask.view(*shorter.image_mask.shape, *[1] * (values.ndim - 2)), 0)
            for name, values in shorter.aligned.items()
            if name != POSITIONS
        }
        ids = shorter.input_ids.masked_fill(shorter.image_mask, self.pad_token_id)
        return replace(shorter, input_ids=ids, aligned=aligned)

    def prompt_only(self) -> Batch:
        """The batch without its continuation."""
        prompt = self.real_mask & ~self.generated_mask
        return self._repacked([(kept, ()) for kept in self._positions(prompt)], n_generated=tuple(0 for _ in self.ids))

    def with_continuation(self, tokens: Sequence[Sequence[int]]) -> Batch:
        """The batch with tokens put after each prompt, to be run in one forward pass (teacher forcing).

        Args:
            tokens: per row, the ids that follow the prompt, for example `Generation.tokens`.

        Raises:
            InputError: not one list of tokens per row, or an image token among them (the model would look for its
                image).
        """
        if len(tokens) != self.size:
            raise InputError(
                f"with_continuation takes one list of tokens per row: {self.size} rows, {len(tokens)} lists"
            )
        for more in tokens:
            if self.image_token_id in more:
                raise InputError(
                    f"the continuation holds the image token (id {self.image_token_id}), which has no image of its own"
                )
        prompt = self._positions(self.real_mask & ~self.generated_mask)
        return self._repacked(list(zip(prompt, tokens, strict=True)), n_generated=tuple(len(more) for more in tokens))

    def with_pixels(self, pixel_values: Tensor) -> Batch:
        """The batch with other pixels of the same shape.

        Raises:
            InputError: no pixels in this batch, or another shape.
        """
        old = self.extra.get("pixel_values")
        if not isinstance(old, Tensor) or old.shape != pixel_values.shape:
            shape = tuple(old.shape) if isinstance(old, Tensor) else None
            raise InputError(
                f"pixel_values of shape {tuple(pixel_values.shape)} for a batch with pixels of shape {shape}"
            )
        return replace(self, extra={**self.extra, "pixel_values": pixel_values}, features=None)

    def __repr__(self) -> str:
        images = [len(row) for row in self.images]
        tokens = self.image_mask.sum(dim=1).tolist()
        return f"Batch({self.size} rows, {self.length} positions, images per row {images}, image tokens {tokens})"
