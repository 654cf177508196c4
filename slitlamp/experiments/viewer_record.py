"""What the viewer keeps of one item: attention, logit lens, signals, and what every condition changes, one item at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import torch

from slitlamp.decoding import BacktrackingDecoding
from slitlamp.decoding.generation import token_spans
from slitlamp.errors import SlitlampError
from slitlamp.evaluation.pope import parse_answer
from slitlamp.experiments import registry
from slitlamp.experiments.conditions import Condition
from slitlamp.experiments.datasets import Dataset, Item
from slitlamp.experiments.probing import labels_of
from slitlamp.experiments.viewer_detail import TOP, Array, Arrays, Cells, Maps
from slitlamp.models import Batch
from slitlamp.tracing import Site, Trace, sites
from slitlamp.tracing.lens import lens_logits
from slitlamp.tracing.trace import Source

if TYPE_CHECKING:
    from slitlamp.experiments.plan import Plan
    from slitlamp.vlm import VLM

LEDGER: Final = "TokenLedger"
MOST_WEIGHTS: Final = 200_000_000
"""Attention weights of one item held in memory (0.8 GB); of longer texts and larger models the mean over heads is recorded."""
NAMED: Final = ("object", "hallucinated", "correct", "wrong")


@dataclass(frozen=True)
class Shown:
    """An item of the viewer before it is cut down: a header, arrays, attention, and the tokens that name objects."""

    header: dict[str, Any]
    arrays: Arrays
    maps: Maps | None
    named: list[int]


def record(
    plan: Plan,
    vlm: VLM,
    data: Dataset,
    item: Item,
    predictions: Mapping[tuple[str, str], pd.DataFrame],
    tables: Mapping[str, pd.DataFrame],
) -> tuple[Shown, Batch]:
    """All that the viewer can show of one item, and its prompt as a batch."""
    reference = plan.conditions[0]
    tokens = _tokens(predictions, reference.name, data, item)
    text, spans = token_spans(vlm.tokenizer, tokens)
    prompt = data.encode(vlm, [item])
    batch = prompt.with_continuation([tokens])
    labels = labels_of([text], [spans], data, [item])[0]
    head: dict[str, Any] = {
        **{
            "item": item.id,
            "dataset": data.name,
            "task": data.task,
            "prompt": item.prompt,
            "condition": reference.name,
        },
        "truth": _truth(data, item),
        "asked": {"object": item.object, "answer": item.label} if data.task == "pope" else None,
        "text": text,
        "tokens": pieces(vlm.tokenizer, tokens, text, spans),
        "mentions": _mentions(data, item, text),
        "labels": _labels(labels, len(tokens)),
    }
    named = [] if labels is None else sorted(int(one) for one in labels["token"][labels["label"].isin(NAMED)])
    with vlm.apply(*reference.interventions):
        maps, lens, lens_head = look(vlm, batch, len(tokens))
        head["signals"] = _signals(plan, vlm, batch, labels, named, data, item, tables)
    head |= lens_head
    changes, conditions = _conditions(plan, vlm, batch, data, item, predictions, tables, tokens, lens["log_p"])
    head["conditions"] = conditions
    return Shown(head, {**lens, "change": changes}, maps, named), prompt


def look(vlm: VLM, batch: Batch, n_tokens: int) -> tuple[Maps | None, Arrays, dict[str, Any]]:
    """Attention over the image and the logit lens at the positions that predict the continuation of a batch of one row.

    Returns:
        Attention, None where there is none. The arrays lens_id [token, layer + 1, top], lens_p (of the same shape, uint8 of
        the root of the probability), rank and p of the token that follows [token, layer + 1], and log_p [token] of the
        output. The header's `vocabulary` of the lens, `n_layers`, `n_heads`, and `cross`: whether it is cross-attention.
        The last "layer" of the lens is the output of the model.
    """
    wanted, per_head = _attention_site(vlm, batch, n_tokens)
    states = sites.resid_post(positions="before_generated", label="viewer_states")
    with vlm.trace(*([] if wanted is None else [wanted]), states) as trace:
        logits = vlm.forward(batch, logits_to_keep=n_tokens + 1).logits
    assert trace.source is not None
    output = logits[0, logits.shape[1] - n_tokens - 1 : -1].float().log_softmax(dim=-1)
    tokens = batch.input_ids[0, batch.input_ids.shape[1] - n_tokens :]
    arrays, vocabulary = _lens(trace.source, trace, output, tokens, n_tokens)
    maps = None if wanted is None else _maps(trace, n_tokens, per_head)
    cross = wanted is not None and wanted.name == "cross_attention"
    head = {"vocabulary": vocabulary, "n_layers": vlm.anatomy.n_layers, "n_heads": vlm.anatomy.n_heads, "cross": cross}
    return maps, arrays, head


def _attention_site(vlm: VLM, batch: Batch, n_tokens: int) -> tuple[Site | None, bool]:
    """Attention of text over the image, by head where that is not too much to hold."""
    cross = bool(vlm.anatomy.layers("cross_attention"))
    layers = vlm.anatomy.layers("cross_attention" if cross else "attention")
    if not layers or not n_tokens or not len(batch.patches[0]):
        return None, False
    per_head = len(layers) * vlm.anatomy.n_heads * n_tokens * len(batch.patches[0]) <= MOST_WEIGHTS
    heads: Any = None if per_head else "mean"
    options: dict[str, Any] = {"queries": "before_generated", "reduce_heads": heads, "label": "viewer_attention"}
    return (sites.cross_attention(**options) if cross else sites.attention(keys="image", **options)), per_head


def _maps(trace: Trace, n_tokens: int, per_head: bool) -> Maps:
    assert trace.batch is not None
    found = trace["viewer_attention"]
    parts = []
    for layer in found.layers:
        weights = found[layer][0].float().cpu().numpy()
        parts.append((weights if per_head else weights[None])[:, :n_tokens])
    return maps_of(parts, Cells.of(trace.batch.patches[0]), found.layers, per_head)


def maps_of(parts: Sequence[Array], cells: Cells, layers: Sequence[int], per_head: bool) -> Maps:
    """Attention on grids, from weights [head, token, image token] of each layer."""
    weights = np.stack([cells.lay(part) for part in parts])
    mass = np.stack([part.sum(axis=-1) for part in parts])
    return Maps(weights, mass, cells, tuple(layers), per_head)


def _lens(
    source: Source, trace: Trace, output: torch.Tensor, tokens: torch.Tensor, n_tokens: int
) -> tuple[Arrays, list[str]]:
    """The lens after every layer and the output: arrays as in `look`, and the vocabulary that `lens_id` numbers."""
    record = trace["viewer_states"]
    top = min(TOP, source.anatomy.d_vocab)
    ids, shares, ranks, p = [], [], [], []
    for layer in (*record.layers, None):
        logits = (
            output
            if layer is None
            else torch.cat([one.cpu() for one in lens_logits(source, record[layer][0, :n_tokens])])
            if n_tokens
            else output
        )
        log_p = logits.float().cpu().log_softmax(dim=-1)
        own = log_p.gather(1, tokens.cpu()[:, None])
        best = log_p.topk(top, dim=-1)
        ids.append(best.indices.numpy())
        shares.append(best.values.exp().numpy())
        ranks.append((log_p > own).sum(dim=-1).numpy() + 1)
        p.append(own[:, 0].exp().numpy())
    known, numbers = np.unique(np.stack(ids, axis=1), return_inverse=True)
    kind = np.min_scalar_type(max(len(known) - 1, 0))
    arrays: Arrays = {
        "lens_id": numbers.reshape(n_tokens, len(ids), top).astype(kind),
        "lens_p": np.rint(255 * np.sqrt(np.stack(shares, axis=1))).astype(np.uint8),
        "rank": np.stack(ranks, axis=1).astype(np.uint32),
        "p": np.stack(p, axis=1).astype(np.float32),
        "log_p": output.cpu().gather(1, tokens.cpu()[:, None])[:, 0].numpy().astype(np.float32),
    }
    return arrays, [token_name(source.tokenizer, int(one)) for one in known]


def token_name(tokenizer: Any, token: int) -> str:
    """A token by itself as a reader may know it: its text, or its name where it has none."""
    text = str(tokenizer.decode([token])).strip()
    if text and "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens([token])[0])


def pieces(tokenizer: Any, tokens: Sequence[int], text: str, spans: Sequence[tuple[int, int]]) -> list[list[str]]:
    """Per token (its piece of the text, its name); the pieces put together are the text.

    Of tokens that make up one character together, the first has it.
    """
    found, end = [], 0
    for token, (_, stop) in zip(tokens, spans, strict=True):
        found.append([text[end : max(stop, end)], token_name(tokenizer, token)])
        end = max(end, stop)
    return found


def _tokens(
    predictions: Mapping[tuple[str, str], pd.DataFrame], condition: str, data: Dataset, item: Item
) -> list[int]:
    return [int(token) for token in _row(predictions, condition, data, item)["tokens"]]


def _row(predictions: Mapping[tuple[str, str], pd.DataFrame], condition: str, data: Dataset, item: Item) -> Any:
    rows = predictions[condition, data.name]
    return rows[rows["item"] == item.id].iloc[0]


def _truth(data: Dataset, item: Item) -> list[str] | None:
    truth = data.truth
    return None if truth is None else sorted(truth.objects[truth.resolve(item.image_id)])


def _labels(labels: pd.DataFrame | None, n_tokens: int) -> list[str]:
    """Per token its label."""
    found = ["other"] * n_tokens
    for row in () if labels is None else labels.to_dict("records"):
        found[int(row["token"])] = str(row["label"])
    return found


def _mentions(data: Dataset, item: Item, text: str) -> list[list[Any]]:
    """The mentions of objects in a caption: [start, end, category, whether it is in the image]."""
    if data.task != "captions" or data.truth is None or data.synonyms is None:
        return []
    present = data.truth.objects[data.truth.resolve(item.image_id)]
    return [[one.start, one.end, one.category, one.category in present] for one in data.synonyms.mentions(text)]


# -- signals ------------------------------------------------------------------------------------------------------------


def _signals(
    plan: Plan,
    vlm: VLM,
    batch: Batch,
    labels: pd.DataFrame | None,
    named: list[int],
    data: Dataset,
    item: Item,
    tables: Mapping[str, pd.DataFrame],
) -> dict[str, Any]:
    """The token ledger's signals of every named object, from the run's own ledger where it has one: names, rows, and a note."""
    condition = plan.conditions[0].name
    ledger = ledger_table(plan, tables, condition, data.name)
    if ledger is not None:
        return _signal_rows(ledger[ledger["item"].astype(str) == item.id], "run")
    if labels is None or not named:
        return {"names": [], "rows": [], "source": "none", "note": "no word of this text names a known object"}
    if LEDGER not in registry.names("probe"):
        return {"names": [], "rows": [], "source": "none", "note": f"the probe {LEDGER} is not installed"}
    probe = registry.create("probe", LEDGER)
    try:
        vlm.measure(probe, batch, [labels])
        return _signal_rows(probe.ledger(), "item")
    except SlitlampError as error:  # families that some signals cannot be read in say so
        return {"names": [], "rows": [], "source": "none", "note": str(error)}


def ledger_table(plan: Plan, tables: Mapping[str, pd.DataFrame], condition: str, dataset: str) -> pd.DataFrame | None:
    """The run's own ledger of a condition and data set; None where no probe of the run made one."""
    for key, probe in plan.probes.items():
        frame = tables.get(f"{key}_ledger")
        if type(probe).__name__ == LEDGER and frame is not None and plan.measures(condition, dataset):
            return frame[(frame["condition"] == condition) & (frame["dataset"] == dataset)]
    return None


