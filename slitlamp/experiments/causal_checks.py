"""Whether what the probes of an experiment found is causal: what they point at is intervened on, on other images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from slitlamp.causal import causal_check, causal_sentences
from slitlamp.errors import InputError
from slitlamp.experiments.datasets import Item
from slitlamp.experiments.folder import RunFolder, Unit
from slitlamp.experiments.probing import Measured, Tables, give_source, in_front, joined, labelled_batches
from slitlamp.tracing import CausalTarget, Part, Probe

if TYPE_CHECKING:
    from slitlamp.experiments.plan import Plan
    from slitlamp.vlm import VLM

CAUSAL_ITEMS = 100
"""Most items on which a finding is checked causally."""
OTHER, SAME, OWN = "other images", "the same images", "each image itself"
"""On what targets were chosen, as seen from the items on which they are intervened on."""


class Split(NamedTuple):
    """Chunks of items on which targets are chosen, and numbers of the items on which they are intervened on."""

    chunks: list[int]
    items: list[int]
    chosen_on: str


def split(items: Sequence[Item], size: int, limit: int) -> Split:
    """Choose on some chunks and intervene on the items of the others, so that no target is measured where it was chosen.

    The first chunks are intervened on: at most half of them, and as many as `limit` items need. Of those, items about an
    image that the other chunks hold too are left out. With a single chunk, both are done on the same items.
    """
    n_chunks = -(-len(items) // size)
    n_measured = min(-(-limit // size), n_chunks // 2)
    others = {item.image_id for item in items[n_measured * size :]}
    measured = [k for k in range(min(limit, n_measured * size)) if items[k].image_id not in others]
    if measured:
        return Split(list(range(n_measured, n_chunks)), measured, OTHER)
    return Split(list(range(n_chunks)), list(range(min(limit, len(items)))), SAME)


def causal_tables(
    plan: Plan, folder: RunFolder, vlm: VLM, measured: Measured, predictions: Mapping[tuple[str, str], pd.DataFrame]
) -> tuple[Tables, dict[str, str]]:
    """Intervene on the first part that each probe measured.

    A table is written as soon as it is there, and a run that goes on takes those that an earlier process has written.

    Returns:
        `<key>_causal` of every probe that points at a place, and by key what is to be said of the others.
    """
    tables: Tables = {}
    unchecked: dict[str, str] = {}
    for key, parts in measured.probes.items():
        part, probe = next(iter(parts.items()))
        name = f"{key}_causal"
        if probe.no_target:
            unchecked[key] = probe.no_target
            continue
        if not folder.has_table(name):
            data = next(data for data in plan.datasets if data.name == part.dataset)
            limit = CAUSAL_ITEMS if isinstance(plan.experiment.causal, bool) else plan.experiment.causal
            where = split(data.items, plan.experiment.batch_size, limit)
            if probe.targets_of == "items":
                where = Split([], list(range(min(limit, len(data)))), OWN)
            else:
                probe = _on_chunks(plan, folder, key, part, where.chunks)
            try:
                targets = give_source(probe, vlm).causal_targets(vlm.anatomy)
            except InputError as error:
                unchecked[key] = (
                    f"nothing can be pointed at on the {_count(where.chunks)} of items it is chosen on: {error}"
                )
                continue
            if not targets:
                unchecked[key] = "on these items and this model the probe points at nothing."
                continue
            rows = predictions[part.condition, part.dataset].iloc[where.items]
            size = plan.experiment.batch_size
            batches = labelled_batches(vlm, data, rows, batch_size=size)
            with vlm.apply(*plan.condition(part.condition).interventions):
                table = _table(plan, vlm, targets, batches, -(-len(rows) // size))
            folder.write_table(name, in_front(table.assign(chosen_on=where.chosen_on), part))
        tables[name] = folder.read_table(name)
    return tables, unchecked


def _table(plan: Plan, vlm: VLM, targets: list[CausalTarget], batches: Any, n_batches: int) -> pd.DataFrame:
    one = plan.experiment
    return causal_check(
        vlm,
        targets,
        batches,
        n_resamples=one.n_resamples,
        level=one.level,
        seed=one.seed,
        progress=one.progress,
        n_batches=n_batches,
    )


def _count(chunks: Sequence[int]) -> str:
    return "one batch" if len(chunks) == 1 else f"{len(chunks)} batches"


def _on_chunks(plan: Plan, folder: RunFolder, key: str, part: Part, chunks: Sequence[int]) -> Probe:
    """A probe that has taken in these chunks alone."""
    units = (Unit(part.condition, part.dataset, chunk) for chunk in chunks)
    return joined(plan.probes[key], (folder.read_part(unit).states[key] for unit in units))


def with_causal_sentences(tables: Tables, checked: Tables, unchecked: Mapping[str, str]) -> Tables:
    """The tables `<key>_summary` of all probes, saying whether the finding is causal, or why that was not asked."""
    said = {name.removesuffix("_causal"): " ".join(causal_sentences(table)) for name, table in checked.items()}
    said = {key: f"Causal check: {text}" for key, text in said.items()}
    said |= {key: f"No causal check: {text}" for key, text in unchecked.items()}
    changed = {}
    for key, text in said.items():
        summary = tables[f"{key}_summary"].copy()
        summary.loc[0, "summary"] = f"{summary.loc[0, 'summary']} {text}"
        changed[f"{key}_summary"] = summary
    return changed
