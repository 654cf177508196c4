"""`VLM`: a vision-language model that can be recorded and edited."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from slitlamp.decoding.backtracking import Decoded, backtracking_of, decode_back
from slitlamp.decoding.generation import Generation, Plan, plan_generation
from slitlamp.decoding.intervention import Intervention, RunContext, in_order
from slitlamp.decoding.traceback_rules import Watch
from slitlamp.decoding.two_branch import ContrastDecoding, contrast_of, contrasted, fuse, steps_of
from slitlamp.decoding.visual_tokens import check_together, with_visual_edits
from slitlamp.errors import InputError, UnsupportedError, unknown
from slitlamp.models import Anatomy, Batch, family_of, read_anatomy
from slitlamp.models.batch import POSITIONS
from slitlamp.models.encode import encode
from slitlamp.models.loading import complete, load_processor, quiet_loading
from slitlamp.models.placement import input_device, weights
from slitlamp.tracing import AnyEdit, Edit, Probe, Site, Trace, check_sites, session
from slitlamp.tracing.call import Calls
from slitlamp.tracing.gradients import Scalar
from slitlamp.tracing.nonfinite import NonFinite, check_policy
from slitlamp.tracing.pause import Pause
from slitlamp.tracing.probe import Labels, labels_as_seen
from slitlamp.tracing.session import only_in_prefill
from slitlamp.tracing.store.writer import StoredTrace, StoreOptions, closing
from slitlamp.tracing.trace import Source

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from slitlamp.tracing.nnsight_backend import NNsight

ORGANISM_WEIGHTS = Path(__file__).parent / "organism" / "weights"


class _Recorded(Exception):
    """All that was wanted of a forward pass has been recorded."""


def _stop(values: torch.Tensor, calls: Calls) -> torch.Tensor:
    raise _Recorded


class _InForce(threading.local):
    """The traces and interventions of one VLM that are open in the present thread; another thread has its own."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []
        self.interventions: list[Intervention] = []