_FACTS: Final = ("condition", "dataset", "item", "image", "token", "word", "label", "category")
_NO_SIGNAL: Final = ("random", "combined")
"""Columns of the ledger that are no signal of one token: a drawn number, and what is fitted to all of them."""


def _signal_rows(ledger: pd.DataFrame, source: str) -> dict[str, Any]:
    names = [str(one) for one in ledger if one not in (*_FACTS, *_NO_SIGNAL)]
    known = [name for name in names if ledger[name].notna().any()]
    rows = [
        {
            "token": int(row["token"]),
            "word": str(row["word"]),
            "label": str(row["label"]),
            "category": str(row["category"]),
            "values": [float(row[name]) if np.isfinite(row[name]) else None for name in known],
        }
        for row in ledger.to_dict("records")
    ]
    return {"names": known, "rows": rows, "source": source, "note": None}


# -- conditions ---------------------------------------------------------------------------------------------------------


def _conditions(
    plan: Plan,
    vlm: VLM,
    batch: Batch,
    data: Dataset,
    item: Item,
    predictions: Mapping[tuple[str, str], pd.DataFrame],
    tables: Mapping[str, pd.DataFrame],
    tokens: list[int],
    log_p: Array,
) -> tuple[Array, list[dict[str, Any]]]:
    """What each condition says, and how much likelier it finds each token of the reference's text: nats [condition, token]."""
    changes, found = [], []
    first: list[str] = []
    for number, condition in enumerate(plan.conditions):
        text = str(_row(predictions, condition.name, data, item)["text"])
        mentions = _mentions(data, item, text)
        objects = list(dict.fromkeys(str(one[2]) for one in mentions))
        first = objects if number == 0 else first
        change, note = (
            (np.zeros(len(tokens)), None) if number == 0 else likelihood_change(vlm, condition, batch, tokens, log_p)
        )
        changes.append(change)
        found.append(
            {
                **{"name": condition.name, "role": condition.role, "control_of": condition.control_of},
                **{"text": text, "mentions": mentions, "note": note},
                "added": [one for one in objects if one not in first],
                "dropped": [one for one in first if one not in objects],
                "score": _score(data, item, condition, text, tables),
            }
        )
    return np.stack(changes).astype(np.float32), found


