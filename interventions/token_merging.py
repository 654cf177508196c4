"""Image tokens of little importance merged by likeness, inspired by VMTC ("Reducing image redundancy"; no code was published)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from interventions.cls_pruning import ClsPruning, Encoder
from interventions.ranked_tokens import best, check_share, count_kept
from slitlamp.decoding.intervention import Intervention, RunContext
from slitlamp.decoding.visual_tokens import ImageTokens, VisualTokenEdit
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy

Select = Literal["importance", "random"]


@dataclass
class TokenMerging(VisualTokenEdit):
    """The most important image tokens are kept; the others are gathered into clusters, and each cluster becomes one token.

    Importance is the CLS attention of `ClsPruning` with its defaults. Clusters are those of k-means on the states at the input of
    the language model, each divided by its length (so that closeness is cosine similarity). A merged token is the mean of its
    cluster weighted by importance, and stands where its most important member stood. Tokens that stand for no patch are kept
    as they are.

    Attributes:
        keep: how many tokens are left, as a share, rounded down; 1 keeps all as they are.
        primary: which share of those is kept unmerged [?]; the others are clusters.
        encoder_attention: as in `ClsPruning`.
        select: which tokens are primary and what weighs in the means: "importance" (the method), or its control "random": random
            tokens, plain means.
        seed: of k-means and of random tokens.
        positions: see `VisualTokenEdit`.
    """

    keep: float = 0.25
    primary: float = 0.5
    encoder_attention: Encoder = "cls"
    select: Select = "importance"
    seed: int = 0
    clusters_: tuple[Tensor, ...] = field(default=(), init=False, repr=False, compare=False)
    """Of the last run, per row: int64 [token of those given], the place among the tokens left of the one that it went into."""

    name: ClassVar[str] = "TokenMerging"

    def _ranking(self) -> ClsPruning:
        return ClsPruning(encoder_attention=self.encoder_attention)

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters that do not fit the model, and models whose image tokens have no attention to go by."""
        super().check(anatomy)
        check_share("keep", self.keep, self.name)
        if not 0 <= self.primary <= 1:
            raise InputError(f"{self.name}: primary must be from 0 to 1, found {self.primary!r}")
        if self.select not in ("importance", "random"):
            raise unknown(f"{self.name} select", str(self.select), ("importance", "random"))
        self._ranking().check(anatomy)

    def change(self, run: RunContext, tokens: ImageTokens) -> ImageTokens:
        """The primary tokens and the merged ones."""
        numbers, states, clusters = [], [], []
        for scores, number, given in zip(self._ranking().scores(run), tokens.number, tokens.states, strict=True):
            into, weight = self._merged(scores[number], given)
            summed = given.new_zeros(int(into.max()) + 1, given.shape[-1], dtype=torch.float32)
            place, share = into.to(given.device), weight.to(given.device)
            summed.index_add_(0, place, given.float() * share[:, None])
            total = torch.zeros(len(summed), device=given.device).index_add_(0, place, share)
            alone = torch.bincount(into) == 1
            first = [int(members[weight[members].argmax()]) for members in _members(into)]
            order = torch.tensor(first).argsort()
            merged = torch.where(
                alone.to(given.device)[:, None],
                given[torch.tensor(first, device=given.device)],
                (summed / total[:, None]).to(given),
            )
            numbers.append(number[torch.tensor(first)][order])
            states.append(merged[order.to(given.device)])
            clusters.append(order.argsort()[into])
        self.clusters_ = tuple(clusters)
        return ImageTokens(tuple(numbers), tuple(states))

    def _merged(self, importance: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Per token, the cluster that it goes into, and its weight there."""
        ranked = int(importance.isfinite().sum())
        left = count_kept(self.keep, ranked)
        if left == ranked:
            return torch.arange(len(importance)), torch.ones(len(importance))
        n_clusters = max(left - int(self.primary * left), 1)
        select = "most" if self.select == "importance" else "random"
        alone = best(importance, left - n_clusters, select, self.seed)
        into = torch.full((len(importance),), -1)
        into[alone] = torch.arange(int(alone.sum()))
        rest = states[(~alone).to(states.device)].float().cpu()
        unit = torch.nn.functional.normalize(rest, dim=-1).double().numpy()
        found = KMeans(n_clusters, n_init=1, random_state=self.seed).fit_predict(unit)
        _, labels = torch.as_tensor(found).unique(return_inverse=True)  # alike tokens may make fewer clusters
        into[~alone] = labels + int(alone.sum())
        plain = self.select == "random"
        weight = torch.ones_like(importance) if plain else importance.nan_to_num(1.0).clamp(min=1e-12)
        return into, weight

    def controls(self) -> dict[str, Intervention]:
        """Random tokens kept, the others merged by plain means; and as many tokens kept without merging the others."""
        pruned = ClsPruning(self.keep, encoder_attention=self.encoder_attention, positions=self.positions)
        return {"random": replace(self, select="random"), "pruned": pruned}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        which = "most important" if self.select == "importance" else "random"
        where = "" if self.positions == "contiguous" else ", at their original positions"
        return (
            f"image tokens merged to {self.keep:.0%}: the {which} kept ({self.primary:.0%} of those left), the others merged by "
            f"likeness{where}"
        )


def _members(into: Tensor) -> list[Tensor]:
    """Per cluster, int64 [member], the tokens in it."""
    return [(into == cluster).nonzero()[:, 0] for cluster in range(int(into.max()) + 1)]
