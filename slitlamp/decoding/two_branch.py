"""Decoding by contrast: the logits of a batch against those of other views of it, each branch with keys and values of its own.

With l the logits of the clean branch (the batch) and l' those of a contrast (another view of it), every step samples from

    l* = a_t l + b_t l', then a gate (both the method's: `ContrastDecoding.combine`),
    then APC: tokens whose clean logit is below log beta + max l get -inf (adaptive plausibility, Li et al., ACL 2023),
    then the processors and warpers that `generate` was asked for, in transformers' order.

All branches are given the same chosen tokens, from the prompts on; rows end by the chosen token alone.

What else is in force acts on the clean branch: traces record it, edits of other interventions change it. A contrast is what the
unmodified model says of the other view, under the edits of that view alone. Where nothing is recorded or edited after the
prompt, decode steps run over all branches at once (see `slitlamp.decoding.branches`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from slitlamp.decoding.beam_search import Beams, search
from slitlamp.decoding.branches import Branch, Branches
from slitlamp.decoding.generation import check_criteria
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import Batch
from slitlamp.tracing.pause import Pause
from slitlamp.tracing.session import AnyEdit, only_in_prefill, session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ContrastView = tuple[Batch, Sequence[AnyEdit]]
"""Another view of a batch: the batch to run, with as many rows and the same continuations, and the edits to run it with."""


@dataclass
class ContrastDecoding(Intervention):
    """An intervention that decodes from the logits of the batch against those of other views of it.

    Subclasses say which views (`views`) and how the logits are put together (`combine`). One may be in force at a time.
    `generate` runs each view beside the batch: a forward pass over each prompt, then, where it can (see
    `slitlamp.decoding.branches`), one per step over all of them, else one each. `forward` gives, at the positions whose
    logits a step of decoding would choose from (the last of the prompt and those of the continuation), the logits after APC of
    that step, and leaves those of earlier positions, which no step chooses from, as the clean branch has them.

    Attributes:
        beta: of APC; 0 for none.
    """

    beta: float = field(default=0.0, kw_only=True)

    kind: ClassVar[Kind] = "logits"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse parameters out of range."""
        if not 0 <= self.beta <= 1:
            raise InputError(f"{self.name}: beta must be between 0 and 1, found {self.beta!r}")

    def edits(self, run: RunContext) -> list[AnyEdit]:
        """None: the clean branch runs as it is."""
        return []

    @abstractmethod
    def views(self, run: RunContext) -> Sequence[ContrastView]:
        """The other views of a batch, in the order in which `combine` gets their logits."""

    @abstractmethod
    def combine(self, clean: Tensor, contrasts: Sequence[Tensor], step: Tensor) -> Tensor:
        """The logits that decoding goes by, before APC.

        A function of its arguments alone.

        Args:
            clean: float32 [..., vocab], raw logits of the clean branch.
            contrasts: of each view, the same shape.
            step: int64 [...], how many tokens have been generated before.
        """

    def fused(self, clean: Tensor, contrasts: Sequence[Tensor], step: Tensor) -> Tensor:
        """`combine`, with -inf at the tokens that APC leaves out."""
        return self.combine(clean, contrasts, step).masked_fill(~plausible(clean, self.beta), -torch.inf)


def plausible(clean: Tensor, beta: float) -> Tensor:
    """APC: bool [..., vocab], true at tokens at least `beta` times as probable as the most probable one.

    Args:
        clean: [..., vocab], raw logits.
        beta: 0 keeps every token, 1 the most probable ones alone.
    """
    return clean >= clean.amax(dim=-1, keepdim=True) + (math.log(beta) if beta else -math.inf)


def contrast_of(interventions: Sequence[Intervention]) -> ContrastDecoding | None:
    """The contrast among interventions, if there is one.

    Raises:
        UnsupportedError: several.
    """
    found = [one for one in interventions if isinstance(one, ContrastDecoding)]
    if len(found) > 1:
        raise UnsupportedError(
            f"{' and '.join(one.name for one in found)} are both contrasts: each goes by the logits of the clean branch, and the "
            "second would take those of the first for them; apply one at a time"
        )
    return found[0] if found else None


def fuse(contrast: ContrastDecoding, batch: Batch, logits: Tensor, others: Sequence[Tensor]) -> Tensor:
    """The logits of one forward pass, with those of decoding steps fused.

    Args:
        contrast: how.
        batch: what the clean branch ran on.
        logits: [batch, position, vocab] of the clean branch, of all positions or the last ones.
        others: the same of each view; their last positions are those of the clean branch.
    """
    width = min(steps_of(batch), logits.shape[1])
    place = torch.arange(1 - width, 1, device=logits.device)
    step = torch.tensor(batch.n_generated, device=logits.device)[:, None] + place  # negative before a step
    clean, seen = logits[:, -width:].float(), [one[:, -width:].to(logits.device).float() for one in others]
    fused = contrast.fused(clean, seen, step.clamp(min=0)).to(logits.dtype)
    fused = torch.where((step >= 0)[..., None], fused, logits[:, -width:])
    return torch.cat([logits[:, :-width], fused], dim=1)


def steps_of(batch: Batch) -> int:
    """How many last positions of a batch a step of decoding chooses from, in the row with the longest continuation."""
    return max(batch.n_generated) + 1


