"""How results look in Jupyter: self-contained HTML of a bounded size, which says what it leaves out."""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Iterator, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, ParamSpec

import pandas as pd

from slitlamp.errors import SlitlampError
from slitlamp.experiments.summary import summary
from slitlamp.experiments.viewer_detail import Cells, Maps, fitted, picture_bytes
from slitlamp.experiments.viewer_record import maps_of, token_name
from slitlamp.reports import viewer
from slitlamp.reports.figures import to_png
from slitlamp.reports.wording import count

if TYPE_CHECKING:
    from PIL.Image import Image

    from slitlamp.decoding import Generation
    from slitlamp.experiments import Run
    from slitlamp.tracing import ProbeResult, Trace

MOST_ITEMS: Final = 8
MOST_BYTES: Final = 1_500_000
_PICTURE: Final = 24_000
_ROWS: Final = 20
_FRAME_HEIGHT: Final = 900
_QUERIES: Final = ("before_generated", "generated", "last")

P = ParamSpec("P")


def _shown(make: Callable[P, Iterator[str]]) -> Callable[P, str]:
    """Put the parts of a display together, up to `MOST_BYTES`; what fails is said in place of it."""

    @functools.wraps(make)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> str:
        parts: list[str] = []
        left = MOST_BYTES
        dropped = 0
        try:
            for part in make(*args, **kwargs):
                if len(part) > left:
                    dropped += 1
                    continue
                parts.append(part)
                left -= len(part)
        except Exception as error:  # noqa: BLE001 (a display must not raise: it says what it could not show)
            parts.append(_note(f"The rest cannot be shown: {type(error).__name__}: {error}"))
        if dropped:
            parts.append(_note(f"{count(dropped, 'part')} left out: a display holds {MOST_BYTES / 1e6:.1f} MB."))
        return f'<div style="max-width:72rem">{"".join(parts)}</div>'

    return wrapper


@_shown
def generation_html(generation: Generation) -> Iterator[str]:
    """Each picture beside the text about it, with its tokens told apart."""
    n = len(generation.texts)
    yield _bold(f"Generation of {count(n, 'text')}")
    back = generation.tracebacks or ((),) * n
    for row in range(min(n, MOST_ITEMS)):
        pictures = "".join(_picture(one) for one in generation.batch.images[row])
        n_back = sum(not one.capped for one in back[row])
        facts = [
            f"{count(len(generation.tokens[row]), 'token')}",
            "ended by itself" if generation.stopped[row] else "cut off at the limit",
            *([f"{generation.n_image[row]} image tokens"] if generation.n_image else []),
            *([f"went back {count(n_back, 'time')}"] if n_back else []),
        ]
        text = _tokens(generation.texts[row], generation.spans[row], generation.tokens[row])
        yield (
            '<div style="display:flex;gap:12px;margin:8px 0;align-items:flex-start;flex-wrap:wrap">'
            f'<div style="flex:none">{pictures}</div><div style="flex:1 1 18rem;min-width:0">'
            f"{_note(str(generation.batch.ids[row]))}"
            f'<div style="line-height:1.9;white-space:pre-wrap">{text}</div>{_note("; ".join(facts))}</div></div>'
        )
    if n > MOST_ITEMS:
        yield _note(f"{n - MOST_ITEMS} more are not shown.")


@_shown
def trace_html(trace: Trace) -> Iterator[str]:
    """A table of the recordings, and attention over the image to look into, where it was recorded token by token."""
    if trace.batch is None:
        yield _bold("Trace") + _note(f"Nothing has run yet. To be recorded: {', '.join(trace.sites)}.")
        return
    yield _bold(
        f"Trace of {count(trace.batch.size, 'row')}, {count(len(trace.steps), 'forward call')}, {trace.nbytes() / 1e6:.1f} MB"
    )
    rows = []
    for label, site in trace.sites.items():
        record = trace.record(label)
        one = {"recording": label, "site": site.name, "layers": _ranges(record.layers), "axes": ", ".join(record.axes)}
        parts = [record[layer] for layer in record.layers]
        shape = " × ".join(map(str, parts[0].shape)) if parts else "nothing"
        rows.append({**one, "shape of a layer": shape, "MB": f"{sum(p.nbytes for p in parts) / 1e6:.2f}"})
    yield _table(pd.DataFrame(rows), index=False)
    yield from _attention(trace)


