"""What the report's viewer shows of some items of a run, recorded item by item into `viewer/` of the run folder.

- `viewer/00000.safetensors` and so on, one per item: the arrays of `slitlamp.experiments.viewer_detail` (attention) and
  `slitlamp.experiments.viewer_record` (lens [token, layer + 1], log-probabilities [token], `change` [condition, token] in
  nats), the picture's bytes, and in the metadata the header as JSON: texts, tokens, labels, mentions, signals, conditions.
- `viewer/index.json`: how many items there are and how they were chosen; written last.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from slitlamp.errors import InputError, RunFolderError, unknown
from slitlamp.experiments import storage
from slitlamp.experiments.datasets import Dataset, Item
from slitlamp.experiments.folder import VIEWER
from slitlamp.experiments.viewer_detail import MAX_BYTES, Arrays, fitted, packed, picture_bytes
from slitlamp.experiments.viewer_record import Shown, record
from slitlamp.progress import progress_bar

if TYPE_CHECKING:
    from slitlamp.experiments.plan import Plan
    from slitlamp.models import Batch
    from slitlamp.vlm import VLM

logger = logging.getLogger(__name__)

N_ITEMS: Final = 12
INDEX: Final = "index.json"
_PICTURE_SHARE: Final = 1 / 3
"""Of an item's bytes, what its picture may take."""

Chosen = list[tuple[Dataset, Item]]
Tables = Mapping[str, pd.DataFrame]


def make_viewer(plan: Plan, vlm: VLM, predictions: Mapping[tuple[str, str], pd.DataFrame], tables: Tables) -> None:
    """Write `viewer/index.json` and one file per item; an item that is there is not made again.

    An item may take its share of the bytes that the items before it have left.
    """
    chosen, rule = choose(plan, tables)
    folder = plan.folder.path / VIEWER
    left = float(MAX_BYTES)
    with progress_bar(plan.experiment.progress) as bar:
        task = bar.add_task("viewer", total=len(chosen))
        for number, path in enumerate(item_paths(plan.folder.path, len(chosen))):
            data, item = chosen[number]
            if not _is_there(path, data, item):
                shown, batch = record(plan, vlm, data, item, predictions, tables)
                _write(path, shown, batch, left / (len(chosen) - number))
            left -= size_in_page(*read_item(path))
            bar.advance(task)
    storage.write_json(folder / INDEX, {"n_items": len(chosen), "rule": rule})


def _write(path: Path, shown: Shown, batch: Batch, share: float) -> None:
    """Write one item in as much detail as fits into its share of bytes."""
    picture, kind = picture_bytes(batch.seen(0), share * _PICTURE_SHARE) if batch.images[0] else (b"", "")
    most = share - len(picture) * 4 / 3
    header, arrays = fitted({**shown.header, "picture": kind}, shown.arrays, shown.maps, shown.named, most)
    content = {**arrays, "picture": np.frombuffer(picture, dtype=np.uint8)}
    storage.write_arrays(path, content, {"header": json.dumps(header, ensure_ascii=False)})


def _is_there(path: Path, data: Dataset, item: Item) -> bool:
    """Whether an item has been recorded whole."""
    if not path.is_file():
        return False
    try:
        header, _, _ = read_item(path)
    except (RunFolderError, KeyError, ValueError):
        logger.warning("the stored item %s cannot be read and is recorded again", path.name)
        return False
    return (header["dataset"], header["item"]) == (data.name, item.id)


def read_item(path: Path) -> tuple[dict[str, Any], Arrays, bytes]:
    """The header, the arrays and the picture of an item of `make_viewer`.

    Raises:
        RunFolderError: the file cannot be read.
    """
    arrays, metadata = storage.read_arrays(path)
    picture = arrays.pop("picture").tobytes()
    return dict(json.loads(metadata["header"])), arrays, picture


