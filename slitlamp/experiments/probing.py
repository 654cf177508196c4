"""What the probes of an experiment take in and found: labelled texts, their tables, what their parts say together."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from slitlamp.decoding.generation import Generation, token_spans
from slitlamp.errors import InputError
from slitlamp.experiments import storage
from slitlamp.experiments.datasets import Dataset, Item
from slitlamp.experiments.folder import RunFolder
from slitlamp.experiments.labels import answer_labels, token_labels
from slitlamp.models import Batch
from slitlamp.tracing import Part, Probe
from slitlamp.tracing.trace import Source

if TYPE_CHECKING:
    from slitlamp.vlm import VLM

Tables = dict[str, pd.DataFrame]


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
                    frames.setdefault(f"{key}_{name}", []).append(in_front(frame, part))
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


def in_front(frame: pd.DataFrame, part: Part) -> pd.DataFrame:
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


def labelled_batches(
    vlm: VLM, data: Dataset, predictions: pd.DataFrame | Generation, *, batch_size: int = 16
) -> Iterator[tuple[Batch, list[pd.DataFrame | None]]]:
    """Texts about the items of a data set, as teacher-forced batches with the labels of their tokens: what probes take in.

    The texts may come from anywhere: the predictions of a saved run, another system's captions, or your own.

        for batch, labels in labelled_batches(vlm, data, vlm.generate(data.encode(vlm), max_new_tokens=64)):
            vlm.measure(probe, batch, labels)

    Args:
        vlm: the model whose states are to be read; it need not have written the texts.
        data: the images, the prompts, and what is in the images.
        predictions: a generation from `data.encode(vlm)`, or a row per text: `item` (the id of an item), and `tokens` (ids of
            this model's tokenizer) or `text`. Where there is a column `dataset`, rows of other data sets are left out; texts of
            one `condition` only.
        batch_size: texts per batch.

    Raises:
        InputError: no row of this data set, rows of several conditions, items that it lacks or that occur twice,
            neither tokens nor texts, or a text with words that the model's tokenizer does not know.
    """
    if isinstance(predictions, Generation):
        predictions = pd.DataFrame({"item": predictions.batch.ids, "tokens": list(predictions.tokens)})
    rows = predictions
    if "dataset" in rows:
        rows = rows[rows["dataset"] == data.name]
    if "condition" in rows and rows["condition"].nunique() > 1:
        raise InputError(
            f"texts of several conditions, take one: found {', '.join(map(str, rows['condition'].unique()))}"
        )
    if "item" not in rows or not {"tokens", "text"} & set(rows):
        raise InputError(f"predictions need columns item, and tokens or text: found {', '.join(map(str, rows))}")
    named = [str(one) for one in rows["item"]]
    place = {name: row for row, name in enumerate(named)}
    items = [item for item in data.items if item.id in place]
    if len(items) < max(len(named), 1):
        odd = sorted(set(named) - {item.id for item in items}) or sorted({one for one in named if named.count(one) > 1})
        raise InputError(
            f"each row must be a text about another item of {data.name!r}: found {len(named)} rows, of which these are none "
            f"or are repeated: {', '.join(odd[:5])}"
        )
    if "tokens" in rows:
        ids = [[int(token) for token in row] for row in rows["tokens"]]
    else:
        ids = [_ids(vlm.tokenizer, str(text)) for text in rows["text"]]
    for start in range(0, len(items), batch_size):
        chosen = items[start : start + batch_size]
        tokens = [ids[place[item.id]] for item in chosen]
        decoded = [token_spans(vlm.tokenizer, row) for row in tokens]
        batch = data.encode(vlm, chosen).with_continuation(tokens)
        yield batch, labels_of([text for text, _ in decoded], [spans for _, spans in decoded], data, chosen)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids = [int(one) for one in tokenizer(text, add_special_tokens=False)["input_ids"]]
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise InputError(
            f"this model has no token for a part of the text {text!r}: its states would be those of another text"
        )
    return ids