def _score(
    data: Dataset, item: Item, condition: Condition, text: str, tables: Mapping[str, pd.DataFrame]
) -> dict[str, Any]:
    """CHAIR's counts of a caption, or how an answer is read and whether that is right."""
    if data.task == "pope":
        answer = parse_answer(text, "official")
        return {"answer": answer, "right": None if item.label is None else answer == item.label}
    rows = tables["chair_rows"]
    own = rows[(rows["condition"] == condition.name) & (rows["dataset"] == data.name)]
    row = own[own["image_id"].astype(str) == str(item.image_id)].iloc[0]
    return {name: int(row[name]) for name in ("n_mentions", "n_hallucinated", "n_true_mentioned", "n_true_objects")}


def likelihood_change(
    vlm: VLM, condition: Condition, batch: Batch, tokens: list[int], log_p: Array
) -> tuple[Array, str | None]:
    """Log-probability of given tokens under a condition minus that under the reference, in nats; NaN with a note where a
    forward pass cannot say it, -inf where the condition excludes a token.
    """
    nothing = np.full(len(tokens), np.nan)
    if any(isinstance(one, BacktrackingDecoding) for one in condition.interventions):
        return nothing, "goes back while it writes: over a given text it changes nothing"
    try:
        with vlm.apply(*condition.interventions):
            logits = vlm.forward(batch, logits_to_keep=len(tokens) + 1).logits
    except SlitlampError as error:
        return nothing, f"cannot run over a given text: {error}"
    output = logits[0, logits.shape[1] - len(tokens) - 1 : -1].float().log_softmax(dim=-1).cpu()
    own = output.gather(1, torch.tensor(tokens, dtype=torch.int64)[:, None])[:, 0].numpy()
    return own - log_p, None