def read_index(run_folder: Path) -> dict[str, Any] | None:
    """How many items the viewer of a run has and how they were chosen; None for a run without one."""
    path = run_folder / VIEWER / INDEX
    return dict(storage.read_json(path)) if path.is_file() else None


def item_paths(run_folder: Path, n_items: int) -> list[Path]:
    """The files of the items in their order."""
    return [run_folder / VIEWER / f"{number:05d}.safetensors" for number in range(n_items)]


def size_in_page(header: Mapping[str, Any], arrays: Arrays, picture: bytes) -> int:
    """Bytes that an item takes in a page."""
    return -(-len(packed(header, arrays)) // 3) * 4 + -(-len(picture) // 3) * 4


# -- choosing -----------------------------------------------------------------------------------------------------------


def check_items(wanted: bool | int | Sequence[str], datasets: Sequence[Dataset]) -> None:
    """Refuse what the viewer cannot show.

    Raises:
        InputError: a number below 1, or no id in a list.
        UnknownNameError: an id that no data set has.
    """
    if isinstance(wanted, bool):
        return
    if isinstance(wanted, int):
        if wanted < 1:
            raise InputError(f"'viewer' must be true, a number of items of 1 or more, or a list of ids; found {wanted}")
        return
    if not wanted:
        raise InputError("'viewer' is an empty list; name items, or leave it out")
    for one in wanted:
        _find(str(one), datasets)


def _find(name: str, datasets: Sequence[Dataset]) -> tuple[Dataset, Item]:
    """An item by its id, or by `data set:id` where several data sets have the id; of those the first is meant."""
    for data in datasets:
        for item in data.items:
            if name in (item.id, f"{data.name}:{item.id}"):
                return data, item
    raise unknown("item in 'viewer'", name, [item.id for data in datasets for item in data.items])


def choose(plan: Plan, tables: Tables) -> tuple[Chosen, str]:
    """The items to be shown, and how they were chosen, in a sentence.

    A number takes the first items of the first caption data set (of the first data set, where none asks for captions): half
    of them with a hallucinated object or a wrong answer under the reference, as far as there are so many.
    """
    wanted = plan.experiment.viewer
    if not isinstance(wanted, bool | int):
        chosen = [_find(str(one), plan.datasets) for one in wanted]
        return chosen, f"{len(chosen)} items named in the configuration."
    n_wanted = N_ITEMS if isinstance(wanted, bool) else wanted
    data = next((one for one in plan.datasets if one.task == "captions"), plan.datasets[0])
    wrong = _wrong(plan, data, tables)
    odd = [item for item in data.items if item.id in wrong]
    even = [item for item in data.items if item.id not in wrong]
    n_odd = min(len(odd), max(-(-n_wanted // 2), n_wanted - len(even)))
    n_even = min(len(even), n_wanted - n_odd)
    kept = {item.id for item in (*odd[:n_odd], *even[:n_even])}
    what = "whose caption names an object that is not there" if data.task == "captions" else "answered wrongly"
    parts = [f"{n_odd} {what} under {plan.conditions[0].name}"] if n_odd else []
    parts += [f"{n_even} {'others' if n_odd else 'of those that are right'}"] if n_even else []
    rule = f"{len(kept)} of the {len(data)} items of {data.name}: the first {' and the first '.join(parts)}."
    return [(data, item) for item in data.items if item.id in kept], rule


def _wrong(plan: Plan, data: Dataset, tables: Tables) -> set[str]:
    """Ids of the items with a hallucinated object or a wrong answer under the reference."""
    name = "chair_rows" if data.task == "captions" else "pope_items"
    rows = tables[name]
    own = rows[(rows["condition"] == plan.conditions[0].name) & (rows["dataset"] == data.name)]
    if data.task == "captions":
        images = set(own["image_id"][own["n_hallucinated"] > 0].astype(str))
        return {item.id for item in data.items if str(item.image_id) in images}
    return set(own["question_id"][~own["correct_official"]].astype(str))
