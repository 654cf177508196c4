"""Getting at the values of a site: hooks on the module where they pass, and the shape in which they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slitlamp.models.blocks import Place


@dataclass(frozen=True, eq=False)
class Tiles:
    """Where the positions of each tile are in a sequence that holds all tiles.

    Attributes:
        index: int64 [tile, position], into the sequence; 0 where a tile has fewer positions than another.
        valid: bool [tile, position].
    """

    index: Tensor
    valid: Tensor

    @staticmethod
    def of(tiles: Sequence[Tensor]) -> Tiles:
        """From the indices of each tile, int64 [position]."""
        index = nn.utils.rnn.pad_sequence([one.cpu() for one in tiles], batch_first=True)
        lengths = torch.tensor([len(one) for one in tiles])
        return Tiles(index, torch.arange(index.shape[1])[None, :] < lengths[:, None])

    def gather(self, values: Tensor) -> Tensor:
        """[sequence, ...] to [tile, position, ...], 0 where there is no position."""
        taken = values[self.index.to(values.device)]
        return taken * self.valid.to(values.device).view(*self.valid.shape, *[1] * (taken.ndim - 2))

    def scatter(self, values: Tensor, into: Tensor) -> Tensor:
        """[tile, position, ...] put back into a copy of the sequence [sequence, ...]."""
        changed = into.clone()
        valid = self.valid.to(values.device)
        changed[self.index.to(values.device)[valid]] = values[valid]
        return changed


@dataclass(frozen=True)
class View:
    """How the values that pass a place are given: [row, position, ...], and how changed ones are put back.

    Attributes:
        place: where they pass.
        rows: rows of the batch, for values that come as [row x position, width]; None in the vision tower.
        tiles: for towers that run over all tiles as one sequence.
        gate: what the values are multiplied by before they are added to the residual stream.
    """

    place: Place
    rows: int | None = None
    tiles: Tiles | None = None
    gate: Callable[[], Tensor] | None = None

    def of(self, raw: Tensor) -> Tensor:
        """The values as [row, position, (head,) width]."""
        place, values = self.place, raw
        if self.tiles is not None:
            values = self.tiles.gather(values.flatten(0, -2))
        elif values.ndim == 2 and self.rows is not None:
            values = values.unflatten(0, (self.rows, -1))
        elif values.ndim == 4:  # positions as rows and columns
            values = values.flatten(1, 2)
        if place.third is not None:
            values = values.unflatten(-1, (3, -1))[..., place.third, :]
        if place.heads is not None:
            values = values.unflatten(-1, (place.heads, -1))
        if self.gate is not None:
            values = values * self.gate()
        return values

    def back(self, changed: Tensor, raw: Tensor) -> Tensor:
        """What takes the place of `raw`, from changed values in the shape that `of` gives."""
        place = self.place
        if place.heads is not None:
            changed = changed.flatten(-2)
        if self.tiles is not None:
            return self.tiles.scatter(changed, raw.flatten(0, -2)).view_as(raw)
        return changed.reshape(raw.shape)

    @property
    def can_be_changed(self) -> bool:
        """Whether an edit here reaches all that follows, and `back` can undo `of`: not for a third of a fused projection, nor
        for gated values.
        """
        return self.place.third is None and self.gate is None and not self.place.read_only


def hook(
    module: nn.Module,
    view: View,
    function: Callable[[Tensor, Tensor], Tensor | None],
    *,
    first: bool,
    later: Callable[[Tensor], bool] | None = None,
    idle: Callable[[], bool] = lambda: False,
) -> RemovableHandle:
    """Call a function on the values that pass a place; what it returns, unless None, takes their place.

    Args:
        module: the module of the place.
        view: how the values are given.
        function: (values [row, position, ...], the tensor that holds them) -> None, or changed values.
        first: put it before hooks that are there already: transformers captures `hidden_states`, from which LLaVA
            takes its image features, by hooks of its own, and an edit must come before them.
        later: takes the tensor that holds the values if it can be recorded once the step is over, and says whether it did.
        idle: whether to let the values pass untouched and unseen.
    """

    def apply(raw: Tensor) -> Tensor | None:
        if idle():
            return None
        if later is not None and later(raw):
            return None
        changed = function(view.of(raw), raw)
        return None if changed is None else view.back(changed, raw)

    if view.place.at_input:

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            name = "hidden_states" if "hidden_states" in kwargs else "hidden_state"
            changed = apply(args[0] if args else kwargs[name])
            if changed is None:
                return None
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, name: changed})

        return module.register_forward_pre_hook(before, with_kwargs=True, prepend=first)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        changed = apply(output[0] if isinstance(output, tuple) else output)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return module.register_forward_hook(after, prepend=first)
