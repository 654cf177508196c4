"""What the probes of an experiment found: their tables, what their parts say together, and whether it is causal."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from slitlamp.causal import causal_check, causal_sentences
from slitlamp.experiments import storage
from slitlamp.experiments.datasets import Dataset, Item
from slitlamp.experiments.folder import RunFolder
from slitlamp.experiments.labels import answer_labels, token_labels
from slitlamp.tracing import Part, Probe
from slitlamp.tracing.trace import Source

if TYPE_CHECKING:
    from slitlamp.experiments.plan import Plan
    from slitlamp.vlm import VLM

Tables = dict[str, pd.DataFrame]
CAUSAL_ITEMS = 100
"""Most items on which a finding is checked causally."""


@dataclass
class Measured:
    """The probes of an experiment, each with everything that it took in, by key and part."""

    probes: dict[str, dict[Part, Probe]] = field(default_factory=dict)

    def add(self, key: str, part: Part, probe: Probe) -> None:
        """Put one in."""
        self.probes.setdefault(key, {})[part] = probe

    def tables(self) -> Tables:
        """The tables of every probe as `<key>_<table>`, with the condition and the data set in front.

        `<key>_summary` holds what each found in words.
        """
        frames: dict[str, list[pd.DataFrame]] = {}
        for key, parts in self.probes.items():
            for part, probe in parts.items():
                result = probe.result()
                found = {**result.tables, "summary": pd.DataFrame({"summary": [result.summary]})}
                for name, frame in found.items():
                    frames.setdefault(f"{key}_{name}", []).append(_in_front(frame, part))
        return {name: pd.concat(each, ignore_index=True) for name, each in frames.items()}

    def compared(self, scores: pd.DataFrame | None) -> Tables:
        """The tables of `Probe.compare` as `<key>_compare_<table>`; `<key>_compare_summary` in words."""
        tables: Tables = {}
        for key, parts in self.probes.items():
            probe = next(iter(parts.values()))
            result = type(probe).compare(parts, scores) if len(parts) > 1 else None
            if result is not None:
                found = {**result.tables, "summary": pd.DataFrame({"summary": [result.summary]})}
                tables |= {f"{key}_compare_{name}": frame for name, frame in found.items()}
        return tables

    def save(self, folder: RunFolder) -> None:
        """Write the states, so that `Run.probe` gives the probes again."""
        for key, parts in self.probes.items():
            for part, probe in parts.items():
                storage.write_arrays(folder.state_path(key, part.condition, part.dataset), probe.state())


def _in_front(frame: pd.DataFrame, part: Part) -> pd.DataFrame:
    """The frame with its condition and data set in front."""
    return pd.concat(
        [
            pd.DataFrame({"condition": part.condition, "dataset": part.dataset}, index=frame.index),
            frame.drop(columns=[one for one in ("condition", "dataset") if one in frame.columns]),
        ],
        axis=1,
    )


def give_source(probe: Probe, vlm: VLM) -> Probe:
    """Tell a probe that asks for it (by a field `source_`) which model it measured."""
    if "source_" in getattr(probe, "__dataclass_fields__", {}):
        probe.source_ = Source(vlm.model, vlm.anatomy, vlm.tokenizer)  # type: ignore[attr-defined]
    return probe


def joined(probe: Probe, states: Iterable[Mapping[str, Any]]) -> Probe:
    """A fresh probe with the states of several units, in order."""
    whole = copy.deepcopy(probe)
    for state in states:
        part = copy.deepcopy(probe)
        part.load_state(dict(state))
        whole.merge(part)
    return whole


def labels_of(
    texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]], data: Dataset, items: Sequence[Item]
) -> list[pd.DataFrame | None]:
    """Per item, the labels of its generated tokens; None where nothing is known of the image."""
    rows = list(zip(items, texts, spans, strict=True))
    if data.task == "pope":
        return [
            None
            if item.label is None
            else answer_labels(text, span, item.label, item.object, item.image_id, data.truth, data.synonyms)
            for item, text, span in rows
        ]
    if data.truth is None or data.synonyms is None:
        return [None] * len(rows)
    return [token_labels(text, span, item.image_id, data.truth, data.synonyms) for item, text, span in rows]


def causal_tables(
    plan: Plan, vlm: VLM, measured: Measured, predictions: Mapping[tuple[str, str], pd.DataFrame]
) -> Tables:
    """`<key>_causal` of every probe whose finding is a place, on the text of the first part that it measured."""
    one = plan.experiment
    options: dict[str, Any] = {"n_resamples": one.n_resamples, "level": one.level, "seed": one.seed}
    limit = CAUSAL_ITEMS if isinstance(one.causal, bool) else one.causal
    tables: Tables = {}
    for key, parts in measured.probes.items():
        part, probe = next(iter(parts.items()))
        targets = give_source(probe, vlm).causal_targets(vlm.anatomy)
        if targets:
            data = next(data for data in plan.datasets if data.name == part.dataset)
            batches = _batches(plan, vlm, data, predictions[part.condition, part.dataset], limit)
            with vlm.apply(*plan.condition(part.condition).interventions):
                tables[f"{key}_causal"] = _in_front(causal_check(vlm, targets, batches, **options), part)
    return tables


def with_causal_sentences(tables: Tables, checked: Tables) -> Tables:
    """The tables `<key>_summary` of the probes that were checked, saying whether the finding is causal."""
    changed = {}
    for name, table in checked.items():
        key = name.removesuffix("_causal")
        summary = tables[f"{key}_summary"].copy()
        said = " ".join(causal_sentences(table))
        summary.loc[0, "summary"] = f"{summary.loc[0, 'summary']} Causal check: {said}"
        changed[f"{key}_summary"] = summary
    return changed


def _batches(plan: Plan, vlm: VLM, data: Dataset, rows: pd.DataFrame, limit: int) -> Iterator[tuple[Any, Any]]:
    """The stored texts again, as teacher-forced batches with their labels."""
    from slitlamp.decoding.generation import token_spans

    size = plan.experiment.batch_size
    items, tokens = data.items[:limit], [[int(token) for token in row] for row in rows["tokens"]]
    for start in range(0, len(items), size):
        chosen = items[start : start + size]
        ids = tokens[start : start + len(chosen)]
        decoded = [token_spans(vlm.tokenizer, row) for row in ids]
        batch = encoded(vlm, chosen).with_continuation(ids)
        yield batch, labels_of([text for text, _ in decoded], [spans for _, spans in decoded], data, chosen)


def encoded(vlm: VLM, items: Sequence[Item]) -> Any:
    """The batch of some items, grouped by image."""
    return vlm.encode(
        images=[item.image for item in items],
        prompts=[item.prompt for item in items],
        ids=[item.id for item in items],
    ).grouped([str(item.image_id) for item in items])
