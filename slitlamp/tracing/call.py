"""Which positions a forward call of the model runs over, and how names such as "image" choose among them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models.batch import Batch
from slitlamp.tracing.sites import Positions, Site


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen positions of each row, packed to the left.

    Attributes:
        index: int64 [row, chosen], the positions; 0 where there is none.
        valid: bool [row, chosen], false where a row has fewer positions than another.
        full: whether every row has the same number of positions (`valid` is true everywhere).
        everything: whether all positions are chosen in their order, so that nothing need be gathered.
    """

    index: Tensor
    valid: Tensor
    full: bool
    everything: bool

    @property
    def count(self) -> int:
        """The largest number of positions of a row."""
        return int(self.index.shape[1])

    def mask(self, n_positions: int, device: torch.device) -> Tensor:
        """bool [row, position], true at the chosen positions."""
        index, valid = self.index.to(device), self.valid.to(device, torch.uint8)
        chosen = torch.zeros(len(index), n_positions, dtype=torch.uint8, device=device)
        return chosen.scatter_reduce(1, index, valid, "amax").bool()

    @staticmethod
    def of(mask: Tensor) -> Selection:
        """From a bool mask [row, position]."""
        counts = mask.sum(dim=1)
        count = int(counts.max())
        index = torch.argsort(mask.logical_not().to(torch.uint8), dim=1, stable=True)[:, :count]
        valid = torch.arange(count, device=mask.device)[None, :] < counts[:, None]
        full = bool(valid.all())
        return Selection(torch.where(valid, index, 0), valid, full, everything=full and count == mask.shape[1])