class VLM:
    """A Hugging Face vision-language model with its processor.

    The model is never changed: hooks and edits are attached for the time of one `forward` or `generate` and gone after.
    Several threads may use one VLM: a trace or an intervention is in force in the thread that opened it, and runs of one
    VLM wait for each other.

    Attributes:
        model: the Hugging Face model.
        processor: its processor.
        name: where it came from.
        anatomy: its sizes and module paths.
        revision: of the hub repository that it was loaded from; None for the newest.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, name: str) -> None:
        if not (hasattr(processor, "tokenizer") and hasattr(processor, "image_token")):
            raise InputError(f"a VLM needs the processor of its images and texts; found {type(processor).__name__}")
        self.model = model
        self.processor = processor
        self.name = name
        self.anatomy: Anatomy = read_anatomy(model)
        self.revision: str | None = None
        self._in_force = _InForce()
        self._lock = threading.RLock()

    # -- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def organism(
        cls, seed: int = 0, *, dtype: torch.dtype | str = "float32", device: torch.device | str = "cpu"
    ) -> VLM:
        """The embedded model: a small LLaVA trained on emoji scenes, shipped with the package.

        Args:
            seed: which of the shipped trainings (0 or 1).
            dtype, device: of the weights in use; they are stored in fp16.

        Raises:
            InputError: no such seed.
        """
        folder = ORGANISM_WEIGHTS / f"seed{seed}"
        if not folder.is_dir():
            shipped = sorted(one.name for one in ORGANISM_WEIGHTS.glob("seed*"))
            raise InputError(f"no embedded model of seed {seed}; shipped: {', '.join(shipped) or 'none'}")
        with quiet_loading():  # it takes a fifth of a second
            vlm = cls.from_pretrained(folder, dtype=dtype, device=device)
        vlm.name = f"organism:{seed}"
        return vlm

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        device_map: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> VLM:
        """Load a model and its processor from a folder or a hub.

        Where libraries are missing that only videos need, the processor is loaded without its part for videos.

        Args:
            name: folder or hub id.
            dtype: "auto" or a torch dtype, by name or as such.
            device: where to put it; by default where it is loaded (CPU), or what `device_map` says.
            device_map: passed to transformers (needs accelerate).
            revision: of the hub repository.
            trust_remote_code: whether to run code that the repository brings.
            options: further arguments of `AutoModelForImageTextToText.from_pretrained`.

        Raises:
            UnsupportedError: a family that slitlamp does not know, or a processor that needs a library which is not
                installed; found before the weights are loaded.
            InputError: `device` and `device_map` together, or no processor beside the model.
        """
        from transformers import AutoConfig, AutoModelForImageTextToText

        if device is not None and device_map is not None:
            raise InputError("give device or device_map, not both")
        hub: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if revision is not None:
            hub["revision"] = revision
        family_of(AutoConfig.from_pretrained(name, **hub))
        processor = load_processor(name, **hub)
        if device_map is not None:
            options["device_map"] = device_map
        # never pickle: its files can run code
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, use_safetensors=True, **hub, **options)
        if device is not None:
            model.to(device)  # type: ignore[arg-type]  # its decorator loses the signature
        vlm = cls(model.eval(), processor, str(name))
        complete(processor, model.config, has_cls=vlm.anatomy.has_cls)
        vlm.revision = revision
        return vlm

    @classmethod
    def remote(cls, name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> VLM:
        """A model of the hub without its weights, to be run elsewhere: `vlm.trace(..., backend="nnsight", remote=True)`.

        Its configuration and its processor are loaded, no weights.

        Args:
            name: hub id, by which the server knows it.
            revision: of the hub repository.
            trust_remote_code: whether to run code that the repository brings.

        Raises:
            UnsupportedError: a family that slitlamp does not know.
        """
        from transformers import AutoConfig, AutoModelForImageTextToText

        hub: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if revision is not None:
            hub["revision"] = revision
        config = AutoConfig.from_pretrained(name, **hub)
        family_of(config)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
        model.name_or_path = name
        vlm = cls(model.eval(), load_processor(name, **hub), name)
        complete(vlm.processor, config, has_cls=vlm.anatomy.has_cls)
        vlm.revision = revision
        return vlm

    @classmethod
    def wrap(cls, model: PreTrainedModel, processor: Any, name: str | None = None) -> VLM:
        """A VLM from a model and a processor that you already hold.

        Raises:
            UnsupportedError: a family that slitlamp does not know, or a model that its entry does not fit.
            InputError: something else in place of the processor.
        """
        return cls(model, processor, name or str(getattr(model.config, "name_or_path", "") or type(model).__name__))

    # -- facts ------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """The device that takes the input ids; for a model without weights here, the CPU."""
        device = input_device(self.model)
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.dtype

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The ids that end a generation."""
        ends = self._generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        return () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (int(ends),)

    @property
    def _generation_config(self) -> GenerationConfig:
        generator: Any = self.model.get_submodule(self.anatomy.modules["generator"])
        return generator.generation_config

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all weights; the same wherever they are, offloaded ones included."""
        digest = hashlib.sha256()
        for name, tensor in weights(self.model):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        one = self.anatomy
        heads = f"{one.n_heads} heads" + (f" ({one.n_kv_heads} key/value)" if one.n_kv_heads != one.n_heads else "")
        return (
            f"VLM({self.name}: {one.family.name}, {one.n_layers} layers x {heads}, d_model {one.d_model}; "
            f"vision {one.n_vision_layers} x {one.n_vision_heads}, {'CLS' if one.has_cls else 'no CLS'}; "
            f"{self.dtype}, {self.device})"
        )

    # -- running ----------------------------------------------------------------------------------------------------

    def encode(
        self,
        images: Sequence[Any] | None = None,
        prompts: Sequence[str] | str = (),
        *,
        ids: Sequence[str] | None = None,
        chat: bool | None = None,
    ) -> Batch:
        """Images and prompts to a batch; see `slitlamp.models.encode.encode`."""
        return encode(
            self.processor,
            self.model.config,
            self.anatomy,
            images=images,
            prompts=prompts,
            ids=ids,
            chat=chat,
            device=self.device,
            dtype=self.dtype,
        )

    @contextmanager
    def trace(
        self,
        *sites: Site,
        gradient_of: Scalar | None = None,
        store: str | Path | StoreOptions | None = None,
        backend: Literal["hooks", "nnsight"] = "hooks",
        remote: bool | str = False,
        nonfinite: NonFinite = "warn",
    ) -> Iterator[Trace]:
        """Record sites in the one `forward` or `generate` that runs inside.

        Args:
            sites: what to record.
            gradient_of: (output of the Hugging Face model) -> a tensor, summed to the scalar whose gradients with respect
                to everything recorded are put into `trace.gradients`, for example
                `lambda output: output.logits[:, -1, yes] - output.logits[:, -1, no]`. One `forward` only; no gradient is
                left in the model's parameters.
            store: a folder to which every run inside is written as it ends; the trace then takes any number of runs and holds
                the last one. `sl.open_store` reads it, `trace.pending(ids)` says what is not in it yet. `sl.StoreOptions` for
                several writers, the size of shards, and a check of the free space.
            backend: "hooks" on this model, or "nnsight", which can also run the model elsewhere.
            remote: with nnsight, where to run: False for here, True for the server that nnsight is configured for, its URL,
                or "local" for a rehearsal without a server (see docs/nnsight.md).
            nonfinite: what to do about NaN and infinity among the recordings: "warn" with the site, layer, forward call and
                item, "raise" with the same, or "keep" them without a look.

        Recording attention leaves the model under the attention implementation that it was loaded with, in eager attention
        in blocks of query rows. Compiled parts of a model run as plain modules inside a trace. The trace is open in the
        thread that opened it.

        Raises:
            UnknownNameError, InputError: a site that this model does not have.
            UnsupportedError: attention that cannot be recorded (see `slitlamp.tracing.attention_tap`).
            NonFiniteError: from the run inside, with `nonfinite="raise"`.
            StoreError: a store that cannot be written, or that another model or other sites made.
        """
        check_policy(nonfinite)
        checked = check_sites(sites, self.anatomy)
        trace = Trace(checked, gradient_of) if store is None else self._stored(checked, store, gradient_of)
        with closing(trace):
            trace.nonfinite = nonfinite
            trace.source = Source(self.model, self.anatomy, self.tokenizer)
            trace.backend = self._backend(backend, remote)
            self._traces.append(trace)
            try:
                yield trace
            finally:
                self._traces.remove(trace)

    def _stored(self, sites: list[Site], store: str | Path | StoreOptions, gradient_of: Scalar | None) -> StoredTrace:
        if gradient_of is not None:
            raise InputError("gradients are not stored; open a trace without store=... for them")
        return StoredTrace(
            sites,
            store if isinstance(store, StoreOptions) else StoreOptions(store),
            Source(self.model, self.anatomy, self.tokenizer),
            name=self.name,
            weights_sha256=lambda: self.weights_hash,
            interventions=lambda: [Intervention.describe(one) for one in self._interventions],  # all parameters
        )

    @contextmanager
    def apply(self, *interventions: Intervention) -> Iterator[None]:
        """Run with interventions: by kind (input, visual tokens, blocks, logits), within a kind as given.

        A nested `apply` adds to the outer one.

        Raises:
            InputError, UnsupportedError: an intervention that does not fit this model, two contrasts, or two that decode in loops
                of their own.
        """
        chosen = in_order(interventions)
        for one in chosen:
            one.check(self.anatomy)
        before = list(self._interventions)
        together = in_order([*before, *chosen])
        contrast_of(together)
        backtracking_of(together)
        check_together(together)
        self._in_force.interventions = together
        try:
            yield
        finally:
            self._in_force.interventions = before

    @property
    def _traces(self) -> list[Trace]:
        return self._in_force.traces

    @property
    def _interventions(self) -> list[Intervention]:
        return self._in_force.interventions

    def _context(self, batch: Batch) -> RunContext:
        source = Source(self.model, self.anatomy, self.tokenizer)
        return RunContext(batch=batch, anatomy=self.anatomy, trace=self._extra_pass, source=source)

    def _edited(self, batch: Batch) -> tuple[RunContext, list[AnyEdit]]:
        """What the model runs over under the interventions in force, and the edits to run it with."""
        run = with_visual_edits(self._context(batch), self._interventions)
        return run, [edit for one in self._interventions for edit in one.edits(run)]

    def _extra_pass(
        self, batch: Batch, sites: Sequence[Site], edits: Sequence[AnyEdit], gradient_of: Scalar | None = None
    ) -> Trace:
        """A forward pass for its recordings alone: it ends with the last layer that anything is recorded of."""
        trace = Trace(check_sites(sites, self.anatomy), gradient_of)
        trace.source = Source(self.model, self.anatomy, self.tokenizer)
        last = max((max(one.layers) for one in trace.sites.values() if one.layers and not one.is_vision), default=0)
        whole = gradient_of is not None or "logits" in {one.name for one in trace.sites.values()}
        if not whole and last + 1 < self.anatomy.n_layers:
            edits = [*edits, Edit("resid_pre", last + 1, _stop)]
        with (
            self._putting_back(),
            session(self.model, self.anatomy, batch, traces=[trace], edits=edits),
            contextlib.suppress(_Recorded),
        ):
            self._call(batch, logits_to_keep=_logits_needed(sites))
        return trace

    def _arguments(self, batch: Batch, **options: Any) -> dict[str, Any]:
        first = self.anatomy.family.first_position
        if POSITIONS in batch.aligned:
            positions = batch.aligned[POSITIONS] + (first or 0)
        elif first is None and batch.image_mask.any():
            positions = None  # the model counts by itself
        else:  # as generate counts them: padding has no place
            positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0) + (first or 0)
        return {**batch.inputs(), POSITIONS: positions, "use_cache": False, "return_dict": True, **options}

    def _call(self, batch: Batch, **options: Any) -> Any:
        return self.model(**self._arguments(batch, **options))

    @contextmanager
    def _putting_back(self) -> Iterator[None]:
        """On exit, what the model writes into itself as it runs is what it was."""
        places = [path.rpartition(".")[::2] for path in self.anatomy.family.kept]
        before = [(self.model.get_submodule(owner), name) for owner, name in places]
        values = [getattr(owner, name) for owner, name in before]
        try:
            yield
        finally:
            for (owner, name), value in zip(before, values, strict=True):
                setattr(owner, name, value)

    def forward(self, batch: Batch, *, logits_to_keep: int = 0, edits: Sequence[AnyEdit] = ()) -> Any:
        """One forward pass, under the traces and interventions in force.

        Args:
            batch: from `encode`, or with a continuation.
            logits_to_keep: how many last positions get logits; 0 for all.
            edits: of this run alone, after those of the interventions in force (see `slitlamp.decoding.edits`).

        Returns:
            The Hugging Face model's output. Under a contrast, its logits are fused where they are those of a step of decoding
            (see `slitlamp.decoding.two_branch.ContrastDecoding`); all else in it, and what traces record, is of the clean branch.
            Decoding that goes back (`slitlamp.decoding.backtracking`) changes nothing here.
        """
        return self._forward(batch, logits_to_keep, edits, contrast_of(self._interventions))

    @torch.no_grad()
    def _forward(
        self, batch: Batch, logits_to_keep: int, edits: Sequence[AnyEdit], contrast: ContrastDecoding | None
    ) -> Any:
        nnsight = self._nnsight()
        if nnsight is not None:
            if edits:
                raise UnsupportedError('edits run with hooks: leave out backend="nnsight"')
            arguments = self._arguments(batch, logits_to_keep=logits_to_keep)
            with self._lock:
                return nnsight.run(
                    self.model, self.processor, self.anatomy, batch, self._open_traces(), "forward", arguments
                )
        with self._lock, self._putting_back():
            run, every = self._edited(batch)
            with session(self.model, self.anatomy, run.batch, traces=self._open_traces(), edits=[*every, *edits]):
                output = self._call(run.batch, logits_to_keep=logits_to_keep)
            if contrast is not None:
                others = []
                for view, its_edits in contrast.views(self._context(batch)):
                    with self._putting_back(), session(self.model, self.anatomy, view, edits=its_edits):
                        others.append(self._call(view, logits_to_keep=steps_of(batch)).logits)
                output.logits = fuse(contrast, run.batch, output.logits, others)
        return output

    @torch.no_grad()
    def generate(
        self, batch: Batch, *, max_new_tokens: int = 64, seed: int | None = None, **options: Any
    ) -> Generation:
        """Generate after each prompt, under the traces and interventions in force.

        Where decoding goes back (`slitlamp.decoding.backtracking`), traces record a plain generation of the final text.

        Args:
            batch: from `encode`.
            max_new_tokens: limit of new tokens.
            seed: of sampling; greedy decoding takes none.
            options: further arguments of Hugging Face's `generate` (`do_sample`, `temperature`, `top_p`, ...). Greedy
                unless `do_sample=True`, or beam search with `num_beams`.

        Raises:
            InputError: a batch with a continuation, a seed without sampling or sampling without a seed, no new tokens.
            UnsupportedError: decoding that does not follow one text per prompt, token by token; under a contrast also a cache or
                a loop (`custom_generate`) among the options; under decoding that goes back, these, a streamer or a time limit,
                and a model whose cache cannot be cut off. Beam search under decoding that goes back, under traces (beams move
                between rows: record `generation.teacher_forced()`), and over prompts that cannot be repeated.
        """
        plan = plan_generation(batch, max_new_tokens, seed, options, self.end_tokens, self._generation_config)
        nnsight = self._nnsight()
        if plan.beams is not None and self._traces:
            raise UnsupportedError(
                "beam search under a trace: beams move between rows, which recordings follow; generate first, then trace "
                "vlm.forward(generation.teacher_forced())"
            )
        if nnsight is not None and nnsight.remote is not False and seed is not None:
            raise UnsupportedError("sampling on a server cannot be repeated: a seed here does not reach it")
        with self._lock, self._putting_back(), torch.random.fork_rng(enabled=seed is not None):
            start = time.perf_counter()
            said = self._decode_back(batch, plan, seed)
            if said is not None and not self._traces:
                measured = {"n_image": said.n_image, "seconds": time.perf_counter() - start}
                return Generation.of(
                    batch, self.tokenizer, said.tokens, plan.ends, tracebacks=said.tracebacks, **measured
                )
            if said is not None:
                plan, seed = plan.saying(said.tokens, batch.pad_token_id), None
            if nnsight is not None:
                run, edits = self._context(batch), list[AnyEdit]()
                decoding: Any = contextlib.nullcontext({**batch.inputs(), **plan.arguments})
            else:
                run, edits = self._edited(batch if plan.beams is None else batch.repeated(plan.beams.number))
                decoding = self._decoding(run, edits, plan)
            with decoding as arguments:
                if seed is not None:
                    torch.manual_seed(seed)
                if nnsight is None:
                    output = self.model.generate(**arguments)  # type: ignore[operator]  # typed as a buffer of nn.Module
                else:
                    output = nnsight.run(
                        self.model,
                        self.processor,
                        self.anatomy,
                        batch,
                        self._open_traces(),
                        "generate",
                        arguments,
                        end_tokens=plan.ends,
                    )
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            rows = sequences[:, run.batch.length :].tolist()
            seconds = time.perf_counter() - start
        n_image = tuple(run.batch.image_mask.sum(dim=1).tolist())[:: 1 if plan.beams is None else plan.beams.number]
        tracebacks = () if said is None else said.tracebacks
        generation = Generation.of(
            batch, self.tokenizer, rows, plan.ends, n_image=n_image, seconds=seconds, tracebacks=tracebacks
        )
        for trace in self._open_traces():
            trace.generated = generation.tokens
        return generation

    def _decode_back(self, batch: Batch, plan: Plan, seed: int | None) -> Decoded | None:
        """What is said under an intervention that goes back; None where none is in force."""
        backtracking = backtracking_of(self._interventions)
        if backtracking is None:
            return None
        if plan.beams is not None:
            raise UnsupportedError(f"beam search beside {backtracking.name}: it goes back in one text per prompt")

        def decoded(watch: Watch) -> Decoded:
            with self._putting_back():
                run, edits = self._edited(batch)
                if seed is not None:
                    torch.manual_seed(seed)
                return decode_back(self.model, run, edits, backtracking, watch, plan)

        watch = backtracking.watch(self._context(batch))
        first = decoded(watch)
        second = backtracking.again(watch, first)
        return first if second is None else decoded(second)

    @contextmanager
    def _decoding(self, run: RunContext, edits: Sequence[AnyEdit], plan: Plan) -> Iterator[dict[str, Any]]:
        """A session of one generation, with its contrast branches: gives the arguments of Hugging Face's `generate`."""
        contrast, pause = contrast_of(self._interventions), Pause()
        views = [] if contrast is None else contrast.views(self._context(run.whole))
        arguments = {**run.batch.inputs(), **plan.arguments}
        with session(
            *(self.model, self.anatomy, run.batch),
            traces=self._open_traces(),
            edits=edits,
            end_tokens=plan.ends if plan.beams is None else (),  # a row of a beam that ended goes on as another one
            decoding=True,
            pause=pause,
        ):
            if contrast is None and plan.beams is None:
                yield arguments
                return
            untouched = not self._open_traces() and all(only_in_prefill(edit) for edit in edits)
            with contrasted(
                *(self.model, self.anatomy, run.batch, contrast, views, arguments, pause),
                untouched=untouched,
                beams=plan.beams,
            ) as fused:
                yield fused

    def measure(self, probe: Probe, batch: Batch, labels: Labels | None = None) -> None:
        """Run a batch, and the other versions of it that a probe asks for, and give the recordings to the probe.

        Interventions in force act on the batch itself; its other versions (without the image, say) run unmodified. A contrast
        changes nothing that is recorded, and does not run. Where edits of visual tokens shorten the prompts, the probe is
        given the shortened batch, and the other versions are those of the whole one. Boxes among the labels, which are in shares
        of the picture, are given to it in shares of what the model sees of it (see `Batch.window`).
        """
        labels = labels_as_seen(batch, labels)
        sites = probe.sites(self.anatomy)
        with self.trace(*sites) as trace:
            self._forward(batch, _logits_needed(sites), (), None)
        trace.labels = labels
        for name, view in probe.views(self.anatomy).items():
            other, edits = view.change(batch, trace)
            wanted = sites if view.sites is None else list(view.sites)
            gradient_of = None if view.gradient_of is None else view.gradient_of(other, trace)
            with self._lock, torch.no_grad():
                trace.views[name] = self._extra_pass(other, wanted, edits, gradient_of)
        assert trace.batch is not None  # it holds a run
        probe.update(trace.batch, trace, labels)

    def _backend(self, backend: str, remote: bool | str) -> NNsight | None:
        if backend not in ("hooks", "nnsight"):
            raise unknown("backend", backend, ("hooks", "nnsight"))
        if backend == "hooks":
            if remote is not False:
                raise InputError('remote needs backend="nnsight"')
            return None
        from slitlamp.tracing.nnsight_backend import NNsight

        return NNsight(remote, self.revision)

    def _nnsight(self) -> NNsight | None:
        """How the open traces want to be recorded through nnsight; None: by hooks.

        Raises:
            InputError: traces that differ in it, or no weights here.
            UnsupportedError: interventions in force.
        """
        wanted = {trace.backend for trace in self._traces}
        if len(wanted) > 1:
            raise InputError("the open traces differ in backend or remote; one run has one")
        nnsight = wanted.pop() if wanted else None
        if nnsight is not None and self._interventions:
            raise UnsupportedError('interventions run with hooks: leave out backend="nnsight"')
        if nnsight is None and input_device(self.model).type == "meta":
            raise InputError('this model has no weights here; use vlm.trace(..., backend="nnsight", remote=True)')
        return nnsight

    def _open_traces(self) -> list[Trace]:
        return list(self._traces)


def _logits_needed(sites: Sequence[Site]) -> int:
    """How many last positions need logits for these sites: all (0) if any asks for other logits than the last."""
    wanted = [site for site in sites if site.name == "logits"]
    return 1 if all(isinstance(one.positions, str) and one.positions == "last" for one in wanted) else 0
