"""Skipping computation for perceptual tokens (IMA: Shukor and Cord, NeurIPS 2024, arXiv 2405.16700, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.flops import BlockSizes, Tokens, decoder_flops, skipped_flops
from slitlamp.models import Anatomy
from slitlamp.tracing import Calls, Edit

Skip = Literal["ffn", "block", "parallel"]
Skipping = Literal["perceptual", "text", "all"]
When = Literal["prefill", "decode", "both"]
Select = Literal["rule", "random"]
SKIPS: dict[str, str] = {
    "ffn": "skip the FFN",
    "block": "skip the block",
    "parallel": "run attention and FFN in parallel",
}
TOKENS: dict[str, str] = {"perceptual": "image tokens", "text": "text tokens", "all": "all tokens"}
WHENS: tuple[str, ...] = ("prefill", "decode", "both")


@dataclass
class SkipPerceptual(Intervention):
    """Some tokens skip the FFN, or the whole block, of some blocks; or attention and FFN run side by side there.

    With SA attention and LN1, LN2 the block's norms, what a block gives is
    "ffn": x + SA(LN1 x); "block": x; "parallel": x + SA(LN1 x) + FFN(LN1 x).
    (The released code returns x + LN2(x + SA) on one path; that is not done here.) Tokens that skip a block are still read
    by others in its attention: their keys and values are those of its input [?].

    Blocks are those with start < l < L - 1 and l mod interval = 0. Everything is computed and then put aside, so nothing is
    gained in time; `saved` estimates what an implementation would save.

    Attributes:
        skip: "ffn", "block" or "parallel".
        interval: every how many blocks; 1 is every block, 0 none (which changes nothing). 2 is our default [?].
        start: blocks up to this one, included, compute everything; 0 is our default [?].
        tokens: who skips: "perceptual" (image tokens), "text" or "all".
        when: tokens of the prompt ("prefill"), generated tokens that are fed back ("decode"), or both.
        layers: 0-based blocks in place of the rule.
        select: "rule", or "random": as many blocks as the rule (or `layers`) has, drawn from all, but not the same ones.
        seed: of the random blocks.
    """

    skip: Skip = "ffn"
    interval: int = 2
    start: int = 0
    tokens: Skipping = "perceptual"
    when: When = "prefill"
    layers: Sequence[int] | None = None
    select: Select = "rule"
    seed: int = 0
    blocks_: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)
    """The blocks of the last run."""

    name: ClassVar[str] = "SkipPerceptual"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters that do not fit the model."""
        for what, value, known in (
            ("skip", self.skip, SKIPS),
            ("tokens", self.tokens, TOKENS),
            ("when", self.when, WHENS),
            ("select", self.select, ("rule", "random")),
        ):
            if value not in known:
                raise unknown(f"{self.name} {what}", str(value), known)
        if self.interval < 0 or self.start < 0:
            raise InputError(
                f"{self.name}: interval and start must be 0 or more, found {self.interval!r} and {self.start!r}"
            )
        if (self.tokens, self.when) == ("perceptual", "decode"):
            raise InputError(f"{self.name}: no generated token is an image token; take when='prefill' or other tokens")
        for layer in self.layers or ():
            if not 0 <= layer < anatomy.n_layers:
                raise InputError(f"{self.name}: layer {layer!r} is not one of 0 to {anatomy.n_layers - 1}")
        if anatomy.family.cross is not None:
            raise UnsupportedError(
                f"{self.name}: {anatomy.family.name} reads the image by cross-attention: no image tokens go through its blocks"
            )
        if self.skip == "parallel" and not anatomy.layers("ln2"):
            raise UnsupportedError(
                f"{self.name}: attention and FFN of this {anatomy.family.name} run in parallel already"
            )

    def blocks(self, n_layers: int) -> tuple[int, ...]:
        """The blocks that are skipped, of a model of so many."""
        if self.layers is not None:
            chosen = tuple(sorted(set(self.layers)))
        elif not self.interval:
            chosen = ()
        else:
            chosen = tuple(one for one in range(self.start + 1, n_layers - 1) if one % self.interval == 0)
        if self.select == "rule" or len(chosen) in (0, n_layers):
            return chosen
        generator, drawn = np.random.default_rng(self.seed), chosen
        while drawn == chosen:
            drawn = tuple(sorted(generator.permutation(n_layers)[: len(chosen)].tolist()))
        return drawn

    def saved(self, sizes: BlockSizes, tokens: Tokens) -> float:
        """The share of the operations of the decoder's blocks, in one run, that need not be done.

        Args:
            sizes: of the model: `BlockSizes.of(vlm.anatomy)`.
            tokens: of the run.
        """
        kinds = {"perceptual": ("image",), "text": ("text", "decoded"), "all": ("image", "text", "decoded")}[
            self.tokens
        ]
        if self.when == "prefill":
            kinds = tuple(one for one in kinds if one != "decoded")
        elif self.when == "decode":
            kinds = tuple(one for one in kinds if one == "decoded")
        n_blocks = len(self.blocks(sizes.n_layers))
        return skipped_flops(sizes, tokens, kinds, self.skip, n_blocks) / decoder_flops(sizes, tokens)

    def controls(self) -> dict[str, Intervention]:
        """As many blocks drawn from all; and the other tokens of the prompt, textual for perceptual."""
        found: dict[str, Intervention] = {"random": replace(self, select="random")}
        if self.tokens != "all":
            other: Skipping = "text" if self.tokens == "perceptual" else "perceptual"
            found[other] = replace(self, tokens=other, when="prefill")
        return found

    def describe(self) -> str:
        """What this does, in a few plain words, with every other parameter that is not the default."""
        if self.layers is not None:
            where = f"blocks {', '.join(map(str, self.layers))}"
        elif not self.interval:
            where = "no block"
        else:
            where = (
                f"every block after {self.start}"
                if self.interval == 1
                else f"1 block in {self.interval} after {self.start}"
            )
        if self.select == "random":
            where = f"as many random blocks as {where}"
        who = (
            TOKENS[self.tokens]
            + {"prefill": "", "decode": " as they are generated", "both": ", prompt and generated"}[self.when]
        )
        hidden = ("skip", "interval", "start", "tokens", "when", "layers", "select")
        changed = [
            f"{one.name}={getattr(self, one.name)!r}"
            for one in fields(self)
            if one.init and one.name not in hidden and getattr(self, one.name) != one.default
        ]
        return f"{who} {SKIPS[self.skip]} in {where}" + (f" ({', '.join(changed)})" if changed else "")

    def edits(self, run: RunContext) -> list[Edit]:
        """Edits of the blocks that are skipped."""
        self.blocks_ = self.blocks(run.anatomy.n_layers)
        make = {"ffn": self._skip_ffn, "block": self._skip_block, "parallel": self._in_parallel}[self.skip]
        return [edit for layer in self.blocks_ for edit in make(layer)]

    def _chosen(self, values: Tensor, calls: Calls) -> Tensor:
        """bool [batch, position, 1]: the positions of a forward call that skip."""
        batch = calls.batch
        if calls.is_prefill:
            chosen = {"perceptual": batch.image_mask, "text": batch.text_mask, "all": batch.real_mask}[self.tokens]
            if self.when != "both":  # tokens that are given all at once are taken as in decoding step by step
                chosen = chosen & (batch.generated_mask == (self.when == "decode"))
        else:
            chosen = torch.ones(values.shape[:2], dtype=torch.bool)
        return chosen[..., None].to(values.device)

    @property
    def _prefill_only(self) -> bool:
        """Whether no token that is generated step by step skips anything."""
        return self.tokens == "perceptual" or self.when == "prefill"

    def _skip_ffn(self, layer: int) -> list[Edit]:
        def drop(values: Tensor, calls: Calls) -> Tensor:
            return values.masked_fill(self._chosen(values, calls), 0)

        return [Edit("mlp_out", layer, drop, self._prefill_only)]

    def _skip_block(self, layer: int) -> list[Edit]:
        return self._carried(layer, "resid_pre", "resid_post")

    def _in_parallel(self, layer: int) -> list[Edit]:
        return self._carried(layer, "ln1", "ln2")

    def _carried(self, layer: int, source: str, target: str) -> list[Edit]:
        """The values of one site of a block in place of those of a later one."""
        kept: list[Tensor] = []

        def keep(values: Tensor, calls: Calls) -> Tensor:
            kept[:] = [values]
            return values

        def put(values: Tensor, calls: Calls) -> Tensor:
            return torch.where(self._chosen(values, calls), kept.pop().to(values.device), values)

        return [Edit(source, layer, keep, self._prefill_only), Edit(target, layer, put, self._prefill_only)]