class Calls:
    """The forward calls of one run: a prefill over the batch, then one call per decoded token.

    A row counts until its end token has been fed back; what the model computes for it afterwards is not recorded.
    """

    def __init__(self, batch: Batch, end_tokens: tuple[int, ...] = ()) -> None:
        self.batch = batch
        self.end_tokens = frozenset(end_tokens)
        self.number = -1
        self._fed: list[Tensor] = []
        self._alive = self._alive_before = (True,) * batch.size
        self._alive_rows: Tensor | None = None
        self._cache: dict[tuple[str, int], Selection | None] = {}
        self._of_run: dict[object, Selection | None] = {}

    @property
    def is_prefill(self) -> bool:
        """Whether the current call runs over the prompt, or is about to: `generate` may run the vision tower before it."""
        return self.number <= 0

    def check(self, site: Site) -> None:
        """Refuse a site whose position mask does not fit the batch.

        Raises:
            InputError: a mask of another shape.
        """
        shape = (self.batch.size, self.batch.length)
        for positions in (site.positions, site.queries, site.keys):
            if isinstance(positions, Tensor) and tuple(positions.shape) != shape:
                raise InputError(
                    f"{site.label}: a position mask of shape {list(positions.shape)} for a batch of shape {list(shape)}"
                )

    def begin(self, inputs: Tensor | None) -> None:
        """A forward call starts on these ids [batch, position], or embeddings [batch, position, d_model] of the prompt.

        Raises:
            UnsupportedError: the call is neither the batch's prefill nor a decode step of one token.
        """
        self.number += 1
        self._cache.clear()
        shape = None if inputs is None else tuple(inputs.shape[:2])
        expected = tuple(self.batch.input_ids.shape) if self.number == 0 else (self.batch.size, 1)
        if inputs is None or shape != expected:
            raise UnsupportedError(
                f"forward call {self.number} ran over input ids of shape {shape}, expected {expected}; beam search, "
                "assisted decoding and chunked prefill cannot be traced or edited"
            )
        if self.number > 0:
            if self.end_tokens:
                fed = inputs[:, 0].tolist()
                self._alive = tuple(
                    a and token not in self.end_tokens for a, token in zip(self._alive, fed, strict=True)
                )
            self._fed.append(self._alive_mask())

    def attention_places(self, query: Tensor, n_keys: int) -> tuple[Tensor, Tensor]:
        """The positions of a call of the attention function in the current call of the model: int64 [query] and int64 [key].

        Args:
            query: [batch, head, query, d_head].
            n_keys: how many keys there are: those of all positions so far, or, behind a sliding window, the last ones.

        Raises:
            UnsupportedError: it does not run over the positions of the batch.
        """
        n_queries = self.batch.length if self.is_prefill else 1
        if query.shape[0] != self.batch.size or query.shape[2] != n_queries:
            raise UnsupportedError(
                f"attention over {list(query.shape[:3:2])} rows and queries, expected {[self.batch.size, n_queries]}: this "
                "model's attention does not run over the positions of the batch and cannot be edited"
            )
        length = self.batch.length + max(self.number, 0)
        first = max(0, length - n_keys)
        queries = torch.arange(0 if self.is_prefill else length - 1, length, device=query.device)
        return queries, torch.arange(first, first + n_keys, device=query.device)

    def _alive_mask(self) -> Tensor:
        """bool [batch], true for rows that have not ended."""
        if self._alive_rows is None or self._alive != self._alive_before:
            self._alive_before = self._alive
            self._alive_rows = torch.tensor(self._alive, dtype=torch.bool, device=self.batch.device)
        return self._alive_rows

    def rewind(self, kept: Tensor) -> None:
        """Decoding goes back: the cache has been cropped to the first tokens that were fed back.

        Args:
            kept: bool [batch, token fed back], of those that are still in the cache, false where a row has taken one back: it
                is hidden from the row, and not among any positions.
        """
        self._fed = [fed & still for fed, still in zip(self._fed, kept.to(self.batch.device).unbind(1), strict=False)]
        self.number = len(self._fed)
        self._cache.clear()

    def select(self, positions: Positions) -> Selection | None:
        """The chosen query positions of the current call; None where no row has any."""
        if not self.is_prefill:
            return self._select_decoded(positions)
        key = _key("query", positions)
        if key not in self._cache:
            mask = self._prefill_mask(positions)
            self._cache[key] = Selection.of(mask) if bool(mask.any()) else None
        return self._cache[key]

    def _select_decoded(self, positions: Positions) -> Selection | None:
        """The position of a decode step, in the rows that count; the same for all steps in which the same rows do."""
        key = (*_key("query", positions), self._alive)
        if key not in self._of_run:
            mask = self._fed[-1][:, None] & self._counts_generated(positions)
            self._of_run[key] = Selection.of(mask) if bool(mask.any()) else None
        return self._of_run[key]

    def select_keys(self, positions: Positions) -> Selection | None:
        """The chosen key positions of the current call: those of the prompt and of the tokens fed back so far.

        "last" is the token that the call runs over.
        """
        if self.is_prefill:
            return self.select(positions)
        key = _key("key", positions)
        if isinstance(positions, Tensor) or positions == "image":  # no token that was fed back is among them
            if key not in self._of_run:
                mask = self._prefill_mask(positions)
                of_prompt = Selection.of(mask) if bool(mask.any()) else None
                self._of_run[key] = None if of_prompt is None else replace(of_prompt, everything=False)
            return self._of_run[key]
        if key not in self._cache:
            prompt = self._prefill_mask(positions)
            fed = torch.stack(self._fed, dim=1) & self._counts_generated(positions)
            if isinstance(positions, str) and positions == "last":
                prompt = torch.zeros_like(prompt)
                fed[:, :-1] = False
            mask = torch.cat([prompt, fed], dim=1)
            self._cache[key] = Selection.of(mask) if bool(mask.any()) else None
        return self._cache[key]

    def _prefill_mask(self, positions: Positions) -> Tensor:
        batch = self.batch
        if isinstance(positions, Tensor):
            return positions.to(batch.device) & batch.real_mask
        if positions == "last":
            mask = torch.zeros_like(batch.image_mask)
            mask[:, -1] = True
            return mask
        masks = {
            "all": lambda: batch.real_mask,
            "image": lambda: batch.image_mask,
            "text": lambda: batch.text_mask,
            "text_after_image": lambda: batch.text_after_image_mask,
            "generated": lambda: batch.generated_mask,
            "before_generated": lambda: batch.before_generated_mask,
        }
        return masks[positions]()

    def _counts_generated(self, positions: Positions) -> Tensor:
        """bool [batch, 1]: whether a token that was fed back is among the positions."""
        if isinstance(positions, str) and positions == "text_after_image":
            return self.batch.image_mask.any(dim=1, keepdim=True)
        counts = isinstance(positions, str) and positions != "image"
        return torch.full((self.batch.size, 1), counts, device=self.batch.device)


def _key(kind: str, positions: Positions) -> tuple[str, int]:
    """By which a selection is remembered."""
    return (f"{kind}:{positions}", 0) if isinstance(positions, str) else (f"{kind}:mask", id(positions))


def vision_selection(
    n_rows: int,
    n_positions: int,
    positions: Positions,
    has_cls: bool,
    device: torch.device,
    valid: Tensor | None = None,
) -> Selection:
    """The chosen positions of a vision tower: "all", "cls" (the first) or "patches" (all but the CLS).

    `valid`, bool [tile, position], says which positions a tile has, where tiles differ.
    """
    first = 1 if has_cls and positions == "patches" else 0
    last = 1 if positions == "cls" else n_positions
    index = torch.arange(first, last, device=device)[None, :].expand(n_rows, -1)
    if valid is not None and not bool(valid.all()):
        chosen = valid[:, first:last].to(device)
        return Selection(torch.where(chosen, index, 0), chosen, full=bool(chosen.all()), everything=False)
    everything = first == 0 and last == n_positions
    return Selection(index, torch.ones_like(index, dtype=torch.bool), full=True, everything=everything)
