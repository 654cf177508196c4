"""VAR: attention on sinks is given to other image tokens (Kang et al., ICLR 2025, arXiv 2503.03321)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from interventions.image_columns import at_columns, attention_layers, drawn_order, prompt_of
from interventions.raised_scores import check_image_tokens, predicting_rows
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, unknown
from slitlamp.models import Anatomy, Batch
from slitlamp.tracing import AnyEdit, Calls, Edit, WeightsEdit
from slitlamp.tracing.sites import Positions, resid_pre

Sinks = Literal["all", "image"]
Rows = Literal["predicting", "text_after_image"]
Select = Literal["sinks", "random"]
ROWS: dict[str, str] = {
    "predicting": "where a next token is predicted",
    "text_after_image": "of text after the image",
}


@dataclass
class SinkRedistribution(Intervention):
    """In heads that look at the image, a share of the attention on sinks moves to image tokens that are none, after the softmax.

    A token with input x to a layer is a sink there if phi(x) = max over the sink dimensions d of |x_d| / RMS(x) is at least
    `tau`. In each edited row, a head takes part if its weights on image tokens add up to at least `image_mass`, of which at least
    the share `rho` is on image tokens that are no sinks. There the share `p` of the weights on sinks is taken, and given to these
    image tokens in proportion to what they have: rows add up to what they did.

    Sink dimensions are those of massive activations: given (1415 and 2533 of LLaMA-2 7B), or found for every item, in an extra
    forward pass without edits: the `n_sink_dims` dimensions with the largest |x_d| / RMS(x) at the first token of the prompt, in
    the input of the middle layer. phi is at most sqrt(d_model), which a model without massive activations does not come near;
    where no token is a sink, nothing changes.

    Attributes:
        p: the share that is taken; 0 changes nothing, 0.6 is the default of the method. A port of the released code takes its p
            for the share that stays [?].
        tau: of phi, below sqrt(d_model); 20 is the paper's.
        rho: the least share of a head's image attention that is not on sinks; 0.8 is the paper's. The released code's bounds the
            share that is on them.
        image_mass: the least attention of a head on the image; 0.2 is the paper's.
        layers: 0-based; None for the third to the last but one, as the method has it.
        sinks: of which sinks it is taken: "all", or those that are "image" tokens [?].
        sink_dims: the sink dimensions; None to find them.
        n_sink_dims: how many are found [?].
        rows: "predicting": the last token of the prompt and every token generated; or "text_after_image": all text after it.
        select: "sinks" (the method), or its control "random": the same attention, or all there is, is taken from as many tokens
            of the prompt that are no sinks, drawn in each layer (with `sinks="image"`, image tokens).
        seed: of the random tokens.
    """

    p: float = 0.6
    tau: float = 20.0
    rho: float = 0.8
    image_mass: float = 0.2
    layers: Sequence[int] | None = None
    sinks: Sinks = "all"
    sink_dims: Sequence[int] | None = None
    n_sink_dims: int = 2
    rows: Rows = "predicting"
    select: Select = "sinks"
    seed: int = 0
    dims_: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    """Of the last run: int64 [item, dimension], the sink dimensions."""
    sinks_: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Of the last run, layer -> bool [item, position so far], the sinks among all tokens, those of padding too."""

    name: ClassVar[str] = "SinkRedistribution"
    kind: ClassVar[Kind] = "blocks"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters that do not fit the model, and models without image tokens among their positions."""
        for what, value in (("p", self.p), ("rho", self.rho), ("image_mass", self.image_mass)):
            if not 0 <= value <= 1:
                raise InputError(f"{self.name}: {what} must be from 0 to 1, found {value!r}")
        if not 0 <= self.tau < math.sqrt(anatomy.d_model):
            raise InputError(
                f"{self.name}: tau must be from 0 to less than sqrt(d_model) = {math.sqrt(anatomy.d_model):.3g}, which phi "
                f"cannot pass in this model; found {self.tau!r}"
            )
        for what, chosen, known in (
            ("sinks", self.sinks, ("all", "image")),
            ("rows", self.rows, tuple(ROWS)),
            ("select", self.select, ("sinks", "random")),
        ):
            if chosen not in known:
                raise unknown(f"{self.name} {what}", str(chosen), known)
        if self.sink_dims is not None:
            if not self.sink_dims:
                raise InputError(f"{self.name}: sink_dims names no dimension; leave it out to find them")
            for dim in self.sink_dims:
                if not 0 <= dim < anatomy.d_model:
                    raise InputError(f"{self.name}: sink dimension {dim!r} is not one of 0 to {anatomy.d_model - 1}")
        elif not 1 <= self.n_sink_dims <= anatomy.d_model:
            raise InputError(
                f"{self.name}: n_sink_dims must be from 1 to {anatomy.d_model}, found {self.n_sink_dims!r}"
            )
        check_image_tokens(anatomy, self.name)
        self._layers(anatomy)

    def _layers(self, anatomy: Anatomy) -> tuple[int, ...]:
        """The layers in which attention moves.

        Raises:
            InputError: none is given, and the model has none between its second and its last.
        """
        if self.layers is None and anatomy.n_layers < 4:
            raise InputError(
                f"{self.name}: a model of {anatomy.n_layers} layers has none between the second and the last; give layers"
            )
        layers = range(2, anatomy.n_layers - 1) if self.layers is None else self.layers
        return attention_layers(layers, anatomy, self.name)

    def controls(self) -> dict[str, Intervention]:
        """The same attention taken from as many random tokens that are no sinks."""
        return {"random": replace(self, select="random")}

    def describe(self) -> str:
        """What this does, in a few plain words."""
        whose = "sinks" if self.sinks == "all" else "image sinks"
        share = f"{self.p:.0%} of the attention on {whose} (phi from {self.tau:g})"
        if self.select == "random":
            share = f"as much as {share} from as many random tokens (seed {self.seed})"
        where = "the third layer to the last but one"
        if self.layers is not None:
            where = f"layers {', '.join(map(str, self.layers))}" if self.layers else "no layer"
        return f"{share} moved to other image tokens after the softmax, {ROWS[self.rows]}, in {where}"

    def edits(self, run: RunContext) -> list[AnyEdit]:
        """Of each layer: a look at its input, which is not changed, and edits of its attention weights."""
        self.sinks_, self.dims_ = {}, None
        layers = self._layers(run.anatomy)
        if not self.p or not layers:
            return []
        dims = self.dims_ = self._dims(run)
        queries: Sequence[Positions] = (
            predicting_rows(run.batch) if self.rows == "predicting" else ("text_after_image",)
        )
        edits: list[AnyEdit] = []
        for layer in layers:
            look, move = self._of_layer(layer, run.batch, dims)
            edits += [Edit("resid_pre", layer, look), *(WeightsEdit(layer, move, rows) for rows in queries)]
        return edits

    def _dims(self, run: RunContext) -> Tensor:
        """int64 [item, dimension], the sink dimensions."""
        if self.sink_dims is not None:
            return torch.tensor(list(self.sink_dims)).expand(run.batch.size, -1)
        prompt = prompt_of(run.batch)
        first = prompt.real_mask & (prompt.real_mask.cumsum(dim=1) == 1)
        middle = run.anatomy.n_layers // 2
        states = run.trace(prompt, [resid_pre([middle], first)], ())["resid_pre"][middle][:, 0]
        return sizes(states).topk(self.n_sink_dims, dim=-1).indices

    def _of_layer(
        self, layer: int, batch: Batch, dims: Tensor
    ) -> tuple[Callable[[Tensor, Calls], Tensor], Callable[[Tensor, Tensor, Tensor, Calls], Tensor]]:
        """What finds the sinks of a layer, and what moves its weights."""
        drawn: list[Tensor] = []

        def look(values: Tensor, calls: Calls) -> Tensor:
            index = dims.to(values.device)[:, None].expand(-1, values.shape[1], -1)
            found = sizes(values).gather(2, index).amax(dim=2) >= self.tau
            if calls.is_prefill:
                self.sinks_[layer] = found
                if self.select == "random":
                    drawn[:] = [self._drawn(found, batch, layer)]
            else:
                before = self.sinks_[layer][:, : batch.length + calls.number - 1]  # decoding may have gone back
                self.sinks_[layer] = torch.cat([before, found], dim=1)
            return values

        def move(weights: Tensor, rows: Tensor, columns: Tensor, calls: Calls) -> Tensor:
            sink, image = (at_columns(one, columns)[:, None, None] for one in (self.sinks_[layer], batch.image_mask))
            source = sink if self.sinks == "all" else sink & image
            other = at_columns(drawn[0], columns)[:, None, None] if drawn else None
            return moved(weights, source, image & ~sink, image, self.p, self.rho, self.image_mass, other)

        return look, move

    def _drawn(self, sink: Tensor, batch: Batch, layer: int) -> Tensor:
        """bool [item, position], of the prompt as many random tokens that are no sinks as there are sinks."""
        prompt = batch.image_mask if self.sinks == "image" else batch.real_mask & ~batch.generated_mask
        drawn = torch.zeros_like(sink)
        for row in range(batch.size):
            places = prompt[row].nonzero()[:, 0].to(sink.device)
            order = places[drawn_order(len(places), self.seed, layer).to(sink.device)]
            taken = sink[row, order]
            drawn[row, order[~taken][: int(taken.sum())]] = True
        return drawn


def sizes(states: Tensor) -> Tensor:
    """|x_d| / RMS(x) of states x [..., d_model], in float32 or, of a model in float64, that."""
    wide = states if states.dtype == torch.float64 else states.float()
    return wide.abs() / wide.square().mean(dim=-1, keepdim=True).sqrt()


def moved(
    weights: Tensor,
    source: Tensor,
    target: Tensor,
    image: Tensor,
    p: float,
    rho: float,
    image_mass: float,
    other: Tensor | None = None,
) -> Tensor:
    """Attention weights of which a share has moved from some columns to others.

    Args:
        weights: [batch, head, query, key].
        source, target, image: bool [batch, 1, 1, key]: sinks, image tokens that are no sinks, image tokens.
        p, rho, image_mass: as of `SinkRedistribution`.
        other: bool [batch, 1, 1, key], from which to take as much instead of from `source`; they are given nothing.

    Returns:
        [batch, head, query, key], in the dtype of the weights; rows add up to what they did.
    """
    wide = weights if weights.dtype == torch.float64 else weights.float()

    def on(columns: Tensor) -> Tensor:
        return (wide * columns).sum(dim=-1, keepdim=True)

    seen = on(image)
    takes_part = (seen >= image_mass) & (on(target) >= rho * seen)
    budget = p * on(source)
    if other is not None:
        source, target = other, target & ~other
    has, gets = on(source), on(target)
    takes_part &= (has > 0) & (gets > 0)
    budget = torch.where(takes_part, torch.minimum(budget, has), 0)
    taken = wide * source * (budget / torch.where(takes_part, has, 1))
    given = wide * target * (budget / torch.where(takes_part, gets, 1))
    return (wide - taken + given).to(weights.dtype)
