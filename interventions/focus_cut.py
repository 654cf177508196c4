"""Text attends to the image where the text that it attends to does (inspired by CMAI)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from interventions.image_columns import attention_layers, from_prompt, prompt_of
from interventions.raised_scores import check_image_tokens
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import AttentionEdit, Calls
from slitlamp.tracing.sites import attention

Select = Literal["focus", "random"]


@dataclass
class FocusCut(Intervention):
    """Text after the image attends only to image tokens in its focus: the others are cut, before the softmax, in all heads.

    The focus score of a text token t on an image token i is F[t, i] = sum over text tokens u of A[t, u] A[u, i], with A the mean
    over heads of a layer's attention: what t sees of the image by way of the text it attends to. u runs over the prompt's text
    after the image, for no other text has seen it. Each layer has an F of its own, from an extra forward pass over the prompt
    without edits. For every t, the share `quantile` of image tokens with the lowest scores is cut (rounded down). Tokens that are
    generated take the choice of the prompt's last token. No code was released: this is made after the idea, and whether the
    authors cut in all layers, or choose anew for generated tokens, is not known here [?].

    Attributes:
        quantile: from 0, which changes nothing, to 1, which cuts all image tokens.
        layers: 0-based; None for all [?].
        select: "focus" (the method), or its control "random": for every token, as many image tokens at random.
        seed: of the random tokens.
    """

    quantile: float = 0.5
    layers: Sequence[int] | None = None
    select: Select = "focus"
    seed: int = 0

    name: ClassVar[str] = "FocusCut"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters that do not fit the model, and models without image tokens among their positions."""
        if not 0 <= self.quantile <= 1:
            raise InputError(f"{self.name}: quantile must be from 0 to 1, found {self.quantile!r}")
        if self.select not in ("focus", "random"):
            raise unknown(f"{self.name} select", str(self.select), ("focus", "random"))
        check_image_tokens(anatomy, self.name)
        attention_layers(self.layers, anatomy, self.name)

    def controls(self) -> dict[str, Intervention]:
        """As many random image tokens."""
        return {"random": replace(self, select="random")}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        which = "with the lowest focus score" if self.select == "focus" else f"at random (seed {self.seed})"
        where = "all layers"
        if self.layers is not None:
            where = f"layers {', '.join(map(str, self.layers))}" if self.layers else "no layer"
        return f"attention of text after the image to the {self.quantile:.0%} of image tokens {which} cut, in {where}"

    def edits(self, run: RunContext) -> list[AttentionEdit]:
        """Edits of attention before the softmax, once the scores are known."""
        layers = attention_layers(self.layers, run.anatomy, self.name)
        prompt = prompt_of(run.batch)
        if not self.quantile or not layers or not bool(prompt.text_after_image_mask.any()):
            return []
        asked = [
            attention("text_after_image", "text_after_image", layers, reduce_heads="mean", label="text"),
            attention("text_after_image", "image", layers, reduce_heads="mean", label="image"),
        ]
        trace = run.trace(prompt, asked, ())
        real = trace.mask("text")
        counts = prompt.image_mask.sum(dim=1).tolist()
        edits = []
        for layer in layers:
            to_text, to_image = (trace[label][layer].float() for label in ("text", "image"))
            cut = torch.zeros(prompt.size, real.shape[1], prompt.length, dtype=torch.bool)
            for row, n_image in enumerate(counts):
                n_text = int(real[row].sum())
                scores = to_text[row, :n_text, :n_text] @ to_image[row, :n_text, :n_image]
                if self.select == "random":
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
                    scores = torch.rand(scores.shape, generator=generator)
                cut[row, :n_text, prompt.image_mask[row].cpu()] = lowest(scores, self.quantile).cpu()
            edits.append(AttentionEdit(layer, _hide(run.batch, cut.to(run.batch.device)), "text_after_image"))
        return edits


def _hide(batch: Batch, cut: Tensor) -> Callable[[Tensor, Tensor, Calls], Tensor]:
    """What each text token after the image may not attend to, from bool [item, such token of the prompt, position of the prompt];
    tokens that are generated take the last one's.
    """
    by_token = from_prompt(cut.transpose(1, 2), batch).transpose(1, 2)
    asking = batch.text_after_image_mask & ~batch.generated_mask
    number = (asking.cumsum(dim=1) - 1).clamp(min=0)

    def hide(rows: Tensor, columns: Tensor, calls: Calls) -> Tensor:
        of_rows = number.to(rows.device).gather(1, rows.clamp(max=batch.length - 1))
        pairs = by_token.to(rows.device).gather(1, of_rows[:, :, None].expand(-1, -1, batch.length))
        return (pairs[:, :, columns.clamp(max=batch.length - 1)] & (columns < batch.length))[:, None]

    return hide


def lowest(scores: Tensor, quantile: float) -> Tensor:
    """bool [row, column]: in every row of [row, column], the share of columns with the lowest scores, rounded down."""
    count = math.floor(quantile * scores.shape[1] + 1e-9)  # 0.7 * 10 is 7
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter(1, scores.argsort(dim=1, stable=True)[:, :count], True)