@_shown
def probe_html(result: ProbeResult) -> Iterator[str]:
    """What a probe found: its sentence, its figures, its tables."""
    yield _bold(result.name) + f"<p>{escape(result.summary)}</p>"
    try:
        figures = result.figures()
    except (SlitlampError, KeyError, ValueError) as error:
        figures = {}
        yield _note(f"The figures cannot be drawn: {error}")
    for number, (name, drawn) in enumerate(figures.items()):
        if number < MOST_ITEMS:
            uri = base64.b64encode(to_png(drawn, dpi=110)).decode()
            yield (
                f'<figure style="margin:8px 0"><img alt="{escape(name)}" style="max-width:100%;background:white" '
                f'src="data:image/png;base64,{uri}"></figure>'
            )
    if len(figures) > MOST_ITEMS:
        yield _note(f"{len(figures) - MOST_ITEMS} more figures are not shown: {', '.join(list(figures)[MOST_ITEMS:])}.")
    yield from _folded(result.tables.items())


@_shown
def run_html(run: Run) -> Iterator[str]:
    """What a run found in a few lines, where its report is, and its tables."""
    yield _bold(f"Run in {run.folder} ({'finished' if run.finished else 'not finished: run it again to go on'})")
    if not run.finished:
        return
    lines = "".join(f"<li>{escape(line)}</li>" for line in summary(run))
    yield f'<ul style="margin:4px 0">{lines}</ul>'
    report = run.folder / "report.html"
    yield _note(f"Report: {report}" if report.is_file() else "No report yet: run.report() writes one.")
    names = run.table_names
    yield from _folded((name, run.table(name)) for name in names)


# -- pieces -------------------------------------------------------------------------------------------------------------


def _bold(text: str) -> str:
    return f'<div style="font-weight:600;margin:4px 0">{escape(text)}</div>'


def _note(text: str) -> str:
    return f'<div style="opacity:.7;font-size:.9em;margin:2px 0">{escape(text)}</div>'


def _picture(image: Image) -> str:
    content, kind = picture_bytes(image, _PICTURE)
    uri = base64.b64encode(content).decode()
    return (
        '<img alt="the image that the model was given" style="width:128px;height:auto;display:block;margin:0 0 4px;'
        f'image-rendering:{"pixelated" if image.width < 128 else "auto"}" src="data:image/{kind};base64,{uri}">'
    )


def _tokens(text: str, spans: Sequence[tuple[int, int]], tokens: Sequence[int]) -> str:
    """A text with every token underlined by itself; its id is the tooltip."""
    parts, end = [], 0
    line = "border-bottom:2px solid rgba(128,128,128,.55);margin-right:1px"
    for token, (start, stop) in zip(tokens, spans, strict=True):
        if stop <= end:  # a special token, or the rest of a character that another has begun
            parts.append(f'<span style="opacity:.55;{line}" title="token {token}">‹{token}›</span>')
            continue
        begin = max(start, end)
        parts.append(escape(text[end:begin]))
        parts.append(f'<span style="{line}" title="token {token}">{escape(text[begin:stop])}</span>')
        end = stop
    return "".join(parts)


def _table(frame: pd.DataFrame, *, index: bool) -> str:
    html = frame.to_html(index=index, border=0, escape=True, float_format=lambda value: f"{value:.4g}")
    return f'<div style="overflow-x:auto;max-width:100%">{html}</div>'


def _folded(tables: Any) -> Iterator[str]:
    """Each table behind its name, with as many rows as fit."""
    for name, frame in tables:
        rows, columns = frame.shape
        more = _note(f"The first {_ROWS} of {rows} rows.") if rows > _ROWS else ""
        size = f"{count(rows, 'row')} × {count(columns, 'column')}"
        yield (
            f'<details style="margin:2px 0"><summary style="cursor:pointer">{escape(str(name))} ({size})</summary>'
            f"{_table(frame.head(_ROWS), index=False)}{more}</details>"
        )


def _ranges(layers: Sequence[int]) -> str:
    """Layers in words: 0-3, 6."""
    parts: list[list[int]] = []
    for one in layers:
        if parts and one == parts[-1][1] + 1:
            parts[-1][1] = one
        else:
            parts.append([one, one])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "none"


# -- attention ----------------------------------------------------------------------------------------------------------


