"""Decoding that goes back: where a detector fires on the state that chose a token, an earlier token of the sentence is changed.

At step t of a sentence that began at step s, let a detector fire on the state that chose y_t. Then y_t is not said; decoding goes
back to the least confident step of the sentence so far, i* = argmin over i in [s, t) of max_v p_i(v), puts there the best of the
tokens that have not been tried there, and goes on from it (TruthPrInt, ICCV 2025, arXiv 2503.10602). p is the model's own
distribution, before processors and warpers; the best token is so by the scores that the choice goes by, after them. The step of
y_t itself is not among [s, t); only where nothing precedes it in the sentence (t = s) does decoding go back to t. Among equal
confidences the first counts. What was tried at steps after i* is forgotten.

Caps: so many tracebacks in a sentence, and in a text. When the detector fires again at a cap, or no other token is left anywhere,
what the sentence said before it was first gone back in is put back, the token of that firing included, and the sentence goes on
unwatched; after the cap of the text, so does the text. Each traceback, and each sentence put back, is followed by no more steps
than a text may have tokens, so that decoding ends.

Rows go back independently, and each says what it would say alone (sampled ones share their draws, as in any batch). In the cache
they share, tokens that a row has taken back are hidden from it, and the positions of its later tokens do not count them. The
columns after the last one that any row still needs are cut off: in a batch of one, all that were taken back.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode

from slitlamp.decoding.generation import Plan, Traceback, check_criteria
from slitlamp.decoding.intervention import Intervention, Kind, RunContext
from slitlamp.decoding.shared_columns import Columns
from slitlamp.decoding.traceback_rules import Row, Watch
from slitlamp.decoding.two_branch import ContrastDecoding
from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models.anatomy import Anatomy
from slitlamp.tracing.call import Calls
from slitlamp.tracing.session import AnyEdit, Edit, session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CROPPABLE = ("full_attention", "cross_attention")
"""Kinds of attention whose cache keeps every position, or none of the text's."""


@dataclass(frozen=True)
class Decoded:
    """What was said: per row its tokens, where decoding went back, how many steps were looked at, and how many image tokens the
    language model was given.
    """

    tokens: tuple[tuple[int, ...], ...]
    tracebacks: tuple[tuple[Traceback, ...], ...]
    n_watched: tuple[int, ...]
    n_image: tuple[int, ...]


@dataclass(eq=False)
class BacktrackingDecoding(Intervention):
    """An intervention that stops decoding at some steps and goes back in the sentence.

    Subclasses say what stops it (`watch`). One may be in force at a time, and no contrast beside it. `forward` under it is the
    plain forward pass, and so is what probes measure: it has no say in a text that is given. Traces of a `generate` are those of
    a plain generation that was made to say the final text.

    Attributes:
        max_tracebacks: how often it may go back in a sentence; few is best, by the paper's account [?].
        max_per_text: how often it may go back in a text.
    """

    max_tracebacks: int = field(default=3, kw_only=True)
    max_per_text: int = field(default=10, kw_only=True)

    kind: ClassVar[Kind] = "logits"

    def check(self, anatomy: Anatomy) -> None:
        """Refuse caps out of range, and models whose cache cannot be cut off behind a token."""
        for name in ("max_tracebacks", "max_per_text"):
            if getattr(self, name) < 0:
                raise InputError(f"{self.name}: {name} must be 0 or more, found {getattr(self, name)!r}")
        others = sorted(set(anatomy.attention_types) - set(CROPPABLE))
        if others:
            raise UnsupportedError(
                f"{self.name} goes back in the text, which the cache of this {anatomy.family.name} cannot: it has layers of "
                f"{', '.join(others)}, which do not keep every position; use a model with full attention"
            )

    def edits(self, run: RunContext) -> list[AnyEdit]:
        """None: the model runs as it is."""
        return []

    @abstractmethod
    def watch(self, run: RunContext) -> Watch:
        """What stops the decoding of a batch."""

    def again(self, watch: Watch, decoded: Decoded) -> Watch | None:
        """What stops a second decoding, which is then the one that counts, in the light of the first; None for no second one."""
        return None


def backtracking_of(interventions: Sequence[Intervention]) -> BacktrackingDecoding | None:
    """The decoding that goes back among interventions, if there is one.

    Raises:
        UnsupportedError: several, or a contrast beside it.
    """
    found = [one for one in interventions if isinstance(one, BacktrackingDecoding)]
    others = [*found[1:], *(one for one in interventions if found and isinstance(one, ContrastDecoding))]
    if others:
        raise UnsupportedError(
            f"{found[0].name} and {others[0].name} both have a decoding loop of their own; apply one at a time"
        )
    return found[0] if found else None


class _Reading:
    """Keeps the states that choose the next tokens, as every forward call passes them."""

    def __init__(self, layer: int) -> None:
        self.states: Tensor
        site, block = ("resid_pre", 0) if layer < 0 else ("resid_post", layer)
        self.edit = Edit(site, block, self._keep)

    def _keep(self, values: Tensor, calls: Calls) -> Tensor:
        self.states = values[:, -1]
        return values


