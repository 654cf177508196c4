"""Masks of the attention of image tokens: neighbours (YOPO), themselves alone (EE-MLLM), the question too (AKI)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from interventions.image_columns import at_columns, attention_layers
from interventions.raised_scores import check_image_tokens
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import AttentionEdit, Calls

Pattern = Literal["neighbour", "diagonal", "mutual"]
Direction = Literal["causal", "both"]
Select = Literal["given", "random"]
PATTERNS = ("neighbour", "diagonal", "mutual")
_WORD = 0xFFFFFFFF


@dataclass
class ImageAttentionMask(Intervention):
    """Image tokens attend to other tokens than the model lets them, in all heads of some layers, before the softmax.

    Patterns. "neighbour" (the first step of YOPO): among image tokens, to those of the same image, and of the same view of it,
    that are at most (window - 1) / 2 rows and columns away. Ends of rows and CLS tokens, which have no place on the image, attend
    and are attended as ever. "diagonal" (EE-MLLM): among image tokens, to itself alone. "mutual" (AKI's modality-mutual
    attention): as ever, and also to the text of the prompt that follows the last image. What image tokens attend to in the text
    before them, and what text attends to, is not changed. The papers train their models with these masks, but for YOPO's with
    Qwen2-VL and InternVL: here nothing is trained.

    Attributes:
        pattern: "neighbour", "diagonal" or "mutual".
        window: of "neighbour", odd, in image tokens; 5 is the paper's. One that covers the image changes nothing in a model whose
            image tokens see those before them.
        direction: of "neighbour": "causal", neighbours up to the token itself alone; or "both", as released: also those after
            it, which a causal model hides.
        layers: 0-based; () changes nothing; None for all.
        select: "given", or its control "random": every image token attends to as many image tokens, drawn among all of the item's
            that have a place and, with "causal" or "diagonal", are not after it; it may draw itself. Of "mutual": in place of
            the text, as many image tokens after it, or all where there are fewer.
        seed: of the draw, which is the same in all layers.
    """

    pattern: Pattern = "neighbour"
    window: int = 5
    direction: Direction = "causal"
    layers: Sequence[int] | None = None
    select: Select = "given"
    seed: int = 0

    name: ClassVar[str] = "ImageAttentionMask"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse unknown patterns, windows without a middle, and models without image tokens among their positions."""
        for what, value, known in (
            ("pattern", self.pattern, PATTERNS),
            ("direction", self.direction, ("causal", "both")),
            ("select", self.select, ("given", "random")),
        ):
            if value not in known:
                raise unknown(f"{self.name} {what}", str(value), known)
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1 or self.window % 2 == 0:
            raise InputError(f"{self.name}: window must be an odd whole number from 1, found {self.window!r}")
        check_image_tokens(anatomy, self.name)
        attention_layers(self.layers, anatomy, self.name)

    def controls(self) -> dict[str, Intervention]:
        """As many pairs in every row, at random."""
        return {"random": replace(self, select="random")}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        whom = {
            "neighbour": f"their neighbours in a window of {self.window} x {self.window}"
            + (", those after them too" if self.direction == "both" else ""),
            "diagonal": "themselves alone",
            "mutual": "text after the image as well",
        }[self.pattern]
        if self.select == "random":
            whom = f"as many random ones as with {whom} (seed {self.seed})"
        where = "all layers"
        if self.layers is not None:
            where = f"layers {', '.join(map(str, self.layers))}" if self.layers else "no layer"
        return f"image tokens attend to {whom}, in {where}"

    def edits(self, run: RunContext) -> list[AttentionEdit]:
        """Edits of attention at image rows: pairs that are cut, and pairs that are shown."""
        layers = attention_layers(self.layers, run.anatomy, self.name)
        batch = run.batch
        if not bool(batch.image_mask.any()):
            return []
        allowed = _Allowed(self, batch)
        if self.pattern == "mutual":
            return [AttentionEdit(layer, allowed.shown, "image", shows=True) for layer in layers]
        edits = [AttentionEdit(layer, allowed.cut, "image") for layer in layers]
        if self.pattern == "neighbour" and self.direction == "both":
            edits += [AttentionEdit(layer, allowed.shown, "image", shows=True) for layer in layers]
        return edits


