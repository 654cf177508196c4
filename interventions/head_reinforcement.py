"""VHR: vision-aware head reinforcement (Liu et al., ACL 2025, arXiv 2412.13949, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from interventions.given_tensors import check_tensor, from_file, name_of
from probes.vision_heads import (
    CHOICES,
    Choice,
    choose_heads,
    default_layers,
    head_divergence,
    text_activation,
    zero_surging_heads,
)
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.decoding.views import ImageFree, check_image_free, image_free
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy
from slitlamp.tracing import Calls, Edit
from slitlamp.tracing.sites import z

Scaled = Literal["all", "last"]


@dataclass
class HeadReinforcement(Intervention):
    """Scale the outputs of the heads that react to the image.

    At the first decoding step, layer by layer upwards with the layers below already reinforced, each head's divergence (VHD)
    between the run with and the run without the image is measured at the last prompt token; the heads above the layer's
    median, after the outlier rule, are scaled by `alpha` at this and every later step. They never change after the first
    step, so the key-value cache stays consistent. The cost is one image-free forward pass per run.

    Attributes:
        alpha: the factor; 1 changes nothing, 2 is the paper's.
        layers: 0-based, negative ones counted from the end; None for the published layers of LLaVA and InstructBLIP at depth
            32 and the last 44 % of the layers elsewhere (`probes.vision_heads.default_layers`).
        select: which heads: "divergent" (the method), or its controls "random" (as many), "least" (as many, the least
            divergent), "all".
        outlier_rule: whether heads that surge when the image is removed are left out.
        ddof: of the outlier rule's standard deviation; not stated in the paper [?].
        contrast: how the image is removed: "deleted" (the paper's), "zero", "mean", "noise" or another way of
            `slitlamp.decoding.views.image_free`.
        reinforce_image_free: whether the image-free run is reinforced in the layers below too; not stated in the paper [?].
            It costs an extra pass with the image.
        prefill: which prompt positions are scaled: "all" (what the cache argument implies) or only the "last" [?].
        seed: of the random heads and of the noise image.
        heads: fixed heads instead of chosen ones, no measuring, no extra pass: (layer, head) pairs, or a safetensors file with a
            tensor `heads` [layer, head], not zero at the chosen ones. Their control "random" is as many of the same layers,
            drawn at random.
    """

    alpha: float = 2.0
    layers: Sequence[int] | None = None
    select: Choice = "divergent"
    outlier_rule: bool = True
    ddof: int = 0
    contrast: ImageFree = "deleted"
    reinforce_image_free: bool = False
    prefill: Scaled = "all"
    seed: int = 0
    heads: Sequence[tuple[int, int]] | Path | str | None = None
    chosen_: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """The heads of the last run: layer -> bool [row, head]."""

    name: ClassVar[str] = "HeadReinforcement"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters that do not fit the model."""
        if not self.alpha >= 0:
            raise InputError(f"{self.name}: alpha must be 0 or more, found {self.alpha!r}")
        if self.select not in CHOICES:
            raise unknown(f"{self.name} choice of heads", str(self.select), CHOICES)
        if self.prefill not in ("all", "last"):
            raise unknown(f"{self.name} prefill", str(self.prefill), ("all", "last"))
        if self.ddof not in (0, 1):
            raise InputError(f"{self.name}: ddof must be 0 or 1, found {self.ddof!r}")
        check_image_free(self.contrast)
        fixed = self._fixed(anatomy)
        if fixed is not None and self.select not in ("divergent", "random"):
            raise InputError(f"{self.name}: fixed heads have no control {self.select!r}; the one they have is 'random'")
        named = self.layers if fixed is None else [layer for layer, _ in fixed]
        for layer in named or ():
            if not (-anatomy.n_layers if fixed is None else 0) <= layer < anatomy.n_layers:
                raise InputError(
                    f"{self.name}: layer {layer!r} is not one of the {anatomy.n_layers} layers, which are numbered from 0, or "
                    "from -1 at the end; name layers that the model has"
                )
        for _, head in fixed or ():
            if not 0 <= head < anatomy.n_heads:
                raise InputError(
                    f"{self.name}: head {head!r} is not one of 0 to {anatomy.n_heads - 1}; name heads that the model has"
                )

    def _fixed(self, anatomy: Anatomy) -> list[tuple[int, int]] | None:
        """The fixed heads as (layer, head) pairs; None where heads are chosen."""
        if self.heads is None:
            return None
        if isinstance(self.heads, str | Path):
            marked = from_file(self.heads, "heads", self.name)[0]
            check_tensor(marked, [anatomy.n_layers, anatomy.n_heads], "[layer, head]", self.name)
            return [(int(layer), int(head)) for layer, head in marked.nonzero().tolist()]
        return [(layer, head) for layer, head in self.heads]

    def _layers(self, anatomy: Anatomy, fixed: Sequence[tuple[int, int]] | None) -> tuple[int, ...]:
        if fixed is not None:
            return tuple(sorted({layer for layer, _ in fixed}))
        if self.layers is not None:
            return tuple(sorted({layer + anatomy.n_layers if layer < 0 else layer for layer in self.layers}))
        return default_layers(anatomy.n_layers, anatomy.family.model_type)

    def controls(self) -> dict[str, Intervention]:
        """The same number of random heads; of the least divergent heads; all heads at the same mean factor.

        Fixed heads have the first alone.
        """
        if self.heads is not None:
            return {"random": replace(self, select="random")}
        return {
            "random": replace(self, select="random"),
            "least": replace(self, select="least"),
            "all": replace(self, select="all", alpha=1 + (self.alpha - 1) / 2),
        }

    def describe(self) -> str:
        """What this does, in a few plain words, with every parameter that is not the default."""
        which = {
            "divergent": "the half of the heads that react most to the image",
            "random": "as many heads drawn at random",
            "least": "as many heads, those that react least to the image",
            "all": "all heads",
        }[self.select]
        if isinstance(self.heads, str | Path):
            which = f"the heads of {name_of(self.heads)}"
        elif self.heads is not None:
            which = f"{len(self.heads)} fixed heads"
        if self.heads is not None and self.select == "random":
            which = f"as many heads, drawn at random, as {which}"
        hidden = ("alpha", "select", *(("heads",) if isinstance(self.heads, str | Path) else ()))
        changed = [
            f"{one.name}={getattr(self, one.name)!r}"
            for one in fields(self)
            if one.init and one.name not in hidden and getattr(self, one.name) != one.default
        ]
        return f"{which} x {self.alpha:g}" + (f" ({', '.join(changed)})" if changed else "")

    def edits(self, run: RunContext) -> list[Edit]:
        """Scale the chosen heads at the input of each layer's output projection."""
        fixed = self._fixed(run.anatomy)
        layers = self._layers(run.anatomy, fixed)
        self.chosen_ = {}
        if fixed is not None:
            for layer in layers:
                heads = [head for other, head in fixed if other == layer]
                if self.select == "random":
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
                    heads = torch.randperm(run.anatomy.n_heads, generator=generator)[: len(heads)].tolist()
                mask = torch.zeros(run.anatomy.n_heads, dtype=torch.bool, device=run.batch.device)
                mask[heads] = True
                self.chosen_[layer] = mask.expand(run.batch.size, -1)
            return [Edit("z", layer, self._scale(layer)) for layer in layers]
        if not run.batch.has_images:
            raise InputError(f"{self.name} needs an image in every row: it compares with the run without the image")
        prompt = run.batch.prompt_only() if any(run.batch.n_generated) else run.batch
        if self.select == "all":  # nothing to measure
            everything = torch.ones(prompt.size, run.anatomy.n_heads, dtype=torch.bool, device=prompt.device)
            self.chosen_ = dict.fromkeys(layers, everything)
            return [Edit("z", layer, self._scale(layer)) for layer in layers]

        free_batch, free_edits = image_free(prompt, self.contrast, self.seed)
        if self.reinforce_image_free:
            self._choose_with_both_reinforced(run, layers)
            return [Edit("z", layer, self._scale(layer)) for layer in layers]
        recorded = run.trace(free_batch, [z(layers=layers, positions="last")], free_edits)
        free = {layer: recorded["z"][layer][:, 0] for layer in layers}
        return [Edit("z", layer, self._scale(layer, free[layer])) for layer in layers]

    def _choose_with_both_reinforced(self, run: RunContext, layers: tuple[int, ...]) -> None:
        """Fix the heads layer by layer, with the layers below reinforced in both runs."""
        prompt = run.batch.prompt_only() if any(run.batch.n_generated) else run.batch
        free_batch, free_edits = image_free(prompt, self.contrast, self.seed)
        for layer in layers:
            below = [Edit("z", one, self._scale(one)) for one in self.chosen_]
            site = [z(layers=[layer], positions="last")]
            with_image = run.trace(prompt, site, below)["z"][layer][:, 0]
            without = run.trace(free_batch, site, [*free_edits, *below])["z"][layer][:, 0]
            self.chosen_[layer] = self._chosen(layer, with_image, without)

    def _chosen(self, layer: int, with_image: Tensor, without: Tensor) -> Tensor:
        divergence = head_divergence(with_image, without)
        if self.outlier_rule:
            divergence = zero_surging_heads(divergence, text_activation(without), ddof=self.ddof)
        return choose_heads(divergence, self.select, seed=self.seed, layer=layer)

    def _scale(self, layer: int, free: Tensor | None = None) -> Callable[[Tensor, Calls], Tensor]:
        """The edit of one layer: [batch, position, head, d_head]; chooses its heads first where `free` is given."""

        def scale(values: Tensor, calls: Calls) -> Tensor:
            if calls.is_prefill and free is not None:
                rows = torch.arange(values.shape[0], device=values.device)
                at_last = values[rows, calls.batch.last_prompt_position.to(values.device)]
                self.chosen_[layer] = self._chosen(layer, at_last, free.to(values.device))
            chosen = self.chosen_[layer].to(values.device)
            factor = torch.where(chosen, self.alpha, 1.0).to(values.dtype)[:, None, :, None]
            if self.prefill == "last" and calls.is_prefill:
                place = torch.arange(values.shape[1], device=values.device)
                scaled = place[None, :] >= calls.batch.last_prompt_position.to(values.device)[:, None]
                factor = torch.where(scaled[:, :, None, None], factor, torch.ones_like(factor))
            return values * factor

        return scale