def decode_back(
    model: PreTrainedModel,
    run: RunContext,
    edits: Sequence[AnyEdit],
    backtracking: BacktrackingDecoding,
    watch: Watch,
    plan: Plan,
) -> Decoded:
    """Decode a batch once, going back where it is stopped.

    Processors and warpers must be functions of the tokens and scores they are given: rows that have gone back are behind others,
    so that in a step they may be called several times, with texts of different lengths.

    Args:
        model: of the run.
        run, edits: what the model runs over, and the edits of the other interventions in force.
        backtracking: the intervention.
        watch: what stops it.
        plan: of a plain generation.

    Raises:
        UnsupportedError: decoding that is neither greedy nor sampling, a cache that cannot be cut off, or options that bring a
            cache, a decoding loop, a streamer or a time limit.
    """
    for name in ("past_key_values", "custom_generate", "streamer"):
        if plan.arguments.get(name) is not None:
            raise UnsupportedError(
                f"{name} beside {backtracking.name}: it goes back in the text, which {name} does not know"
            )
    batch = run.batch
    caps = (backtracking.max_tracebacks, backtracking.max_per_text)
    places = (None,) * batch.size if watch.places is None else watch.places
    rows = [Row(watch, one, caps, plan.ends, plan.arguments["max_new_tokens"]) for one in places]
    reading = _Reading(watch.layer)

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        _check_mode(generation_config, stopping_criteria, backtracking.name)
        inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
        output = model(**inputs, return_dict=True)
        inputs = model._update_model_kwargs_for_generation(output, model_kwargs, is_encoder_decoder=False)
        columns = Columns(inputs, run.anatomy, calls, backtracking.name)
        while True:
            logits = output.logits[:, -1].to(dtype=torch.float32, device=input_ids.device)
            scores = _processed(logits_processor, input_ids, logits, rows, batch.pad_token_id)
            if generation_config.do_sample:
                chosen = torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]
            else:
                chosen = scores.argmax(dim=-1)
            if _take(rows, chosen, watch.score(reading.states), logits, scores, caps[0] + 1):
                columns.settle(rows)
            if all(row.ended for row in rows):
                return torch.cat([input_ids, _padded(rows, input_ids, batch.pad_token_id)], dim=1)
            output = columns.next(model, input_ids, rows)

    every = [*edits, reading.edit]
    with session(model, run.anatomy, batch, edits=every, end_tokens=plan.ends, decoding=True) as calls:
        model.generate(**{**batch.inputs(), **plan.arguments}, custom_generate=loop)  # type: ignore[operator]  # as in `VLM.generate`
    return Decoded(
        tuple(tuple(row.tokens) for row in rows),
        tuple(tuple(row.tracebacks) for row in rows),
        tuple(row.n_watched for row in rows),
        tuple(batch.image_mask.sum(dim=1).tolist()),
    )


def _check_mode(config: GenerationConfig, criteria: Sequence[Any], whose: str) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UnsupportedError(f"{mode.value} beside {whose}: it decodes greedily or by sampling")
    if not config.use_cache:
        raise UnsupportedError(
            f"use_cache=False beside {whose}: it cuts the cache off where it goes back; leave it out"
        )
    check_criteria(criteria, whose)


def _take(rows: Sequence[Row], chosen: Tensor, found: Tensor, logits: Tensor, scores: Tensor, n_ranked: int) -> bool:
    """Give every row its token; returns whether any went back."""
    precise = logits.double()  # in float32, steps of which the model is sure could not be told apart
    confidence = (precise.amax(dim=-1) - precise.logsumexp(dim=-1)).exp().tolist()
    best, ranked = scores.topk(min(n_ranked, scores.shape[-1]), dim=-1)
    allowed = (~best.isneginf()).sum(dim=-1).tolist()
    each = zip(rows, chosen.tolist(), found.tolist(), confidence, ranked.tolist(), allowed, strict=True)
    went = [row.take(one, score, sure, few[:n]) for row, one, score, sure, few, n in each if not row.ended]
    return any(went)


def _processed(
    processors: LogitsProcessorList, prompt: Tensor, logits: Tensor, rows: Sequence[Row], pad: int
) -> Tensor:
    """The scores [batch, vocab] to choose from: the processors run once for every length of text among the rows that go on."""
    lengths = [len(row.tokens) for row in rows]
    wanted = sorted({length for row, length in zip(rows, lengths, strict=True) if not row.ended})
    place = torch.tensor([wanted[-1] if row.ended else len(row.tokens) for row in rows], device=logits.device)
    scores = logits
    for length in wanted:
        texts = [[*row.tokens[:length], *[pad] * (length - len(row.tokens))] for row in rows]
        ids = torch.tensor(texts, dtype=prompt.dtype, device=prompt.device).view(len(rows), length)
        found = processors(torch.cat([prompt, ids], dim=1), logits.clone())  # type: ignore[arg-type]  # LongTensor
        scores = torch.where((place == length)[:, None], found, scores)
    return scores


def _padded(rows: Sequence[Row], like: Tensor, pad: int) -> Tensor:
    length = max(len(row.tokens) for row in rows)
    return like.new_tensor([[*row.tokens, *[pad] * (length - len(row.tokens))] for row in rows])
