"""The causal check of a probe: what it points at is intervened on, against matched random targets.

A probe's finding is a correlate until something changes when the place it points at is changed, and changes more than when
another place of the same kind and size is changed. What is measured is the distribution of the next token, given the same
text, at the tokens that name objects (or at the answers, or at every generated token where there are no labels).

Two things are asked, for which one interval cannot answer. Is the difference more than these images happen to show? An
interval over images says it. Is the target more than places like it? That is a matter of the places: of n random ones and the
target, were it one of them, the target would be the largest once in n + 1 times, which is the p value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from slitlamp.errors import InputError
from slitlamp.evaluation.permutation import exceedance_p
from slitlamp.evaluation.statistics import Interval, cluster_bootstrap, cluster_sums, ratio
from slitlamp.models import Batch
from slitlamp.progress import progress_bar
from slitlamp.tracing import CausalTarget, sites
from slitlamp.tracing.probe import EditsOf, Labels

if TYPE_CHECKING:
    from slitlamp.vlm import VLM

TRUE, FALSE = ("object", "correct"), ("hallucinated", "wrong")
OUTCOMES = {
    "kl": "KL divergence of the next-token distribution from the unmodified one, in nats",
    "true_logprob": "change of the log probability of tokens that name objects in the image (or of right answers), in nats",
    "false_logprob": "change of the log probability of tokens that name other objects (or of wrong answers), in nats",
    "gap": "change for true minus change for false ones, in nats: above zero, the text becomes more truthful",
}
_Sums = NDArray[np.float64]
"""[row, 6]: number of tokens and sum of their KL; number of true tokens and sum of their changes of log p; the same of false."""
_ENDLESS = 1e12
"""Stands for the ratio to a control that changes nothing, while quantiles are taken."""


@dataclass(frozen=True)
class _Row:
    """Which generated tokens of one row are looked at, and which of them are true."""

    tokens: list[int]
    kind: list[int]  # 1 true, -1 false, 0 neither


def causal_check(
    vlm: VLM,
    targets: Sequence[CausalTarget],
    batches: Iterable[tuple[Batch, Labels | None]],
    *,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = True,
    n_batches: int | None = None,
) -> pd.DataFrame:
    """Intervene on what a probe points at, and on matched random targets.

    Args:
        vlm: the model that was measured; interventions in force stay in force.
        targets: of `probe.causal_targets(vlm.anatomy)`.
        batches: (teacher-forced batch, labels) pairs, for example of `Generation.teacher_forced()`; of other images than those
            on which the targets were chosen, since a target that was chosen for its effect is smaller on others.
        n_resamples, level, seed: of the bootstrap over the groups of the batches (images).
        progress: whether to draw a progress bar.
        n_batches: how many batches there are, for the bar, where `batches` does not say.

    Returns:
        One row per target and outcome (see `OUTCOMES`): target, control (what the random targets are), outcome, effect,
        low, high, control_effect, control_low, control_high (the mean over draws), draws_min, draws_max (the smallest and the
        largest of them), difference, difference_low, difference_high (target minus controls, paired), ratio, ratio_low,
        ratio_high (KL only), draws_exceeded (how many of the n_draws random targets have the smaller effect, in size), p
        ((1 + draws with as large an effect) / (1 + n_draws); of each row by itself), n_groups, n_tokens, and finding:

        - "more than random": the interval of the ratio (of the difference, for the signed outcomes) excludes equality, and p
          is at most 1 - level. Of targets that are random themselves no more than 1 - level are called so.
        - "more than every control": the same with fewer draws than could give such a p (there may be no more layers).
        - "less than random", "less than every control": the reverse. "Not told from random": all else.

    Raises:
        InputError: no target, a target without controls, or no token to look at.
    """
    if not targets:
        raise InputError("there is nothing to intervene on: this probe's finding is not a place in the model")
    for one in targets:
        if not one.controls:
            raise InputError(f"{one.name!r} has no matched random target to be compared with")
    runs: list[list[EditsOf]] = [[one.target, *one.controls] for one in targets]
    gathered: list[list[list[_Sums]]] = [[[] for _ in each] for each in runs]
    groups: list[str] = []
    n_runs = sum(map(len, runs))
    n_batches = len(batches) if isinstance(batches, Sized) else n_batches
    with progress_bar(progress, unit="runs") as bar:
        task = bar.add_task("causal check", total=None if n_batches is None else n_batches * n_runs)
        for batch, labels in batches:
            rows = [_looked_at(batch, labels, row) for row in range(batch.size)]
            if not any(row.tokens for row in rows):
                bar.advance(task, n_runs)
                continue
            groups += list(batch.groups)
            plain = _log_probabilities(vlm, batch, None)
            for number, each in enumerate(runs):
                for draw, edits_of in enumerate(each):
                    edited = _log_probabilities(vlm, batch, edits_of)
                    gathered[number][draw].append(_sums(batch, rows, plain, edited))
                    bar.advance(task)
    if not groups:
        raise InputError(
            "no batch holds a generated token to look at: the texts name no object, or no answer is yes or no. Take more items, "
            "or give no labels (None) to look at every token"
        )
    options = {"n_resamples": n_resamples, "level": level, "seed": seed}
    tables = []
    for target, draws in zip(targets, gathered, strict=True):
        by_group = [cluster_sums(np.concatenate(parts), groups) for parts in draws]
        tables.append(_table(target, by_group[0], np.stack(by_group[1:]), options))
    return pd.concat(tables, ignore_index=True)


def _looked_at(batch: Batch, labels: Labels | None, row: int) -> _Row:
    table = labels[row] if labels is not None else None
    count = batch.n_generated[row]
    if table is None:
        return _Row(list(range(count)), [0] * count)
    named = table[table["label"].isin([*TRUE, *FALSE]) & (table["token"] < count)]
    return _Row([int(one) for one in named["token"]], [1 if one in TRUE else -1 for one in named["label"]])


def _log_probabilities(vlm: VLM, batch: Batch, edits_of: EditsOf | None) -> Tensor:
    """[batch, generated token, vocabulary]."""
    site = sites.logits(positions="before_generated", label="causal_logits")
    with vlm.trace(site) as trace:
        vlm.forward(batch, edits=[] if edits_of is None else edits_of(batch))
    return trace["causal_logits"][0].float().log_softmax(dim=-1)


def _sums(batch: Batch, rows: Sequence[_Row], plain: Tensor, edited: Tensor) -> _Sums:
    kl = (plain.exp() * (plain - edited)).nan_to_num(0.0).sum(dim=-1).clamp(min=0)  # [batch, token]
    result = np.zeros((batch.size, 6))
    for row, looked in enumerate(rows):
        if not looked.tokens:
            continue
        first = batch.length - batch.n_generated[row]
        emitted = batch.input_ids[row, first:][looked.tokens].to(plain.device)
        place = torch.tensor(looked.tokens, device=plain.device)
        change = (edited[row, place, emitted] - plain[row, place, emitted]).double().cpu().numpy()
        kind = np.array(looked.kind)
        result[row, :2] = len(looked.tokens), kl[row, place].double().sum().item()
        for column, sign in ((2, 1), (4, -1)):
            result[row, column : column + 2] = (kind == sign).sum(), change[kind == sign].sum()
    return result


def _effects(sums: _Sums) -> _Sums:
    """[..., 6] to the four outcomes [..., 4]."""
    kl = ratio(sums[..., 1], sums[..., 0])
    true, false = ratio(sums[..., 3], sums[..., 2]), ratio(sums[..., 5], sums[..., 4])
    return np.stack([kl, true, false, true - false], axis=-1)


def _table(target: CausalTarget, sums: _Sums, draws: _Sums, options: dict[str, float]) -> pd.DataFrame:
    """One target against its draws [draw, group, 6]."""
    n_outcomes = len(OUTCOMES)
    width = sums.shape[1]

    def statistic(total: _Sums) -> _Sums:
        own, controls = _effects(total[..., :width]), _effects(total[..., width:])
        kl, control_kl = own[..., :1], controls[..., :1]
        times = np.where((control_kl == 0) & (kl > 0), _ENDLESS, ratio(kl, control_kl))
        return np.concatenate([own, controls, own - controls, times], axis=-1)

    found = cluster_bootstrap(np.hstack([sums, draws.mean(axis=0)]), statistic, **options)  # type: ignore[arg-type]
    assert isinstance(found, list)
    found = [_endless(one) for one in found]
    own, each = _effects(sums.sum(axis=0)), _effects(draws.sum(axis=1))
    rows = []
    for place, outcome in enumerate(OUTCOMES):
        effect, control, difference = (found[place + n_outcomes * block] for block in range(3))
        if np.isnan(effect.value):
            continue
        share = found[3 * n_outcomes] if outcome == "kl" else Interval(np.nan, np.nan, np.nan, effect.n)
        exceeded = int((np.abs(each[:, place]) < np.abs(own[place]) * (1 - 1e-12)).sum())
        rows.append(
            {
                "target": target.name,
                "control": target.control_name,
                "outcome": outcome,
                **_columns("effect", effect, bare=True),
                **_columns("control", control),
                "draws_min": each[:, place].min(),
                "draws_max": each[:, place].max(),
                **_columns("difference", difference, bare=False),
                **_columns("ratio", share, bare=False),
                "draws_exceeded": exceeded,
                "n_draws": len(draws),
                "p": float(exceedance_p(np.abs(own[place]), np.abs(each[:, place]))),
                "n_groups": len(sums),
                "n_tokens": int(sums[:, 0].sum()),
                "finding": _finding(
                    share if outcome == "kl" else difference, outcome, np.abs(own[place]), np.abs(each[:, place])
                ),
            }
        )
    return pd.DataFrame(rows)


def _endless(one: Interval) -> Interval:
    value, low, high = (np.inf if end >= _ENDLESS else end for end in (one.value, one.low, one.high))
    return replace(one, value=value, low=low, high=high)


def _columns(name: str, one: Interval, bare: bool | None = None) -> dict[str, float]:
    value = "control_effect" if name == "control" else name
    prefix = "" if bare else f"{name}_"
    return {value: one.value, f"{prefix}low": one.low, f"{prefix}high": one.high}


def _finding(one: Interval, outcome: str, effect: float, draws: NDArray[np.float64]) -> str:
    """From the interval of the ratio (KL) or difference, and the sizes of the effects of the target and of its draws."""
    equal = 1.0 if outcome == "kl" else 0.0
    if one.low <= equal <= one.high or np.isnan(one.low):
        return "not told from random"
    enough = 1 / (1 + len(draws)) <= 1 - one.level + 1e-9
    against = "random" if enough else "every control"
    least = 1 - one.level if enough else 1 / (1 + len(draws))
    # differences of signed outcomes may lie on either side; the sizes say which of the two is larger
    if exceedance_p(effect, draws) <= least + 1e-9:
        return f"more than {against}"
    if exceedance_p(-effect, -draws) <= least + 1e-9:
        return f"less than {against}"
    return "not told from random"


def causal_sentences(table: pd.DataFrame) -> list[str]:
    """What a table of `causal_check` says: for each target how much more than random it changes, and where it was chosen."""
    lines = []
    for row in table[table["outcome"] == "kl"].to_dict("records"):
        name = str(row["target"])
        times = "nothing to compare with" if np.isnan(row["ratio"]) else f"{row['ratio']:.1f} times"
        lines.append(
            f"{name[:1].upper()}{name[1:]}: the next token changes by {row['effect']:.3f} nats [{row['low']:.3f}, "
            f"{row['high']:.3f}]; for {row['control']}, by {row['control_effect']:.3f}. That is {times} [{row['ratio_low']:.1f}, "
            f"{row['ratio_high']:.1f}], {row['finding']} ({int(row['draws_exceeded'])} of {int(row['n_draws'])} draws exceeded, "
            f"p {row['p']:.2f})."
        )
    if "chosen_on" in table and len(table):
        lines.append(f"Targets were chosen on {table['chosen_on'].iloc[0]}.")
    return lines