def _attention(trace: Trace) -> Iterator[str]:
    """A viewer of the first recording of attention over image tokens whose queries and keys are whole."""
    assert trace.batch is not None
    fitting = [
        label
        for label, site in trace.sites.items()
        if site.name in ("attention", "cross_attention")
        and {"query", "key"} <= set(trace.record(label).axes)
        and (isinstance(site.keys, str) and site.keys == "image")
        and (isinstance(site.queries, str) and site.queries in _QUERIES)
        and trace.record(label).layers
    ]
    if not fitting:
        return
    rows = [row for row in range(trace.batch.size) if len(trace.batch.patches[row])][:MOST_ITEMS]
    if not rows:
        return
    # quotes and ampersands of the frame's attribute take more than they do in a page; pictures and the script are beside it
    share = 0.6 * MOST_BYTES / len(rows)
    entries = [_entry(trace, fitting[0], row, share) for row in rows]
    left = trace.batch.size - len(rows)
    yield _note(
        f"{fitting[0]}: attention over the image, row by row."
        + (f" {count(left, 'more row')} not shown." if left else "")
        + (f" Also recorded: {', '.join(fitting[1:])}." if fitting[1:] else "")
    )
    yield frame(entries)


def _entry(trace: Trace, label: str, row: int, share: float) -> viewer.Entry:
    """One row of a batch for the viewer: attention, picture, and names of the tokens that its queries go with."""
    assert trace.batch is not None
    record, patches = trace.record(label), trace.batch.patches[row]
    real = record.mask[row].cpu().numpy()
    per_head = "head" in record.axes
    parts = []
    for layer in record.layers:
        one = record[layer][row].float().cpu().numpy()
        parts.append((one if per_head else one[None])[:, real[: one.shape[-2]], : len(patches)])
    names = _names(trace, label, row, parts[0].shape[1])
    maps: Maps = maps_of(parts, Cells.of(patches), record.layers, per_head)
    picture, kind = b"", ""
    if trace.batch.images[row]:
        picture, kind = picture_bytes(trace.batch.seen(row), share / 4)
    anatomy = trace.source.anatomy if trace.source is not None else None
    header = {
        "item": str(trace.batch.ids[row]),
        "text": " ".join(names),
        "tokens": [[f" {name}", name] for name in names],
        "labels": ["other"] * len(names),
        "n_layers": anatomy.n_layers if anatomy is not None else max(record.layers) + 1,
    }
    head, arrays = fitted(header, {}, maps, [], share - len(picture) * 4 / 3)
    return viewer.Entry(head, arrays, picture, kind)


def _names(trace: Trace, label: str, row: int, n_queries: int) -> list[str]:
    """What to call the queries: the tokens that they predict or are, where the trace knows them."""
    assert trace.batch is not None
    batch, queries = trace.batch, trace.sites[label].queries
    if trace.source is None:
        return [f"query {number}" for number in range(n_queries)]
    written = () if trace.generated is None else trace.generated[row]
    ids = written if trace.decoding else batch.input_ids[row][batch.generated_mask[row]].tolist()
    known = [token_name(trace.source.tokenizer, int(one)) for one in ids]
    if queries == "last" and not trace.decoding:
        known = [f"after {known[-1]}" if known else "after the prompt"]
    if not known:
        known = ["after the prompt"]
    return known[:n_queries] + [f"query {number}" for number in range(len(known), n_queries)]


def frame(entries: Sequence[viewer.Entry]) -> str:
    """The viewer in a frame of its own, which cannot reach the page around it."""
    base = (resources.files("slitlamp.reports") / "templates" / "report.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src '
        f"'unsafe-inline'; script-src {viewer.script_source()}; base-uri 'none'; form-action 'none'\">"
        f'<meta name="color-scheme" content="light dark"><style>{base}{viewer.style_sheet()}'
        "body { max-width: none; padding: 0.5rem; }</style></head>"
        '<body><div class="viewer" data-source="viewer-data" hidden></div>'
        f'<script type="application/json" id="viewer-data">{viewer.page_data(entries, keep_address=False)}</script>'
        f"<script>{viewer.script()}</script></body></html>"
    )
    return (
        '<iframe sandbox="allow-scripts" title="attention over the image" '
        f'style="width:100%;height:{_FRAME_HEIGHT}px;border:1px solid rgba(128,128,128,.4);border-radius:6px" '
        f'srcdoc="{escape(page)}"></iframe>'
    )