def _choosable(
    contrast: ContrastDecoding | None,
    logits: Sequence[Tensor],
    ids: Tensor,
    step: int,
    processors: LogitsProcessorList,
    *,
    as_log_p: bool = False,
) -> Tensor:
    """The scores [batch, vocab] to choose from, after fusion, APC and the logits processors and warpers.

    Where the processors forbid every token that APC keeps (`min_new_tokens`, where the end is all but certain), APC is taken
    anew over the tokens that are left; in such a step the processors are called again.

    Args:
        contrast: how to fuse; None where there is a clean branch alone.
        logits: raw logits of the clean branch and of each view, [batch, vocab].
        ids: int64 [batch, position], the prompts and what has been generated.
        step: how many tokens have been generated before.
        processors: what `generate` was asked for.
        as_log_p: whether processors are given log probabilities, as in beam search.
    """

    def processed(scores: Tensor) -> Tensor:
        found: Tensor = processors(ids, scores.log_softmax(dim=-1) if as_log_p else scores)  # type: ignore[arg-type]  # typed by old names
        return found

    clean, *others = (one.to(ids.device) for one in logits)
    if contrast is None:
        return processed(clean)
    combined = contrast.combine(clean, others, torch.full(clean.shape[:1], step, device=clean.device))
    left = clean
    while True:
        kept = plausible(left, contrast.beta) & left.isfinite()
        found = processed(combined.masked_fill(~kept, -torch.inf))
        if not contrast.beta:  # nothing is left out that could be taken back
            return found
        bare = found.isneginf().all(dim=-1, keepdim=True)
        left = torch.where(bare & kept, -torch.inf, left)
        if not bool((bare & left.isfinite()).any()):
            return found


@contextmanager
def contrasted(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batch: Batch,
    contrast: ContrastDecoding | None,
    views: Sequence[ContrastView],
    arguments: Mapping[str, Any],
    clean: Pause,
    *,
    untouched: bool,
    beams: Beams | None = None,
) -> Iterator[dict[str, Any]]:
    """Contrast branches beside a generation: gives the arguments for `generate` that make it decode from the fused logits.

    Args:
        model, anatomy: of the run.
        batch: what the clean branch runs on.
        contrast: how to fuse; None for beam search over the clean branch alone.
        views: of the batch, from `contrast.views`.
        arguments: of a plain `generate` on the batch.
        clean: of the session of the clean branch, which is open.
        untouched: whether nothing is recorded or edited in the decode steps of the clean branch.
        beams: of a search; then every prompt is in the batch once for each beam.

    Raises:
        UnsupportedError: decoding that is neither greedy, sampling nor beam search, or arguments that bring a cache or a decoding
            loop, and, beside beam search, a streamer or a time limit.
    """
    whose = "beam search" if contrast is None else contrast.name
    for name in ("past_key_values", "custom_generate", *(("streamer",) if beams else ())):
        if arguments.get(name) is not None:
            raise UnsupportedError(f"{name} beside {whose}: every branch has a cache and a loop of its own")
    options = {name: value for name, value in arguments.items() if name not in batch.inputs()}
    ours = {name: value for name, value in options.items() if name not in ("streamer", "logits_processor")}
    branches: list[Branch] = []
    together = untouched and all(only_in_prefill(edit) for _, edits in views for edit in edits)
    with ExitStack() as stack:
        for other, edits in views:
            pause = Pause(on=True)
            with clean.set(True):
                stack.enter_context(session(model, anatomy, other, edits=edits, decoding=True, pause=pause))
                branches.append(Branch(model, anatomy, other, pause))
                branches[-1].prepare({**ours, **other.inputs()})

        def decode(
            generator: Any,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: Any,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> Tensor:
            mode = generation_config.get_generation_mode()
            if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
                raise UnsupportedError(
                    f"{mode.value} beside {whose}: contrasts decode greedily, by sampling or by beam search"
                )
            first = Branch(model, anatomy, batch, clean)
            first.take(generator, input_ids, model_kwargs)
            every = Branches([first, *branches], together=together)

            def choosable(logits: Sequence[Tensor], texts: Tensor) -> Tensor:
                step = texts.shape[1] - input_ids.shape[1]
                return _choosable(contrast, logits, texts, step, logits_processor, as_log_p=beams is not None)

            with clean.set(True):
                if beams is None:
                    sample = mode is GenerationMode.SAMPLE
                    return _say(
                        every,
                        choosable,
                        input_ids,
                        stopping_criteria,
                        batch.pad_token_id,
                        arguments.get("streamer"),
                        sample=sample,
                    )
                check_criteria(stopping_criteria, whose)

                def score(texts: Tensor, order: Tensor | None) -> Tensor:
                    if order is not None:
                        every.reorder(order)
                    return choosable(every.next(None if order is None else texts[:, -1]), texts)

                ends = tuple(arguments["eos_token_id"] or ())
                return search(beams, input_ids, score, ends, arguments["max_new_tokens"], batch.pad_token_id)

        yield {**arguments, "custom_generate": decode}


def _say(
    every: Branches,
    choosable: Callable[[Sequence[Tensor], Tensor], Tensor],
    prompts: Tensor,
    stopping: StoppingCriteriaList,
    pad_token_id: int,
    streamer: Any,
    *,
    sample: bool,
) -> Tensor:
    """Choose token by token until every row has stopped: the prompts with what was said, int64 [batch, position].

    Args:
        every: the branches.
        choosable: (raw logits of each branch, the texts so far) -> scores [batch, vocab].
        prompts: int64 [batch, position].
        stopping: (texts, scores) -> bool [batch], the rows that stop.
        pad_token_id: follows the end of a row.
        streamer: is given the chosen tokens; None for none.
        sample: whether tokens are drawn, as transformers does, so that a seed gives the same; else the best one.
    """
    ids, chosen = prompts, None
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    while bool(running.any()):
        scores = choosable(every.next(chosen), ids)
        if sample:
            chosen = torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]
        else:
            chosen = scores.argmax(dim=-1)
        chosen = torch.where(running, chosen, pad_token_id)
        ids = torch.cat([ids, chosen[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(chosen.cpu())
        running = running & ~stopping(ids, None)
    if streamer is not None:
        streamer.end()
    return ids
