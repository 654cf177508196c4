"""Where image tokens lie on the image: the grid of every image token of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slitlamp.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BASE_VIEW = 0
TILE_VIEW = 1


@dataclass(frozen=True, eq=False)  # comparing tensors has no single truth value
class Patches:
    """The place of each image token of one prompt (or of one image), in the order of the tokens.

    Where the decoder reads the image by cross-attention (Mllama), these are the keys of it that are tokens of an image, in
    their order, and not the tokens that stand for an image in the prompt.

    Attributes:
        image: int64 [token], the image of the prompt that the token belongs to, from 0.
        row: int64 [token], its row in the grid of its view, from the top; -1 for a token that stands for no row (CLS).
        column: int64 [token], its column, from the left; -1 for tokens with no column: CLS and end-of-row (newline)
            tokens.
        view: int64 [token], 0 for the view of the whole image, 1 for the high-resolution grid put together from tiles.
        grids: (image, view) -> (rows, columns).
        n_tiles: how many pictures (tiles) the images make for the vision tower.
    """

    image: Tensor
    row: Tensor
    column: Tensor
    view: Tensor
    grids: Mapping[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    n_tiles: int = 0

    def __len__(self) -> int:
        return int(self.image.numel())

    def __repr__(self) -> str:
        grids = (
            f"image {image}{'' if view == BASE_VIEW else ' in tiles'}: {rows} x {columns}"
            for (image, view), (rows, columns) in self.grids.items()
        )
        return f"Patches({len(self)} tokens; {', '.join(grids) or 'no place on an image'})"

    @property
    def table(self) -> Tensor:
        """int64 [token, 3]: image, row, column."""
        return torch.stack([self.image, self.row, self.column], dim=1)

    @property
    def on_image(self) -> Tensor:
        """bool [token]: true for tokens that stand for a patch of pixels (not CLS, not a newline)."""
        return (self.row >= 0) & (self.column >= 0)

    def to_grid(self, values: Tensor, *, image: int = 0, view: int = BASE_VIEW) -> Tensor:
        """Lay values of image tokens out on the grid of one view.

        Args:
            values: [..., token].
            image: the image of the prompt.
            view: `BASE_VIEW` or `TILE_VIEW`.

        Returns:
            [..., row, column].

        Raises:
            KeyError: the prompt has no such image or view.
        """
        if (image, view) not in self.grids:
            raise KeyError(f"no view {view} of image {image} in this prompt; there are {sorted(self.grids)}")
        if values.shape[-1] != len(self):
            raise ValueError(f"values of {values.shape[-1]} tokens for a prompt with {len(self)} image tokens")
        rows, columns = self.grids[image, view]
        chosen = (self.on_image & (self.image == image) & (self.view == view)).to(values.device)
        grid = values.new_zeros(*values.shape[:-1], rows * columns)
        place = (self.row * columns + self.column).to(values.device)[chosen]
        grid[..., place] = values[..., chosen]
        return grid.unflatten(-1, (rows, columns))

    def take(self, tokens: Tensor) -> Patches:
        """The places of some tokens, int64 [token], whose features need no picture any more."""
        chosen = tokens.to(self.image.device)
        image, row, column, view = (one[chosen] for one in (self.image, self.row, self.column, self.view))
        return Patches(image, row, column, view, self.grids)

    @staticmethod
    def join(images: Sequence[Patches]) -> Patches:
        """The patches of a prompt from those of its images, numbered in order."""
        if not images:
            none = torch.zeros(0, dtype=torch.int64)
            return Patches(none, none, none, none)
        grids = {(number, view): grid for number, one in enumerate(images) for (_, view), grid in one.grids.items()}
        return Patches(
            image=torch.cat([torch.full_like(one.image, number) for number, one in enumerate(images)]),
            row=torch.cat([one.row for one in images]),
            column=torch.cat([one.column for one in images]),
            view=torch.cat([one.view for one in images]),
            grids=grids,
            n_tiles=sum(one.n_tiles for one in images),
        )


def _grid(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return row.flatten(), column.flatten()


def _base_grid(
    config: PreTrainedConfig, height: int, width: int, *, has_cls: bool
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Rows and columns of the whole-image view, after its CLS token where the tower has one and the model keeps it."""
    patch = int(config.vision_config.patch_size)
    shape = (height // patch, width // patch)
    row, column = _grid(*shape)
    strategy = config.vision_feature_select_strategy
    if strategy == "full" and has_cls:
        cls = torch.tensor([-1])
        return torch.cat([cls, row]), torch.cat([cls, column]), shape
    if strategy in ("default", "full"):
        return row, column, shape
    raise UnsupportedError(f"vision_feature_select_strategy {strategy!r} is not known; known: 'default', 'full'")


def llava_patches(
    config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool
) -> list[Patches]:
    """LLaVA-1.5: one grid per image in raster order, after the CLS token if the model keeps it."""
    height, width = processed["pixel_values"].shape[-2:]
    row, column, shape = _base_grid(config, int(height), int(width), has_cls=has_cls)
    zero = torch.zeros_like(row)
    return [Patches(zero, row, column, zero, {(0, BASE_VIEW): shape}, n_tiles=1) for _ in range(n_images)]


def llava_next_patches(
    config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool
) -> list[Patches]:
    """LLaVA-NeXT: the whole image, then the tiles as one grid without padding, each row closed by a newline token."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side = int(config.vision_config.image_size)
    patch = int(config.vision_config.patch_size)
    base_row, base_column, base_shape = _base_grid(config, side, side, has_cls=has_cls)
    found = []
    for size in processed["image_sizes"][:n_images]:
        tile_rows, tile_columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
        per_tile = side // patch
        # unpad_image cuts rows or columns off a picture; what is left of a picture of ones is the grid the model keeps
        kept = unpad_image(torch.ones(1, tile_rows * per_tile, tile_columns * per_tile), size)
        rows, columns = int(kept.shape[1]), int(kept.shape[2])
        row, column = _grid(rows, columns + 1)
        column = torch.where(column == columns, -1, column)
        row, column = torch.cat([base_row, row]), torch.cat([base_column, column])
        view = torch.full_like(row, TILE_VIEW)
        view[: len(base_row)] = BASE_VIEW
        grids = {(0, BASE_VIEW): base_shape, (0, TILE_VIEW): (rows, columns)}
        n_tiles = 1 + tile_rows * tile_columns
        found.append(Patches(torch.zeros_like(row), row, column, view, grids, n_tiles))
    return found
