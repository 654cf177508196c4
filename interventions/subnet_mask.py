"""Running a model on a subnetwork of its weights (IMA: Shukor and Cord, NeurIPS 2024, arXiv 2405.16700, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from interventions.masked_block import MaskedBlock
from probes.wanda import (
    Matrix,
    keep_masks,
    keep_top,
    load_masks,
    matrices,
    sparsity_of_masks,
    wanda_score,
    weight_of,
)
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import Edit, Site

Rule = Literal["wanda", "magnitude", "random"]
Tokens = Literal["image", "text", "both"]
RULES: dict[str, str] = {
    "wanda": "the weights that {} activate",
    "magnitude": "as many weights, the largest (as many in each row as {} activate)",
    "random": "as many weights drawn at random (as many in each row as {} activate)",
}
TOKENS: dict[str, str] = {"image": "image tokens", "text": "text tokens", "both": "both image and text tokens"}


@dataclass
class SubnetMask(Intervention):
    """Only a subnetwork of the weights of the decoder's blocks counts; the others are 0 for the time of a run.

    The model's weights are not touched: what every linear map gives is computed again from its input, with masked copies of
    the weights, and put in place of what the model computed. That takes the memory of the masked weights and twice the time.

    The masks come from a file (`Subnetworks.save_masks`: the alpha-SubNet of any number of data sets), or are Wanda's for
    each row's own prompt, so that a row does not depend on the others of its batch: one masked copy of the weights per row,
    for small models.

    Attributes:
        masks: file of masks; None for masks of each row's own prompt.
        sparsity: the share of every output row that each kind of tokens drops; 0 changes nothing. With a file, the one that
            it was made at.
        tokens: without a file, whose inputs count: "image", "text" (after the image), or "both": what each of the two keeps.
        rule: "wanda", or the controls "magnitude" and "random", which keep as many weights in every output row.
        layers: 0-based blocks; None for all.
        seed: of the random weights.
    """

    masks: str | Path | None = None
    sparsity: float = 0.5
    tokens: Tokens = "both"
    rule: Rule = "wanda"
    layers: Sequence[int] | None = None
    seed: int = 0
    kept_: float | None = field(default=None, init=False, repr=False, compare=False)
    """The share of the weights of the masked linear maps that counted in the last run."""

    name: ClassVar[str] = "SubnetMask"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters that do not fit the model."""
        if not 0 <= self.sparsity < 1:
            raise InputError(f"{self.name}: sparsity must be at least 0 and below 1, found {self.sparsity!r}")
        if self.rule not in RULES:
            raise unknown(f"{self.name} rule", str(self.rule), RULES)
        if self.tokens not in TOKENS:
            raise unknown(f"{self.name} tokens", str(self.tokens), TOKENS)
        if anatomy.family.cross is not None:
            raise UnsupportedError(
                f"{self.name}: blocks of {anatomy.family.name} read the image by gated cross-attention, whose linear maps "
                "cannot be masked"
            )
        for one in matrices(anatomy, self.layers):
            if one.third is not None:
                raise UnsupportedError(
                    f"{self.name}: {one.path} of this {anatomy.family.name} projects queries, keys and values at once; such "
                    "projections cannot be edited one by one"
                )
        if self.masks is not None:
            self._from_file(anatomy)
            made_at = sparsity_of_masks(self.masks)
            if made_at is not None and made_at != self.sparsity:
                raise InputError(
                    f"{self.name}: {self.masks} was made at sparsity {made_at:g}, found sparsity={self.sparsity:g}; write "
                    f"sparsity={made_at:g} or take another file"
                )

    def controls(self) -> dict[str, Intervention]:
        """The largest weights, and random ones, as many in every output row."""
        return {
            "magnitude": replace(self, rule="magnitude"),
            "random": replace(self, rule="random"),
        }

    def describe(self) -> str:
        """What this does, in a few plain words, with every other parameter that is not the default."""
        if self.masks is None:
            whose = f"{TOKENS[self.tokens]} of the prompt"
            how = f" (sparsity {self.sparsity:g})"
        else:
            whose, how = f"the tokens of {Path(self.masks).name}", ""
        hidden = ("masks", "sparsity", "tokens", "rule")
        changed = [
            f"{one.name}={getattr(self, one.name)!r}"
            for one in fields(self)
            if one.init and one.name not in hidden and getattr(self, one.name) != one.default
        ]
        return f"only {RULES[self.rule].format(whose)}{how}" + (f" ({', '.join(changed)})" if changed else "")

    def edits(self, run: RunContext) -> list[Edit]:
        """The linear maps computed again with masked weights."""
        self.kept_ = None
        if self.masks is None and self.sparsity == 0:
            return []
        chosen = matrices(run.anatomy, self.layers)
        model = run.source.model
        if self.masks is not None:
            given = self._from_file(run.anatomy)
            masks = {one.key: given[one.key] for one in chosen if one.key in given}
            for one in chosen:
                if one.key in masks and masks[one.key].shape != weight_of(model, one).shape:
                    raise InputError(
                        f"{self.name}: the mask of {one.key} has the shape {list(masks[one.key].shape)}, the weight "
                        f"{list(weight_of(model, one).shape)}; the file is of another model"
                    )
        else:
            masks = self._of_prompts(run, chosen)
        weights, kept, total = {}, 0, 0
        for number, one in enumerate(matrices(run.anatomy)):
            if one.key in masks:
                weight = weight_of(model, one)
                mask = self._by_rule(masks[one.key].to(weight.device), weight, number)
                kept, total = kept + int(mask.sum()), total + mask.numel()
                weights[one.key] = weight * mask
        self.kept_ = kept / total
        found: list[Edit] = []
        for layer in sorted({one.layer for one in chosen}):
            found += MaskedBlock(run.source, layer, weights).edits()
        return found

    def _from_file(self, anatomy: Anatomy) -> dict[str, Tensor]:
        assert self.masks is not None
        given = load_masks(self.masks)
        known = {one.key for one in matrices(anatomy)}
        extra = sorted(set(given) - known)
        if extra or not given:
            raise InputError(
                f"{self.name}: {self.masks} has masks of {', '.join(extra[:4]) or 'nothing'}, which this "
                f"{anatomy.family.name} does not have; the file is of another model"
            )
        return given

    def _by_rule(self, mask: Tensor, weight: Tensor, number: int) -> Tensor:
        """The mask itself, or one of as many weights in every output row: [output, input] or [row, output, input]."""
        if self.rule == "wanda":
            return mask
        if self.rule == "magnitude":
            score = weight.abs().float()
        else:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            score = torch.rand(weight.shape, generator=generator).to(weight.device)
        counts = mask.sum(dim=-1)
        return keep_top(score, counts) if mask.ndim == 2 else torch.stack([keep_top(score, one) for one in counts])

    def _of_prompts(self, run: RunContext, chosen: Sequence[Matrix]) -> dict[str, Tensor]:
        """Wanda's masks of every row's own prompt, bool [row, output, input] by matrix."""
        batch = run.batch.prompt_only() if any(run.batch.n_generated) else run.batch
        kinds = ("image", "text") if self.tokens == "both" else (self.tokens,)
        places = {"image": batch.image_mask, "text": batch.text_after_image_mask}
        _check_tokens(batch, {kind: places[kind] for kind in kinds})
        where: dict[str, set[int]] = {}
        for one in chosen:
            where.setdefault(one.site, set()).add(one.layer)
        sites = [
            Site(site, tuple(sorted(layers)), places[kind], label=f"{site} {kind}")
            for site, layers in where.items()
            for kind in kinds
        ]
        trace = run.trace(batch, sites, [])
        norms = {
            site.label: {layer: _norms(trace[site.label][layer], trace.mask(site.label)) for layer in site.layers or ()}
            for site in sites
        }
        masks = {}
        for one in chosen:
            weight = weight_of(run.source.model, one)
            several = []
            for row in range(batch.size):
                kept = [
                    keep_masks(wanda_score(weight, norms[f"{one.site} {kind}"][one.layer][row]), [self.sparsity])[0]
                    for kind in kinds
                ]
                several.append(torch.stack(kept).all(dim=0))
            masks[one.key] = torch.stack(several)
        return masks


def _check_tokens(batch: Batch, places: Mapping[str, Tensor]) -> None:
    for kind, mask in places.items():
        without = [name for name, any_ in zip(batch.ids, mask.any(dim=1).tolist(), strict=True) if not any_]
        if without:
            raise InputError(
                f"SubnetMask takes its masks from the {kind} tokens of every prompt; none in: {', '.join(without)}"
            )


def _norms(values: Tensor, real: Tensor) -> Tensor:
    """||X_j|| of every row: [row, position, ...] to [row, width]."""
    flat = values.flatten(2).float()
    return flat.masked_fill(~real.to(flat.device)[..., None], 0).square().sum(dim=1).sqrt()
