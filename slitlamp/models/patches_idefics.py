"""Where the image tokens of Idefics3 and SmolVLM lie: tiles row by row, then the whole image, with text tokens between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slitlamp.errors import UnsupportedError
from slitlamp.models.patches import BASE_VIEW, TILE_VIEW, Patches, _grid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_PATH = "<fake_token_around_image>, <row_1_col_1> or <global-img>, and the image tokens"


def idefics3_patches(
    config: PreTrainedConfig, processed: Mapping[str, Any], n_images: int, has_cls: bool
) -> list[Patches]:
    """Idefics3, SmolVLM: the tiles, each after its own text tokens, then the whole image.

    The processor keeps to itself how it cut an image, so this is read off the tokens: a run of image tokens is one
    picture; the run with the label of a prompt's last run is a whole image; a run that follows another after just the
    two tokens that open it stands in the same row of tiles, one that follows after a line break opens a row.

    Raises:
        UnsupportedError: tokens laid out otherwise.
    """
    vision = config.vision_config
    side = int(vision.image_size) // int(vision.patch_size) // int(config.scale_factor)
    found: list[Patches] = []
    for ids in processed["input_ids"]:
        runs = _runs(ids == int(config.image_token_id))
        if not runs:
            continue
        fake, label = int(ids[runs[-1][1]]), int(ids[runs[-1][0] - 1])  # of the last run, a whole image
        tiles: list[int] = []  # number of tiles in each row of the image under way
        end = -1
        for start, stop in runs:
            if stop - start != side * side or int(ids[start - 2]) != fake:
                raise UnsupportedError(
                    f"image tokens must come as {_PATH} ({side * side} of them); found {stop - start} in a run"
                )
            if int(ids[start - 1]) == label:
                found.append(_image(tiles, side))
                tiles = []
            elif tiles and start - end == 2:
                tiles[-1] += 1
            else:
                tiles.append(1)
            end = stop
    return found


def _runs(mask: Tensor) -> list[tuple[int, int]]:
    """Start and end of every stretch in which a mask [position] is true."""
    edges = torch.diff(mask.to(torch.int8), prepend=mask.new_zeros(1), append=mask.new_zeros(1))
    starts, stops = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return list(zip(starts, stops, strict=True))


def _image(tiles: list[int], side: int) -> Patches:
    """One image that was cut into rows of tiles of side x side tokens; no row: it was not cut."""
    if len(set(tiles)) > 1:
        raise UnsupportedError(f"rows of tiles of an image must be of one length, found {tiles}")
    base_row, base_column = _grid(side, side)
    rows, columns = len(tiles), tiles[0] if tiles else 0
    tile_row, tile_column = _grid(rows, columns)
    row = torch.cat([(tile_row[:, None] * side + base_row).flatten(), base_row])
    column = torch.cat([(tile_column[:, None] * side + base_column).flatten(), base_column])
    view = torch.full_like(row, TILE_VIEW)
    view[-side * side :] = BASE_VIEW
    grids = {(0, BASE_VIEW): (side, side)}
    if tiles:
        grids[0, TILE_VIEW] = (rows * side, columns * side)
    return Patches(torch.zeros_like(row), row, column, view, grids, n_tiles=rows * columns + 1)
