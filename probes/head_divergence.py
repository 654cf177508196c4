"""VHD and T-VHD: which heads react to the image, and how much each word does (Liu et al., ACL 2025, arXiv 2412.13949)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probes.head_ablation import head_targets
from probes.head_consistency import compare_points, consistency_tables
from probes.head_contrasts import contrast_tables, head_means, outlier_table
from probes.head_prior import COLUMNS as PRIOR
from probes.head_prior import prior_tables, prior_values
from probes.head_summary import summary
from probes.head_tokens import (
    HALLUCINATED,
    OBJECT,
    UNKNOWN,
    Bootstrap,
    areas,
    check_sentence_means,
    means_by_label,
    sentences,
    with_mention,
)
from probes.vision_heads import choose_heads, head_divergence, surging, text_activation, zero_surging_heads
from slitlamp.decoding.views import ImageFree, check_image_free, image_free
from slitlamp.errors import InputError
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import Edit, GatheringProbe, Probe, ProbeResult, Site, Trace, View
from slitlamp.tracing.probe import Array, CausalTarget, Labels, Part
from slitlamp.tracing.sites import logits, z

ANSWERS = ("correct", "wrong")


@dataclass
class HeadDivergence(GatheringProbe):
    """Vision-aware head divergence (VHD) of every head, and its sum per generated token (T-VHD).

    VHD is the distance of a head's output (before the output projection) with the image from its output without it, at the
    position that predicts a token (Eq. 3). T-VHD of a token sums, over the layers, the VHD of the `top_k` most divergent
    heads of each layer (Eq. 4). Both runs are given the same generated tokens.

    Give it batches with a continuation (`Generation.teacher_forced()`); a batch without one is measured at its last prompt
    position only, which predicts the first token. Intervals are over the batch's groups (images).

    Attributes:
        contrast: how the image is removed: "deleted" (the paper's), "zero", "mean", "noise" or another way of
            `slitlamp.decoding.views.image_free`.
        contrasts: other ways of removing it to compare with `contrast`, at the first token.
        top_k: the numbers of heads per layer that T-VHD sums; not stated in the paper [?], so several are given. Those above
            the model's number of heads are dropped.
        top_heads: how many heads of the whole model count as the most vision-aware ones, where sets of heads are compared
            and ablated; None for an eighth of them, at least one [?].
        layers: 0-based; None for all.
        ddof: of the standard deviations of the outlier rule, which decides the `selected` column.
        language_prior: whether to compare the predictions with and without the image too (figure 1). It records the logits
            of every generated token in both runs: 4 bytes x vocabulary x tokens x rows, twice.
        sentence_means: over which tokens of a sentence T-VHD is averaged: "tokens" (all) and "objects" (the first tokens of
            its objects); the paper does not say [?].
        sentence_ends: characters that end a sentence.
        seed: of the noise image, the bootstrap and the random heads of `causal_targets`.
        n_resamples: of the bootstrap, over items.
    """

    contrast: ImageFree = "deleted"
    contrasts: Sequence[ImageFree] = ()
    top_k: Sequence[int] = (1, 2, 4, 8, 16)
    top_heads: int | None = None
    layers: Sequence[int] | None = None
    ddof: int = 0
    language_prior: bool = False
    sentence_means: Sequence[str] = ("tokens", "objects")
    sentence_ends: str = ".!?"
    seed: int = 0
    n_resamples: int = 2000
    _gathered: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    name: ClassVar[str] = "head_divergence"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """Head outputs, and with `language_prior` logits, at the positions that predict generated tokens."""
        for how in (self.contrast, *self.contrasts):
            check_image_free(how)
        check_sentence_means(self.sentence_means)
        if not self.top_k or min(self.top_k) < 1:
            raise InputError(f"top_k must hold numbers of heads from 1, found {list(self.top_k)}")
        if self.top_heads is not None and self.top_heads < 1:
            raise InputError(f"top_heads must be a number of heads from 1, found {self.top_heads}")
        if min(self.top_k) > anatomy.n_heads:
            raise InputError(
                f"top_k must hold a number of heads up to the model's {anatomy.n_heads}, found {list(self.top_k)}"
            )
        heads = [z(layers=self.layers, positions="before_generated")]
        return [*heads, logits(positions="before_generated")] if self.language_prior else heads

    def views(self, anatomy: Anatomy) -> dict[str, View]:
        """The batch without its images, in the ways of `contrast` and `contrasts`."""
        heads = [z(layers=self.layers, positions="before_generated")]
        others = {_view(how): self._view(how, heads) for how in self._others}
        return {"image_free": self._view(self.contrast), **others}

    def _view(self, how: ImageFree, sites: Sequence[Site] | None = None) -> View:
        def without_image(batch: Batch, trace: Trace) -> tuple[Batch, list[Edit]]:
            return image_free(batch, how, self.seed)

        return View(without_image, sites)

    @property
    def _others(self) -> tuple[ImageFree, ...]:
        return tuple(dict.fromkeys(how for how in self.contrasts if how != self.contrast))

    @property
    def _bootstrap(self) -> Bootstrap:
        return Bootstrap(self.n_resamples, self.seed)

    # -- taking in ----------------------------------------------------------------------------------------------------

    def update(self, batch: Batch, trace: Trace, labels: Labels | None = None) -> None:
        """Take in one batch; `labels` say of generated tokens whether they name a true or a hallucinated object."""
        seen = trace["z"].stack()  # [layer, batch, position, head, d_head]
        free = trace.views["image_free"]["z"].stack()
        divergence = head_divergence(seen, free).permute(1, 2, 0, 3)  # [batch, position, layer, head]
        self._constants(layer=np.array(trace["z"].layers))
        self._add_items(batch, seen[:, :, 0], [free, *(trace.views[_view(how)]["z"].stack() for how in self._others)])
        real = trace.mask("z").to(seen.device)
        sums = seen.double().mul_(real[None, :, :, None, None]).sum(dim=(1, 2))
        self._sums(z=sums.cpu().numpy(), z_count=np.array(int(real.sum())))
        per_layer = (
            divergence.sort(dim=-1, descending=True).values.cumsum(dim=-1).sum(dim=2)
        )  # [batch, position, k - 1]
        for row, count in enumerate(batch.n_generated):
            if count:
                table = labels[row] if labels else None
                self._add_tokens(batch, row, per_layer[row, :count], divergence[row, :count], table)
                if self.language_prior:
                    emitted = batch.input_ids[row, batch.length - count :]
                    own, without = (one["logits"][0][row, :count] for one in (trace, trace.views["image_free"]))
                    found = prior_values(own, without, emitted)
                    self._rows(**{f"prior_{name}": value.cpu().numpy() for name, value in found.items()})

    def _add_items(self, batch: Batch, seen: Tensor, free: Sequence[Tensor]) -> None:
        """What the first token says: `seen` [layer, batch, head, d_head], `free` [layer, batch, position, head, d_head]."""
        maps, selected, counts = [], [], []
        for without in free:
            vhd = head_divergence(seen, without[:, :, 0]).permute(1, 0, 2)  # [batch, layer, head]
            activation = text_activation(without[:, :, 0]).permute(1, 0, 2)
            kept = zero_surging_heads(vhd, activation, ddof=self.ddof)
            high = [surging(values, ddof=self.ddof) for values in (vhd, activation)]
            maps.append(vhd)
            selected.append(choose_heads(kept.flatten(0, 1), "divergent").view(vhd.shape))
            counts.append(torch.stack([each.sum(dim=-1) for each in (high[0] & high[1], *high)], dim=-1))
        self._rows(
            item=np.array(batch.ids, dtype=str),
            group=np.array(batch.groups, dtype=str),
            first=torch.stack(maps, dim=1).cpu().numpy(),  # [item, contrast, layer, head]
            selected=torch.stack(selected, dim=1).cpu().numpy(),
            outliers=torch.stack(counts, dim=1).cpu().numpy(),  # [item, contrast, layer, 3]
        )

    def _add_tokens(
        self, batch: Batch, row: int, per_layer: Tensor, divergence: Tensor, table: pd.DataFrame | None
    ) -> None:
        count = len(per_layer)
        label, word = np.full(count, UNKNOWN, dtype="<U12"), np.full(count, "", dtype="<U40")
        if table is not None:
            place = table["token"].to_numpy()
            label[place], word[place] = table["label"].to_numpy(dtype=str), table["word"].to_numpy(dtype=str)
        kept = [min(k, per_layer.shape[-1]) - 1 for k in self.top_k]
        named = np.isin(label, (OBJECT, HALLUCINATED))
        n_named = int(named.sum())
        self._rows(
            token_item=np.full(count, batch.ids[row]),
            token_group=np.full(count, batch.groups[row]),
            token=np.arange(count),
            token_label=label,
            token_word=word,
            t_vhd=per_layer[:, kept].cpu().numpy(),
            object_group=np.full(n_named, batch.groups[row]),
            object_index=np.arange(1, n_named + 1),
            object_map=divergence[torch.from_numpy(named).to(divergence.device)].cpu().numpy(),
        )

    # -- results ------------------------------------------------------------------------------------------------------

    def result(self) -> ProbeResult:
        """The tables of what was taken in.

        `heads`, `outliers`, `consistency`, `consistency_steps`; with other contrasts `contrasts` and `contrast_maps`; with
        generated tokens `tokens`, `t_vhd`, `t_vhd_auroc`, `sentences`, `sentence_means`, `sentence_auroc`, `prior` and
        `prior_place`. A table without a row is left out.
        """
        first, groups, layers = self._get("first"), self._get("group"), self._get("layer")
        tables = {"heads": self._heads()}
        contrasts = [self.contrast, *self._others]
        tables["outliers"] = outlier_table(
            contrasts, self._get("outliers"), layers, groups, first.shape[-1], self._bootstrap
        )
        tables |= consistency_tables(*self._points(), k=self._k(), bootstrap=self._bootstrap)
        if len(contrasts) > 1:
            tables |= contrast_tables(
                contrasts, first, self._get("selected"), layers, groups, k=self._k(), bootstrap=self._bootstrap
            )
        if self._has("t_vhd"):
            tables |= self._token_tables()
        return ProbeResult(
            name=self.name,
            tables={name: table for name, table in tables.items() if len(table)},
            summary=summary(tables, self.contrast),
        )

    def _k(self) -> int:
        n_heads = int(np.prod(self._get("first").shape[-2:]))
        return min(n_heads, max(1, n_heads // 8) if self.top_heads is None else self.top_heads)

    def _points(self) -> tuple[Array, Array, Array, Array, Array]:
        """Maps at the first token and their items; maps at object mentions, their items, and which mention each is."""
        first, groups = self._get("first")[:, 0], self._get("group")
        if not self._has("object_map"):
            return first, groups, first[:0], groups[:0], np.zeros(0, dtype=np.int64)
        return first, groups, self._get("object_map"), self._get("object_group"), self._get("object_index")

    def _heads(self) -> pd.DataFrame:
        """One row per head: mean VHD at the first generated token over items, its interval, and how often it is selected."""
        first = self._get("first")[:, 0]
        frame = head_means(first, self._get("layer"), self._get("group"), self._bootstrap)
        frame.insert(0, "contrast", self.contrast)
        values = first.reshape(len(first), -1).astype(np.float64)
        frame.insert(6, "sd", values.std(axis=0, ddof=1) if len(first) > 1 else np.nan)
        frame.insert(7, "selected", self._get("selected")[:, 0].reshape(len(first), -1).mean(axis=0))
        return frame

    def _tokens(self) -> pd.DataFrame:
        """One row per generated token."""
        columns: dict[str, Any] = {
            "item": self._get("token_item"),
            "group": self._get("token_group"),
            "token": self._get("token"),
            "word": self._get("token_word"),
            "label": self._get("token_label"),
        }
        n_heads = self._get("first").shape[-1]
        for place, k in enumerate(self.top_k):
            if k <= n_heads:
                columns[f"t_vhd_{k}"] = self._get("t_vhd")[:, place].astype(np.float64)
        for name in PRIOR if self.language_prior else ():
            columns[name] = self._get(f"prior_{name}")
        return pd.DataFrame(columns)

    def _token_tables(self) -> dict[str, pd.DataFrame]:
        bootstrap, tokens = self._bootstrap, self._tokens()
        whole = sentences(tokens, self.sentence_ends, self.sentence_means)
        of_sentences = {kind: whole[whole["mean_over"] == kind] for kind in self.sentence_means}
        tables = {
            "tokens": tokens,
            "t_vhd": means_by_label(tokens, bootstrap, "tokens"),
            "t_vhd_auroc": areas(with_mention(tokens), bootstrap, "mention"),
            "sentences": whole,
        }
        for name, make, extra in (
            ("sentence_means", means_by_label, "sentences"),
            ("sentence_auroc", areas, "sentence"),
        ):
            found = [make(rows, bootstrap, extra) for rows in of_sentences.values()]
            for kind, one in zip(of_sentences, found, strict=True):
                one.insert(0, "mean_over", kind)
            full = [one for one in found if len(one)]
            tables[name] = pd.concat(full, ignore_index=True) if full else pd.DataFrame()
        return {**tables, **prior_tables(tokens, bootstrap)} if self.language_prior else tables

    def causal_targets(self, anatomy: Anatomy) -> list[CausalTarget]:
        """The `top_heads` most divergent heads, at the first token and at object mentions, zeroed and set to their means."""
        first, _, maps, _, _ = self._points()
        means = self._get("z") / self._get("z_count")
        points = {"the first token": first} | ({"object mentions": maps} if len(maps) else {})
        return [
            target
            for where, measured in points.items()
            for target in head_targets(
                measured.mean(axis=0, dtype=np.float64),
                self._get("layer"),
                means,
                k=self._k(),
                n_layers=anatomy.n_layers,
                seed=self.seed,
                where=where,
            )
        ]

    @classmethod
    def compare(cls, parts: Mapping[Part, Probe], scores: pd.DataFrame | None = None) -> ProbeResult | None:
        """Whether heads are the same at other measuring points, data sets, conditions and models: table `points`."""
        probes = {
            part: probe for part, probe in parts.items() if isinstance(probe, HeadDivergence) and probe._has("first")
        }
        if len(probes) < 2:
            return None
        points = {}
        for part, probe in probes.items():
            first, groups, maps, map_groups, _ = probe._points()
            asked = probe._has("token_label") and np.isin(probe._get("token_label"), ANSWERS).any()
            points[part, "answer" if asked else "first token"] = first, groups
            if len(maps):
                points[part, "object mentions"] = maps, map_groups
        one = next(iter(probes.values()))
        return compare_points(cls.name, points, k=one._k(), bootstrap=one._bootstrap)


def _view(how: str) -> str:
    return f"image_free_{how}"
