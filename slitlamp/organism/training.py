"""Training of the embedded model in four stages: vision, text, joint, refine. Seeded, resumable, on a CPU."""

import json
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch
from rich.progress import Progress, TextColumn
from torch import Tensor, nn

from slitlamp.organism.attention import use_training_attention
from slitlamp.organism.build import VISION_WIDTH, build_model, build_processor, save_organism
from slitlamp.organism.objectives import VisionHeads, language_loss, vision_loss
from slitlamp.organism.stages import STAGES, LanguageBatch, StepData, VisionBatch, steps
from slitlamp.organism.state import Progress as State
from slitlamp.organism.state import load_state, read_progress, save_state
from slitlamp.progress import progress_bar

logger = logging.getLogger(__name__)

WITHOUT_EFFECT = frozenset({"data_workers", "save_every", "log_every"})
"""Fields that change nothing about the result and may differ between a run and its continuation."""


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Every number of a training run.

    `threads` is part of the result, as is the kind of processor: sums of floats depend on how they are split.
    `checkpoints` are the shares of the joint stage after which a loadable fp16 folder is written; its end gets one too.
    """

    seed: int = 0
    width: int = 192
    vision_steps: int = 1600
    vision_batch: int = 64
    vision_lr: float = 1.5e-3
    text_steps: int = 160
    text_batch: int = 64
    text_lr: float = 1e-3
    joint_steps: int = 2000
    joint_batch: int = 32
    joint_lr: float = 1e-3
    refine_steps: int = 800
    refine_batch: int = 32
    refine_lr: float = 8e-4
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    warmup: float = 0.03
    gradient_clip: float = 1.0
    bf16: bool = True
    threads: int = 1
    data_workers: int = 1
    checkpoints: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
    save_every: int = 100
    log_every: int = 20

    def __post_init__(self) -> None:
        counts = (
            "width",
            "vision_batch",
            "text_batch",
            "joint_batch",
            "refine_batch",
            "threads",
            "save_every",
            "log_every",
        )
        for name in (*counts, "vision_steps", "text_steps", "joint_steps", "refine_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, found {self.seed}")
        if any(not 0 <= share < 1 for share in self.checkpoints):
            raise ValueError(f"checkpoints must be shares of the joint stage in [0, 1), found {self.checkpoints}")

    def scaled(self, total: int) -> Self:
        """The same run with `total` steps in all, shared among the stages in proportion."""
        if total < len(STAGES):
            raise ValueError(f"at least {len(STAGES)} steps are needed, one for each stage; found {total}")
        have = sum(self.stage_steps(stage) for stage in STAGES)
        vision, text, refine = (
            max(1, round(total * self.stage_steps(stage) / have)) for stage in ("vision", "text", "refine")
        )
        joint = max(1, total - vision - text - refine)
        return replace(self, vision_steps=vision, text_steps=text, joint_steps=joint, refine_steps=refine)

    def stage_steps(self, stage: str) -> int:
        """Number of steps of a stage."""
        steps: int = getattr(self, f"{stage}_steps")
        return steps

    def checkpoint_steps(self, stage: str) -> tuple[int, ...]:
        """Steps of a stage after which a checkpoint folder is written; 0 is before its first step."""
        if stage == "joint":
            return tuple(sorted({math.floor(share * self.joint_steps) for share in self.checkpoints}))
        return (0,) if stage == "refine" else ()

    def to_dict(self) -> dict[str, object]:
        """As JSON holds it."""
        return json.loads(json.dumps(asdict(self)))


def train_organism(output: str | Path, config: TrainingConfig | None = None, resume: bool = True) -> Path:
    """Train the embedded model and return the folder of the result, `output/final`.

    `output` receives `config.json`, `state.safetensors` (to resume from), `log.jsonl`, `checkpoints/step-NNNNN/`, counted
    from the start of the joint stage, and `final/`; the folders load with plain `from_pretrained`. A run that was killed
    continues from its last state and ends with the weights of an undisturbed one. The number of torch threads is
    restored at the end.

    Raises ValueError where `output` holds a run of another configuration, and FileExistsError where it holds any run
    and `resume` is False.
    """
    config = config or TrainingConfig()
    output = Path(output)
    _claim(output, config, resume)
    final = output / "final"
    if final.exists():
        logger.info("%s is finished", output)
        return final
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        _Trainer(output, config).run()
    finally:
        torch.set_num_threads(threads)
    return final


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Cosine schedule to zero after a linear warm-up over the share `warmup` of the steps; `step` counts from 0."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


class _Trainer:
    """One run: model, throw-away vision heads, and the loop over stages."""

    def __init__(self, output: Path, config: TrainingConfig) -> None:
        self.output = output
        self.config = config
        self.model = build_model(config.seed, config.width)
        use_training_attention(self.model)
        self.heads = VisionHeads(VISION_WIDTH, config.seed)
        self.processor = build_processor()
        self.state_path = output / "state.safetensors"
        self.log_path = output / "log.jsonl"

    def run(self) -> None:
        state = read_progress(self.state_path) if self.state_path.exists() else State(STAGES[0], 0)
        _truncate_log(self.log_path, state)
        with progress_bar(True, TextColumn("loss {task.fields[loss]:.3f}"), unit="steps") as progress:
            for stage in STAGES[STAGES.index(state.stage) :]:
                self._stage(stage, state.step if stage == state.stage else 0, progress)
        save_organism(self.model, self.processor, self.output / "final")

    def _stage(self, stage: str, start: int, progress: Progress) -> None:
        config = self.config
        total = config.stage_steps(stage)
        batch_size: int = getattr(config, f"{stage}_batch")
        peak: float = getattr(config, f"{stage}_lr")
        parameters = self._trained(stage)
        optimizer = self._optimizer(parameters, peak)
        modules: dict[str, nn.Module] = {"model": self.model, "heads": self.heads}
        if self.state_path.exists():
            # Moments of an earlier stage are not this stage's: they are read only when resuming inside it.
            load_state(self.state_path, modules, optimizer if start else None)
        bar = progress.add_task(stage, total=total, completed=start, loss=float("nan"))
        data = StepData(stage, config.seed, batch_size)
        marks = set(config.checkpoint_steps(stage))
        earlier = config.joint_steps if stage == "refine" else 0
        if start in marks:
            self._checkpoint(earlier + start)
        began = time.monotonic()
        for step, batch in enumerate(steps(data, start, total, config.data_workers), start=start):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, peak, config.warmup)
            loss, parts = self._loss(batch)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss became {loss.item()} at step {step} of stage {stage}")
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            rate = (done - start) * batch_size / (time.monotonic() - began)
            if done % config.log_every == 0 or done == total:
                progress.update(bar, completed=done, loss=loss.item())
                self._log(stage, done, {"loss": loss, "gradient_norm": norm, **parts}, rate)
            if done in marks and done < total:
                self._checkpoint(earlier + done)
            if done % config.save_every == 0 and done < total:
                save_state(self.state_path, modules, optimizer, State(stage, done))
        following = STAGES.index(stage) + 1
        if following < len(STAGES):
            save_state(self.state_path, modules, None, State(STAGES[following], 0))

    def _loss(self, batch: VisionBatch | LanguageBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
            if isinstance(batch, dict):
                return vision_loss(self.model, self.heads, batch)
            return language_loss(self.model, *batch)

    def _trained(self, stage: str) -> list[nn.Parameter]:
        """The parameters that a stage changes; all others are frozen."""
        inner = self.model.model
        modules: Iterable[nn.Module] = {
            "vision": (inner.vision_tower, self.heads),
            "text": (inner.language_model, self.model.lm_head),
            "joint": (inner.multi_modal_projector, inner.language_model, self.model.lm_head),
            "refine": (inner.multi_modal_projector, inner.language_model, self.model.lm_head),
        }[stage]
        self.model.requires_grad_(False)
        self.heads.requires_grad_(False)
        chosen = [parameter for module in modules for parameter in module.parameters()]
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen

    def _optimizer(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
        """AdamW with decay on matrices only."""
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=lr, betas=self.config.betas, fused=True)

    def _checkpoint(self, step: int) -> None:
        folder = self.output / "checkpoints" / f"step-{step:05d}"
        # A run killed between the checkpoint and the next state comes here twice, with the same weights.
        if not folder.exists():
            save_organism(self.model, self.processor, folder)

    def _log(self, stage: str, step: int, values: dict[str, Tensor], rate: float) -> None:
        row = {"stage": stage, "step": step, "scenes_per_second": round(rate, 1)}
        row |= {name: round(value.detach().item(), 5) for name, value in values.items()}
        with self.log_path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def _claim(output: Path, config: TrainingConfig, resume: bool) -> None:
    """Make `output` this run's folder, or refuse it."""
    path = output / "config.json"
    if path.exists():
        if not resume:
            raise FileExistsError(f"{output} holds a training run; pass resume=True or choose another folder")
        found = json.loads(path.read_text(encoding="utf-8"))
        wanted = config.to_dict()
        names = sorted(k for k in (wanted | found).keys() - WITHOUT_EFFECT if wanted.get(k) != found.get(k))
        if names:
            raise ValueError(f"{output} holds a run of another configuration; they differ in {', '.join(names)}")
        return
    output.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(".config.json.partial")
    partial.write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _truncate_log(path: Path, state: State) -> None:
    """Drop the lines that a killed run wrote after its last state: their steps are run again."""
    if not path.exists():
        return
    position = (STAGES.index(state.stage), state.step)
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that the kill cut short
        if (STAGES.index(row["stage"]), row["step"]) <= position:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")
