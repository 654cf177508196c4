"""Attention rollout and flow to the image (Abnar and Zuidema, ACL 2020, arXiv 2005.00928), against boxes and raw attention."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor

from probes.image_means import Images
from probes.outlier_places import Box, boxes_of, covered
from probes.rollout import attention_flow, inside_share, rollout, turned, uniform_causal
from probes.rollout_causal import rollout_targets
from probes.rollout_tables import METHODS, Places, depth_table, rollout_summary, share_table
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import Anatomy, Batch
from slitlamp.models.patches import Patches
from slitlamp.tracing import CausalTarget, GatheringProbe, ProbeResult, Site, Trace
from slitlamp.tracing.probe import Array, Labels
from slitlamp.tracing.sites import attention, vision_attention

NAMED = ("object", "hallucinated")
ANSWERS = ("correct", "wrong")
_VISION = "rollout_vision"


@dataclass
class AttentionRollout(GatheringProbe):
    """Where attention leads when it is followed through all layers: to the image or not, and to the object or not.

    Rollout multiplies (A + I) / 2 over the layers, A the mean over heads; flow is the largest flow on the same graph. Both
    are followed from the last prompt token and from the tokens that predict objects, down to the image tokens; in the vision
    tower from CLS to the patches. The share that falls inside of the object's box stands beside the box's share of the
    image (chance), the share in the same box turned by 180 degrees (attention has favourite places), the rollout of uniform
    causal attention (early tokens gain from the product alone), and raw attention.

    Boxes are taken for those of the first image, which its grids of patches cover whole; what falls on other tokens (other
    images, ends of rows) is left out of the shares inside and outside of them. Of the last prompt token of a
    caption, and of CLS, they are those of all objects that the caption names truly.

    It records the attention of every position to every position, averaged over heads: 4 bytes x layers x positions^2 for each
    row of a batch, 500 MB for 8 rows of 700 positions through 32 layers.

    Attributes:
        max_positions: rows with more are refused. The recordings of the batch have been made by then: with long prompts,
            measure few rows at a time.
        flow_share: share of the items for which flow is computed too, chosen by their ids; a flow takes about 5 ms at 100
            positions and grows with their square, for every image token and every place it is followed from.
        max_flow_positions: rows with more are refused where their flow is asked for.
        vision: whether to roll out the vision tower. All of its layers are multiplied, also those that the language model
            does not read. Rows whose images make several tiles are left out of it.
        top_k: how many image tokens `causal_targets` hides.
        seed, n_resamples: of the bootstrap, over images; the seed also of the random tokens of `causal_targets`.
    """

    max_positions: int = 1024
    flow_share: float = 0.0
    max_flow_positions: int = 256
    vision: bool = True
    top_k: int = 10
    seed: int = 0
    n_resamples: int = 2000
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "attention_rollout"
    targets_of: ClassVar[Literal["model", "items"]] = "items"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The whole attention of every layer, averaged over heads; with `vision` the tower's too."""
        if not 0 <= self.flow_share <= 1:
            raise InputError(f"flow_share is a share from 0 to 1, found {self.flow_share!r}")
        if min(self.max_positions, self.max_flow_positions, self.top_k) < 1:
            raise InputError("max_positions, max_flow_positions and top_k must be at least 1")
        if len(anatomy.layers("attention")) < anatomy.n_layers:
            raise UnsupportedError(
                f"attention cannot be rolled out in {anatomy.family.name}: some of its layers have no self-attention, so there "
                "is no one matrix per layer to multiply"
            )
        found = [attention(queries="all", keys="all", reduce_heads="mean", label="rollout")]
        if self.vision:
            found.append(vision_attention(queries="all", keys="all", reduce_heads="mean", label=_VISION))
        return found

    # -- taking in ----------------------------------------------------------------------------------------------------

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch; `labels` say where objects are named, and where they are in the image."""
        if not batch.has_images:
            rows = [batch.ids[row] for row, some in enumerate(batch.image_mask.any(dim=1).tolist()) if not some]
            raise InputError(f"rollout to the image needs an image in every row; none in: {', '.join(rows[:5])}")
        for row, length in enumerate(batch.lengths):
            if length > self.max_positions:
                raise InputError(
                    f"{batch.ids[row]} has {length} positions, more than max_positions ({self.max_positions}); a rollout takes "
                    "4 bytes x layers x positions^2 per row: raise it where that fits into memory"
                )
        weights = trace["rollout"]
        self._constants(layer=np.array(weights.layers))
        tiles = np.cumsum([0, *batch.tiles])
        for row, length in enumerate(batch.lengths):
            matrices = torch.stack([weights[layer][row, :length, :length].float().cpu() for layer in weights.layers])
            table = labels[row] if labels is not None else None
            self._add_row(batch, row, matrices, table)
            if self.vision and batch.tiles[row] == 1:
                tower = trace[_VISION]
                keys = int(tower.mask[tiles[row]].sum())
                own = torch.stack([tower[one][tiles[row], :keys, :keys].float().cpu() for one in tower.layers])
                self._add_vision(batch, row, own, table, has_cls=trace.source is None or trace.source.anatomy.has_cls)

    def _add_row(self, batch: Batch, row: int, matrices: Tensor, table: pd.DataFrame | None) -> None:
        """Follow attention [layer, query, key] of one row from each of its places."""
        kinds, tokens, boxes = _places(batch, row, table)
        starts = [batch.prompt_lengths[row] - 1 + token for token in tokens]
        image = torch.nonzero(batch.image_mask[row][batch.real_mask[row]].cpu())[:, 0]
        followed = rollout(matrices, starts)[..., image]  # [layer, start, image token]
        raw = matrices[:, starts][..., image]
        control = rollout(uniform_causal(len(matrices), matrices.shape[1]), starts)[-1][..., image]
        flow = torch.full_like(control, torch.nan)
        if self._wants_flow(batch.ids[row]):
            if matrices.shape[1] > self.max_flow_positions:
                raise InputError(
                    f"the flow of {batch.ids[row]} would run over {matrices.shape[1]} positions, more than max_flow_positions "
                    f"({self.max_flow_positions})"
                )
            found = [attention_flow(matrices.numpy(), start, image.tolist()) for start in starts]
            flow = torch.as_tensor(np.stack(found), dtype=torch.float32)
        maps = torch.stack(
            [followed[-1], raw.mean(dim=0), raw[-1], control, flow], dim=1
        ).numpy()  # [start, method, token]
        heaviest = np.full(self.top_k, -1)  # rows of fewer image tokens are filled up
        order = np.argsort(-maps[0, 0], kind="stable")[: self.top_k]
        heaviest[: len(order)] = order
        self._rows(item=np.array([batch.ids[row]]), top=heaviest[None], n_image=np.array([len(image)]))
        patches = batch.patches[row]
        seen = (patches.on_image & (patches.image == 0)).numpy()  # tokens that stand for a place on the first image
        shares = [_covered(patches, one) for one in boxes]
        against = [_covered(patches, turned(one)) for one in boxes]
        count = len(starts)
        self._rows(
            place_group=np.full(count, batch.groups[row]),
            place_kind=np.array(kinds, dtype="<U20"),
            place_token=np.array(tokens, dtype=np.int64),
            image=np.where(np.isnan(maps).any(axis=-1), np.nan, maps.sum(axis=-1)),
            inside=_inside(maps[..., seen], shares),
            opposite=_inside(maps[..., seen], against),
            area=np.array([_area(one) for one in shares]),
            agreement=np.array([_correlation(one[0], one[1]) for one in maps]),
            depth_image=followed.sum(dim=-1).T.numpy(),
            depth_inside=_inside(followed.transpose(0, 1).numpy()[..., seen], shares),
            raw_image=raw.sum(dim=-1).T.numpy(),
            raw_inside=_inside(raw.transpose(0, 1).numpy()[..., seen], shares),
        )

    def _wants_flow(self, item: str) -> bool:
        return zlib.crc32(item.encode()) < self.flow_share * 2**32

    def _add_vision(
        self, batch: Batch, row: int, matrices: Tensor, table: pd.DataFrame | None, *, has_cls: bool
    ) -> None:
        """Follow attention of the tower from CLS, or from all patches on average where there is no CLS."""
        patches = list(range(1, matrices.shape[1])) if has_cls else list(range(matrices.shape[1]))
        starts = [0] if has_cls else patches
        followed = rollout(matrices, starts)[-1].mean(dim=0)[patches]
        raw = matrices[:, starts].mean(dim=1)[:, patches]
        maps = torch.stack([followed, raw.mean(dim=0), raw[-1]]).numpy()[None]
        boxes = _named_boxes(table)
        shares = [_covered_by_tower(batch.patches[row], boxes, len(patches))]
        against = [_covered_by_tower(batch.patches[row], turned(boxes), len(patches))]
        self._rows(
            vision_group=np.array([batch.groups[row]]),
            vision_image=maps.sum(axis=-1),
            vision_inside=_inside(maps, shares),
            vision_opposite=_inside(maps, against),
            vision_area=np.array([_area(one) for one in shares]),
            vision_agreement=np.array([_correlation(maps[0, 0], maps[0, 1])]),
        )
        self._constants(vision_start=np.array("CLS" if has_cls else "mean of the patches"))

    # -- results ------------------------------------------------------------------------------------------------------

    def result(self) -> ProbeResult:
        """Tables `shares` (every method and place), `depths` (after every number of layers) and `vision` (the tower)."""
        own = Places(
            images=Images(self._get("place_group"), self.n_resamples, self.seed),
            kind=self._get("place_kind"),
            image=self._get("image"),
            inside=self._get("inside"),
            opposite=self._get("opposite"),
            area=self._get("area"),
            agreement=self._get("agreement"),
        )
        depths = {
            "rollout": (self._get("depth_image"), self._get("depth_inside")),
            "attention": (self._get("raw_image"), self._get("raw_inside")),
        }
        tables = {
            "shares": share_table(own, METHODS),
            "depths": depth_table(own, depths, self._get("layer")),
        }
        if self._has("vision_group"):
            group = self._get("vision_group")
            tower = Places(
                images=Images(group, self.n_resamples, self.seed),
                kind=np.full(len(group), str(self._get("vision_start"))),
                image=self._get("vision_image"),
                inside=self._get("vision_inside"),
                opposite=self._get("vision_opposite"),
                area=self._get("vision_area"),
                agreement=self._get("vision_agreement"),
            )
            tables["vision"] = share_table(tower, METHODS[:3])
        return ProbeResult(name=self.name, tables=tables, summary=rollout_summary(tables))

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        """The `top_k` image tokens to which rollout leads from the last prompt token, hidden; see `rollout_targets`.

        Of items whose image has fewer than two tokens nothing is hidden.
        """
        items, sizes = self._get("item").tolist(), self._get("n_image").tolist()
        top = {item: row[row >= 0][: size // 2] for item, row, size in zip(items, self._get("top"), sizes, strict=True)}
        return rollout_targets(top, dict(zip(items, sizes, strict=True)), anatomy.n_layers, self.seed)


def _places(batch: Batch, row: int, table: pd.DataFrame | None) -> tuple[list[str], list[int], list[list[Box]]]:
    """What attention is followed from: kinds, the generated tokens predicted there, and the boxes that belong to each."""
    kinds, tokens, boxes = ["last prompt token"], [0], [_named_boxes(table)]
    if table is None:
        return kinds, tokens, boxes
    for number, one in enumerate(table.to_dict("records")):
        label, token = str(one["label"]), int(one["token"])
        own = boxes_of(table.iloc[[number]])
        if token >= batch.n_generated[row]:
            continue
        if label in ANSWERS:  # the answer is predicted by the last prompt token itself
            kinds[0], boxes[0] = f"answer, truly {one.get('truth') or 'unknown'}", own
        elif label in NAMED:
            kinds.append(label)
            tokens.append(token)
            boxes.append(own if label == "object" else [])
    return kinds, tokens, boxes


def _named_boxes(table: pd.DataFrame | None) -> list[Box]:
    """The boxes of all objects that are named truly."""
    return [] if table is None else boxes_of(table[table["label"].isin(["object", *ANSWERS])])


def _covered(patches: Patches, boxes: Sequence[Box]) -> Array | None:
    """Per token that stands for a place on the first image, the share of its patch inside of the boxes.

    None without boxes, or where no token stands for a place (the queries of a Q-Former).
    """
    on_image = patches.on_image & (patches.image == 0)
    if not len(boxes) or not bool(on_image.any()):
        return None
    shares = np.zeros(len(patches))
    for (image, view), (rows, columns) in patches.grids.items():
        if image == 0:
            chosen = (on_image & (patches.view == view)).numpy()
            shares[chosen] = covered(boxes, (rows, columns))[patches.row[chosen], patches.column[chosen]].numpy()
    return shares[on_image.numpy()]


def _covered_by_tower(patches: Patches, boxes: Sequence[Box], n_patches: int) -> Array | None:
    """The same for the patches of the tower, in raster order: several of them may make one image token."""
    if not len(boxes):
        return None
    rows, columns = patches.grids.get((0, 0), (0, 0))
    scale = round((n_patches / max(1, rows * columns)) ** 0.5)
    if rows * columns * scale**2 != n_patches:
        return None
    return covered(boxes, (rows * scale, columns * scale)).double().numpy().ravel()


def _inside(maps: Array, covered: Sequence[Array | None]) -> Array:
    """Per start and map, the share inside: maps [start, ..., patch] to [start, ...], NaN without boxes."""
    nothing = np.full(maps.shape[1:-1], np.nan)
    return np.stack([nothing if c is None else inside_share(one, c) for one, c in zip(maps, covered, strict=True)])


def _area(covered: Array | None) -> float:
    return float("nan") if covered is None else float(covered.mean())


def _correlation(one: Array, other: Array) -> float:
    """Rank correlation over image tokens; NaN where one of them is constant."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(spearmanr(one, other).statistic)