class _Allowed:
    """Which pairs of image rows and keys a mask allows, for one batch."""

    def __init__(self, mask: ImageAttentionMask, batch: Batch) -> None:
        self.mask = mask
        self.image = batch.image_mask
        self.text_after = batch.text_after_image_mask & ~batch.generated_mask
        self.first = batch.length - torch.tensor(batch.lengths, device=batch.device)
        self.places = places_of(batch)
        self.diagonal = mask.pattern == "diagonal"

    def cut(self, rows: Tensor, columns: Tensor, calls: Calls) -> Tensor:
        """bool [batch, 1, query, key], pairs among image tokens that are not allowed."""
        if self.mask.select == "random":
            kept = self._drawn(rows, columns)
        else:
            kept = self._kept(rows, columns)
        free = ~(self._placed(rows)[:, :, None] & self._placed(columns)[:, None])
        return (at_columns(self.image, columns)[:, None] & ~kept & ~free)[:, None]

    def shown(self, rows: Tensor, columns: Tensor, calls: Calls) -> Tensor:
        """bool [batch, 1, query, key], pairs that are allowed, those that the model hides among them."""
        if self.mask.pattern == "mutual":
            text = at_columns(self.text_after, columns)[:, None].expand(-1, rows.shape[1], -1)
            if self.mask.select == "given":
                return text[:, None]
            later = at_columns(self.image, columns)[:, None] & (columns > rows[:, :, None])
            return self._some(later, text.sum(dim=-1), rows, columns)[:, None]
        pairs = self._drawn(rows, columns) if self.mask.select == "random" else self._kept(rows, columns)
        return (pairs & self._placed(rows)[:, :, None] & self._placed(columns)[:, None])[:, None]

    def _at(self, positions: Tensor) -> Tensor:
        """The places of positions [key] or [batch, query]: [batch, key or query, 3]."""
        places = self.places.to(positions.device)
        positions = positions.clamp(max=places.shape[1] - 1)
        if positions.ndim == 1:
            return places[:, positions]
        return places.gather(1, positions[:, :, None].expand(-1, -1, 3))

    def _placed(self, positions: Tensor) -> Tensor:
        """bool [batch, key or query]: image tokens that a mask is for."""
        places = self._at(positions)
        placed = places[..., 0] >= 0 if self.diagonal else (places >= 0).all(dim=-1)
        return placed & (positions < self.places.shape[1])

    def _kept(self, rows: Tensor, columns: Tensor) -> Tensor:
        """bool [batch, query, key], the pairs of the pattern."""
        if self.diagonal:
            return rows[:, :, None] == columns
        one, other = self._at(rows)[:, :, None], self._at(columns)[:, None]
        near = (one - other).abs()
        kept = (near[..., 0] == 0) & (near[..., 1:].amax(dim=-1) <= self.mask.window // 2)
        return kept & (columns <= rows[:, :, None]) if self.mask.direction == "causal" else kept

    def _drawn(self, rows: Tensor, columns: Tensor) -> Tensor:
        """bool [batch, query, key], as many random pairs in every row."""
        among = self._placed(rows)[:, :, None] & self._placed(columns)[:, None]
        if self.diagonal or self.mask.direction == "causal":
            among = among & (columns <= rows[:, :, None])
        return self._some(among, (self._kept(rows, columns) & among).sum(dim=-1), rows, columns)

    def _some(self, among: Tensor, counts: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """bool [batch, query, key], at most so many [batch, query] of some pairs, by a draw that knows no padding."""
        first = self.first.to(rows.device)
        noise = noise_of(rows[:, :, None] - first[:, None, None], columns - first[:, None, None], self.mask.seed)
        ranks = noise.masked_fill(~among, _WORD + 1).argsort(dim=-1, stable=True).argsort(dim=-1)
        return among & (ranks < counts[:, :, None])


def places_of(batch: Batch) -> Tensor:
    """int64 [batch, position, 3]: the image and view of every image token, its row and its column; -1 where it has none, and at
    other positions.
    """
    places = torch.full((*batch.input_ids.shape, 3), -1, device=batch.device)
    for row, patches in enumerate(batch.patches):
        if len(patches):
            views = int(patches.view.max()) + 1
            own = torch.stack([patches.image * views + patches.view, patches.row, patches.column], dim=1)
            places[row, batch.image_mask[row]] = own.to(batch.device)
    return places


def noise_of(rows: Tensor, columns: Tensor, seed: int) -> Tensor:
    """Whole numbers from 0 to 2^32 - 1 that look random, one for each pair, whichever others are asked for with it."""
    mixed = (rows * 0x9E3779B1 + columns * 0x85EBCA77 + seed * 0xC2B2AE3D) & _WORD
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):  # products stay below 2^63
        mixed = ((mixed ^ (mixed >> shift)) * factor) & _WORD
    return mixed ^ (mixed >> 15)
