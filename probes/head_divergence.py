"""VHD and T-VHD: which heads react to the image, and how much each word does (Liu et al., ACL 2025, arXiv 2412.13949)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from probes.vision_heads import choose_heads, head_divergence, text_activation, zero_surging_heads
from slitlamp.decoding.views import ImageFree, check_image_free, image_free
from slitlamp.errors import InputError
from slitlamp.evaluation.detection import auroc_interval
from slitlamp.evaluation.statistics import Interval, cluster_bootstrap, ratio
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import Edit, GatheringProbe, ProbeResult, Site, Trace, View
from slitlamp.tracing.probe import Array, Labels
from slitlamp.tracing.sites import z

OBJECT, HALLUCINATED, OTHER, UNKNOWN = "object", "hallucinated", "other", ""


@dataclass
class HeadDivergence(GatheringProbe):
    """Vision-aware head divergence (VHD) of every head, and its sum per generated token (T-VHD).

    VHD is the distance of a head's output (before the output projection) with the image from its output without it, at the
    position that predicts a token (Eq. 3). T-VHD of a token sums, over the layers, the VHD of the `top_k` most divergent
    heads of each layer (Eq. 4). Both runs are given the same generated tokens.

    Give it batches with a continuation (`Generation.teacher_forced()`); a batch without one is measured at its last prompt
    position only, which predicts the first token.

    Attributes:
        contrast: how the image is removed: "deleted" (the paper's), "zero", "mean" or "noise"; see
            `slitlamp.decoding.views.image_free`.
        top_k: the numbers of heads per layer that T-VHD sums; not stated in the paper [?], so several are given. Those above
            the model's number of heads are dropped.
        layers: 0-based; None for all.
        ddof: of the standard deviations of the outlier rule, which decides the `selected` column.
        seed: of the noise image and the bootstrap.
        n_resamples: of the bootstrap, over items.
    """

    contrast: ImageFree = "deleted"
    top_k: Sequence[int] = (1, 2, 4, 8, 16)
    layers: Sequence[int] | None = None
    ddof: int = 0
    seed: int = 0
    n_resamples: int = 2000
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "head_divergence"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """Head outputs at the positions that predict generated tokens."""
        check_image_free(self.contrast)
        if not self.top_k or min(self.top_k) < 1:
            raise InputError(f"top_k must hold numbers of heads from 1, found {list(self.top_k)}")
        return [z(layers=self.layers, positions="before_generated")]

    def views(self, anatomy: Anatomy) -> dict[str, View]:
        """The batch without its images."""

        def without_image(batch: Batch, trace: Trace) -> tuple[Batch, list[Edit]]:
            return image_free(batch, self.contrast, self.seed)

        return {"image_free": View(without_image)}

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch; `labels` say of generated tokens whether they name a true or a hallucinated object."""
        seen = trace["z"].stack()  # [layer, batch, position, head, d_head]
        free = trace.views["image_free"]["z"].stack()
        divergence = head_divergence(seen, free).permute(1, 2, 0, 3)  # [batch, position, layer, head]
        first_activation = text_activation(free[:, :, 0]).permute(1, 0, 2)  # [batch, layer, head]
        first = divergence[:, 0]
        selected = choose_heads(zero_surging_heads(first, first_activation, ddof=self.ddof).flatten(0, 1), "divergent")
        self._constants(layer=np.array(trace["z"].layers))
        self._rows(
            item=np.array(batch.ids, dtype=str),
            first=first.cpu().numpy(),
            selected=selected.view(first.shape).cpu().numpy(),
        )
        per_layer = (
            divergence.sort(dim=-1, descending=True).values.cumsum(dim=-1).sum(dim=2)
        )  # [batch, position, k - 1]
        for row, (name, count) in enumerate(zip(batch.ids, batch.n_generated, strict=True)):
            if count:
                self._add_tokens(name, per_layer[row, :count], divergence[row, :count], labels[row] if labels else None)

    def _add_tokens(
        self, item: str, per_layer: torch.Tensor, divergence: torch.Tensor, table: pd.DataFrame | None
    ) -> None:
        count = len(per_layer)
        label, word = np.full(count, UNKNOWN, dtype="<U12"), np.full(count, "", dtype="<U40")
        if table is not None:
            place = table["token"].to_numpy()
            label[place], word[place] = table["label"].to_numpy(dtype=str), table["word"].to_numpy(dtype=str)
        kept = [min(k, per_layer.shape[-1]) - 1 for k in self.top_k]
        named = np.isin(label, (OBJECT, HALLUCINATED))
        self._rows(
            token_item=np.full(count, item),
            token=np.arange(count),
            token_label=label,
            token_word=word,
            t_vhd=per_layer[:, kept].cpu().numpy(),
            object_item=np.full(int(named.sum()), item),
            object_map=divergence[torch.from_numpy(named)].cpu().numpy(),
        )

    def result(self) -> ProbeResult:
        """Tables `heads`, `t_vhd`, `t_vhd_auroc`, `tokens` and `consistency`."""
        tables = {"heads": self._heads(), "consistency": self._consistency()}
        if self._has("t_vhd"):
            tables["tokens"] = self._tokens()
            tables["t_vhd"], tables["t_vhd_auroc"] = self._by_label(tables["tokens"])
        return ProbeResult(name=self.name, tables=tables, summary=_summary(tables))

    def _heads(self) -> pd.DataFrame:
        """One row per head: mean VHD at the first generated token over items, its interval, and how often it is selected."""
        first, layers = self._get("first").astype(np.float64), self._get("layer")
        n_items, n_layers, n_heads = first.shape
        sums = np.hstack([first.reshape(n_items, -1), np.ones((n_items, 1))])
        found = cluster_bootstrap(
            sums, lambda total: ratio(total[..., :-1], total[..., -1:]), n_resamples=self.n_resamples, seed=self.seed
        )
        intervals = found if isinstance(found, list) else [found]
        return pd.DataFrame(
            {
                "layer": np.repeat(layers, n_heads),
                "head": np.tile(np.arange(n_heads), n_layers),
                "vhd": [one.value for one in intervals],
                "low": [one.low for one in intervals],
                "high": [one.high for one in intervals],
                "sd": first.reshape(n_items, -1).std(axis=0, ddof=1) if n_items > 1 else np.nan,
                "selected": self._get("selected").reshape(n_items, -1).mean(axis=0),
                "n_items": n_items,
            }
        )

    def _tokens(self) -> pd.DataFrame:
        """One row per generated token."""
        columns: dict[str, Any] = {
            "item": self._get("token_item"),
            "token": self._get("token"),
            "word": self._get("token_word"),
            "label": self._get("token_label"),
        }
        n_heads = self._get("first").shape[-1]
        for place, k in enumerate(self.top_k):
            if k <= n_heads:
                columns[f"t_vhd_{k}"] = self._get("t_vhd")[:, place].astype(np.float64)
        return pd.DataFrame(columns)

    def _by_label(self, tokens: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Mean T-VHD of each kind of token, and how well low T-VHD tells hallucinated from true objects; bootstrap by item."""
        means, areas = [], []
        for column in [name for name in tokens if str(name).startswith("t_vhd_")]:
            k = int(str(column).removeprefix("t_vhd_"))
            for label, rows in tokens[tokens["label"] != UNKNOWN].groupby("label"):
                sums = rows.groupby("item")[column].agg(["sum", "count"]).to_numpy(dtype=np.float64)
                mean = cluster_bootstrap(
                    sums,
                    lambda total: ratio(total[..., 0], total[..., 1]),
                    n_resamples=self.n_resamples,
                    seed=self.seed,
                )
                assert isinstance(mean, Interval)
                means.append((k, label, mean.value, mean.low, mean.high, len(rows), len(sums)))
            named = tokens[tokens["label"].isin([OBJECT, HALLUCINATED])]
            if len(named):
                area = auroc_interval(
                    -named[column].to_numpy(),
                    (named["label"] == HALLUCINATED).to_numpy(),
                    named["item"].to_numpy(dtype=str),
                    n_resamples=self.n_resamples,
                    seed=self.seed,
                )
                n_bad = int((named["label"] == HALLUCINATED).sum())
                areas.append((k, area.value, area.low, area.high, n_bad, len(named) - n_bad, area.n))
        return (
            pd.DataFrame(means, columns=["k", "label", "mean", "low", "high", "n_tokens", "n_items"]),
            pd.DataFrame(areas, columns=["k", "auroc", "low", "high", "n_hallucinated", "n_true", "n_items"]),
        )

    def _consistency(self) -> pd.DataFrame:
        """Rank correlation of the heads' VHD between items, between object mentions, and between the two measuring points."""
        found = [("first token, between items", *_mean_rank_correlation(self._get("first")))]
        maps = self._get("object_map") if self._has("object_map") else ()
        if len(maps):
            found.append(("object mentions, between mentions", *_mean_rank_correlation(maps)))
            points = np.stack([self._get("first").mean(axis=0), maps.mean(axis=0)])
            found.append(("mean maps: first token against object mentions", *_mean_rank_correlation(points)))
        return pd.DataFrame(found, columns=["comparison", "spearman", "n_maps"])


def _mean_rank_correlation(maps: Array) -> tuple[float, int]:
    """Mean Spearman correlation over all pairs of maps [map, layer, head], from their standardised ranks (no pair is formed)."""
    count = len(maps)
    if count < 2:
        return float("nan"), count
    ranks = rankdata(maps.reshape(count, -1).astype(np.float64), axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1, keepdims=True)
    if (norms == 0).any():
        return float("nan"), count
    unit = ranks / norms
    total = np.square(unit.sum(axis=0)).sum()  # the sum over all ordered pairs, each with itself included
    return float((total - count) / (count * (count - 1))), count


def _summary(tables: dict[str, pd.DataFrame]) -> str:
    heads = tables["heads"]
    top = heads.loc[heads["vhd"].idxmax()]
    median = heads["vhd"].median()
    times = f", {top['vhd'] / median:.1f} times the median head" if median > 0 else ""
    text = (
        f"The most divergent head is {int(top['layer'])}.{int(top['head'])}: VHD {top['vhd']:.2f} [{top['low']:.2f}, "
        f"{top['high']:.2f}]{times} (n = {int(top['n_items'])})."
        if top["vhd"] > 0
        else f"No head's output depends on the image (n = {int(top['n_items'])})."
    )
    areas = tables.get("t_vhd_auroc")
    if areas is not None and areas["auroc"].notna().any():
        best = areas.loc[areas["auroc"].idxmax()]
        text += (
            f" Low T-VHD tells hallucinated from true objects with AUROC {best['auroc']:.2f} [{best['low']:.2f}, "
            f"{best['high']:.2f}] (k = {int(best['k'])})."
        )
    return text
