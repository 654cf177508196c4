"""Files that are either whole or absent, and whose bytes depend on nothing but their content."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import yaml
from safetensors import SafetensorError, safe_open

from slitlamp.errors import InputError, RunFolderError

TEMPORARY = ".partial"
_TEXT = "text:"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file in one step: a reader, or a run that starts after a kill, sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}") from error
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable; file systems that cannot do this for a folder are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_partial(folder: Path) -> None:
    """Delete what a killed run left half-written anywhere under `folder`."""
    for path in folder.rglob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON. Raises InputError with the line when it is malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error


def write_yaml(path: Path, value: Any) -> None:
    """Write a value as YAML, keys in their order."""
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    write_bytes(path, text.encode())


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as parquet whose bytes are the same whenever its values are (no time stamps, no metadata)."""
    write_tables(path, [frame])


def write_tables(path: Path, frames: Iterator[pd.DataFrame] | list[pd.DataFrame]) -> int:
    """Write the rows of several frames with the same columns to one parquet file, one frame in memory at a time.

    Returns the number of rows. The types of the columns are those of the first frame.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    writer: pq.ParquetWriter | None = None
    rows = 0
    try:
        for frame in frames:
            table = pa.Table.from_pandas(frame, preserve_index=False)
            if writer is None:
                schema = pa.schema([pa.field(field.name, _concrete(field.type)) for field in table.schema])
                writer = pq.ParquetWriter(temporary, schema, compression="zstd", version="2.6")
            writer.write_table(table.replace_schema_metadata(None).cast(writer.schema))
            rows += len(frame)
        if writer is None:
            raise ValueError(f"no frame to write to {path.name}")
        writer.close()
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return rows


def _concrete(kind: pa.DataType) -> pa.DataType:
    """A column that is empty in the first frame has no type of its own; texts are what such columns hold here."""
    return pa.string() if pa.types.is_null(kind) else kind


def read_table(path: Path) -> pd.DataFrame:
    """Read a table of `write_table`."""
    return pq.read_table(path).to_pandas()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write named arrays as safetensors; arrays of texts travel as JSON."""
    packed = {}
    for name, array in arrays.items():
        value = np.asarray(array, order="C")
        if value.dtype.kind in "UO":
            text = json.dumps({"shape": value.shape, "values": [None if v is None else str(v) for v in value.ravel()]})
            packed[_TEXT + name] = np.frombuffer(text.encode(), dtype=np.uint8).copy()
        else:
            packed[name] = value
    write_bytes(path, safetensors.numpy.save(packed, metadata=dict(metadata or {})))


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of a file of `write_arrays`."""
    arrays: dict[str, np.ndarray] = {}
    try:
        with safe_open(path, framework="numpy") as stream:
            metadata = dict(stream.metadata() or {})
            for key in stream.keys():  # noqa: SIM118 (not a mapping)
                value = stream.get_tensor(key)
                if key.startswith(_TEXT):
                    text = json.loads(value.tobytes())
                    value = np.array(text["values"], dtype=object).reshape(text["shape"])
                    value = value if None in text["values"] else value.astype(str)
                arrays[key.removeprefix(_TEXT)] = value
    except (SafetensorError, OSError) as error:
        raise RunFolderError(f"cannot read {path}: {error}") from error
    return arrays, metadata
