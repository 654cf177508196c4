"""Decoding by contrast: the logits of a batch against those of other views of it, each branch with a cache of its own.

With l the logits of the clean branch (the batch) and l' those of a contrast (another view of it), every step samples from

    l* = a_t l + b_t l', then a gate (both the method's: `ContrastDecoding.combine`),
    then APC: tokens whose clean logit is below log beta + max l get -inf (adaptive plausibility, Li et al., ACL 2023),
    then the processors and warpers that `generate` was asked for, in transformers' order.

All branches are given the same chosen tokens, from the prompts on; rows end by the chosen token alone.

What else is in force acts on the clean branch: traces record it, edits of other interventions change it. A contrast is what the
unmodified model says of the other view, under the edits of that view alone.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode

from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models.anatomy import Anatomy
from slitlamp.models.batch import Batch
from slitlamp.tracing.pause import Pause
from slitlamp.tracing.session import AnyEdit, session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ContrastView = tuple[Batch, Sequence[AnyEdit]]
"""Another view of a batch: the batch to run, with as many rows and the same continuations, and the edits to run it with."""


@dataclass
class ContrastDecoding(Intervention):
    """An intervention that decodes from the logits of the batch against those of other views of it.

    Subclasses say which views (`views`) and how the logits are put together (`combine`). One may be in force at a time.
    `generate` runs each view beside the batch, one forward pass per view and step. `forward` gives, at the positions whose
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


class _Branch:
    """The contrast branch of one generation: what transformers prepared for it, with its own cache and positions.

    The preparation is that of the model's own `generate`, which hands it over through `custom_generate`.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, pause: Pause) -> None:
        self._model = model
        self._pause = pause
        self._generator: Any = None
        self._ids: Tensor
        self._inputs: dict[str, Any] = {}
        paths = [path.rpartition(".")[::2] for path in anatomy.family.kept]
        self._kept = [(model.get_submodule(owner), name) for owner, name in paths]
        self._values = [getattr(owner, name) for owner, name in self._kept]

    @contextmanager
    def _running(self) -> Iterator[None]:
        """This branch alone runs; what the model keeps of a run in itself is that of this branch."""
        theirs = [getattr(owner, name) for owner, name in self._kept]
        with self._pause.set(False):
            try:
                self._put(self._values)
                yield
            finally:
                self._values = [getattr(owner, name) for owner, name in self._kept]
                self._put(theirs)

    def _put(self, values: Sequence[Any]) -> None:
        for (owner, name), value in zip(self._kept, values, strict=True):
            setattr(owner, name, value)

    def prepare(self, arguments: Mapping[str, Any]) -> None:
        """Let `generate` prepare its inputs, cache and positions from its arguments."""

        def take(
            model: Any,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: Any,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> Tensor:
            self._generator, self._ids, self._inputs = model, input_ids, model_kwargs
            return input_ids

        with self._running():
            self._model.generate(**arguments, custom_generate=take)  # type: ignore[operator]  # as in `VLM.generate`

    def next(self, chosen: Tensor | None) -> Tensor:
        """Raw logits of the next token, float32 [batch, vocab].

        Args:
            chosen: int64 [batch], the tokens that were chosen last; None at the first step, which runs over the prompts.
        """
        length = None
        if chosen is not None:
            length = 1
            self._ids = torch.cat([self._ids, chosen[:, None].to(self._ids.device)], dim=-1)
        model = self._generator
        with self._running():
            inputs = model.prepare_inputs_for_generation(
                self._ids, next_sequence_length=length, is_first_iteration=chosen is None, **self._inputs
            )
            output = model(**inputs, return_dict=True)
        self._inputs = model._update_model_kwargs_for_generation(output, self._inputs, is_encoder_decoder=False)
        return output.logits[:, -1].float()


class _Fusing(LogitsProcessor):
    """What takes the place of the logits processors of a generation: the fusion, then those processors."""

    def __init__(
        self, contrast: ContrastDecoding, branches: Sequence[_Branch], clean: Pause, rest: LogitsProcessorList
    ) -> None:
        self._contrast = contrast
        self._branches = branches
        self._clean = clean
        self._rest = rest
        self._step = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The scores [batch, vocab] to choose from.

        Where the processors forbid every token that APC keeps (`min_new_tokens`, where the end is all but certain), APC is taken
        anew over the tokens that are left; in such a step the processors are called again.
        """
        with self._clean.set(True):
            chosen = input_ids[:, -1] if self._step else None
            others = [one.next(chosen).to(scores.device) for one in self._branches]
        step = torch.full(scores.shape[:1], self._step, device=scores.device)
        self._step += 1
        combined, left = self._contrast.combine(scores, others, step), scores
        while True:
            kept = plausible(left, self._contrast.beta) & left.isfinite()
            found = self._rest(input_ids, combined.masked_fill(~kept, -torch.inf))
            bare = found.isneginf().all(dim=-1, keepdim=True)
            left = torch.where(bare & kept, -torch.inf, left)
            if not bool((bare & left.isfinite()).any()):
                return found


@contextmanager
def contrasted(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batch: Batch,
    contrast: ContrastDecoding,
    views: Sequence[ContrastView],
    arguments: Mapping[str, Any],
    clean: Pause,
) -> Iterator[dict[str, Any]]:
    """Contrast branches beside a generation: gives the arguments for `generate` that make it decode from the fused logits.

    Args:
        model, anatomy: of the run.
        batch: what the clean branch runs on.
        contrast: how to fuse.
        views: of the batch, from `contrast.views`.
        arguments: of a plain `generate` on the batch.
        clean: of the session of the clean branch, which is open.

    Raises:
        UnsupportedError: decoding that is neither greedy nor sampling, or arguments that bring a cache or a decoding loop.
    """
    for name in ("past_key_values", "custom_generate"):
        if arguments.get(name) is not None:
            raise UnsupportedError(f"{name} beside {contrast.name}: every branch has a cache and a loop of its own")
    options = {name: value for name, value in arguments.items() if name not in batch.inputs()}
    ours = {name: value for name, value in options.items() if name not in ("streamer", "logits_processor")}
    branches = []
    with ExitStack() as stack:
        for other, edits in views:
            pause = Pause(on=True)
            with clean.set(True):
                stack.enter_context(session(model, anatomy, other, edits=edits, decoding=True, pause=pause))
                branches.append(_Branch(model, anatomy, pause))
                branches[-1].prepare({**ours, **other.inputs()})

        def decode(
            model: Any,
            input_ids: Tensor,
            logits_processor: LogitsProcessorList,
            stopping_criteria: Any,
            generation_config: GenerationConfig,
            **model_kwargs: Any,
        ) -> Any:
            mode = generation_config.get_generation_mode()
            if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
                raise UnsupportedError(f"{mode.value} beside {contrast.name}: contrasts decode greedily or by sampling")
            # given to `generate` as a processor, the fusion would run after transformers' own, and not see raw logits
            fusing = _Fusing(contrast, branches, clean, logits_processor)
            return model._sample(
                input_ids,
                logits_processor=LogitsProcessorList([fusing]),
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=arguments.get("streamer"),
                **model_kwargs,
            )

        yield {**arguments, "custom_generate": decode}
