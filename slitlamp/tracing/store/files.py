"""Writing the files of an activation store, so that each is whole or absent."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slitlamp.errors import InputError, StoreError
from slitlamp.tracing.store.format import MANIFEST, PARTIAL, Checksum, read_manifest

_SMALL = 1 << 17
_GROUP = 1 << 22
"""Bytes whose checksum is computed at once."""
_BEHIND = 4
"""How many such groups the checksum may be behind the writing; joined small parts stay in memory so long."""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors of the file system as StoreErrors that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why = "the disk is full. Everything stored before is safe: free some space, run again, and it goes on"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            why = f"{error.strerror}. Give a folder that can be written"
        else:
            why = str(error.strerror or error)
        raise StoreError(f"cannot write {path}: {why}") from error


def _sync_folder(folder: Path) -> None:
    """Make a renaming durable; file systems that cannot do this for a folder are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_manifest(folder: Path, manifest: Mapping[str, Any], writer: str) -> dict[str, Any]:
    """Write the manifest unless there is one.

    Returns:
        That of the folder: another writer may have been there first.

    Raises:
        StoreError: the folder cannot be made or written.
    """
    path = folder / MANIFEST
    temporary = folder / f".{MANIFEST}.{writer}{PARTIAL}"
    with _explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        # what a killed process left may be a link to the manifest itself, which to open would be to empty
        temporary.unlink(missing_ok=True)
        try:
            with temporary.open(
                "wb"
            ) as stream:  # also where there is a manifest: it shows that the folder can be written
                stream.write((json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(temporary, path)  # unlike a renaming, never over one that is there
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                if not path.exists():
                    os.replace(temporary, path)
            _sync_folder(folder)
        finally:
            temporary.unlink(missing_ok=True)
    return read_manifest(folder)


@dataclass(frozen=True, eq=False)
class Entry:
    """One tensor of a shard, in parts.

    Attributes:
        dtype, shape: of the whole.
        parts: contiguous CPU tensors of that dtype whose numbers, one after another, are the tensor's.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Sequence[Tensor]


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, entry in entries.items():
        end = start + sum(part.nbytes for part in entry.parts)
        table[name] = {"dtype": _DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """The parts, small ones joined."""
    waiting: list[Tensor] = []
    size = 0
    for part in parts:
        if part.nbytes >= _SMALL and not waiting:
            yield part.reshape(-1)
            continue
        waiting.append(part.reshape(-1))
        size += part.nbytes
        if size >= _SMALL:
            yield torch.cat(waiting)
            waiting, size = [], 0
    if waiting:
        yield torch.cat(waiting)


def _groups(entries: Iterable[Entry]) -> Iterator[list[memoryview]]:
    """The bytes of tensors, one after another, in groups of some megabytes."""
    group: list[memoryview] = []
    size = 0
    for entry in entries:
        for chunk in _chunks(entry.parts):
            group.append(memoryview(chunk.view(torch.uint8).numpy()))  # type: ignore[arg-type]  # no Buffer before 3.12
            size += len(group[-1])
            if size >= _GROUP:
                yield group
                group, size = [], 0
    if group:
        yield group


def write_shard(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Write tensors as a safetensors file that is whole or absent.

    The file is what `safetensors.torch.save_file` would write; that function needs every tensor in one piece, which would take
    the memory of the shard once more. The checksum is computed in a second thread, meanwhile. It is there to find damage, for
    which CRC-32 will do: it takes 0.15 s per GB where SHA-256 takes 0.5 s, and 2.5 s on processors without instructions for it.

    Returns:
        The size of the file and its CRC-32.

    Raises:
        StoreError: the file cannot be written; nothing of it is left.
    """
    # as safetensors does: wide numbers first, so that every tensor is aligned
    ordered = dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    header = _header(ordered, metadata)
    size, checksum = len(header), Checksum()
    checksum.update(memoryview(header))
    with _explained(path), ThreadPoolExecutor(1) as pool:
        try:
            behind: deque[Future[None]] = deque()
            with temporary.open("wb", buffering=0) as stream:
                _write(stream.fileno(), memoryview(header))
                for group in _groups(ordered.values()):
                    behind.append(pool.submit(_update, checksum, group))
                    for view in group:
                        _write(stream.fileno(), view)
                        size += len(view)
                    if len(behind) > _BEHIND:
                        behind.popleft().result()
                os.fsync(stream.fileno())
            while behind:
                behind.popleft().result()
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return size, str(checksum)


def open_locked(path: Path) -> int:
    """Open an index to be added to, by one process at a time.

    Raises:
        InputError: another process has it open.
        StoreError: it cannot be written.
    """
    with _explained(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(
            f"{path} is being written; processes that store at the same time need names of their own (writer=rank)"
        ) from error
    except (ImportError, OSError):  # no locks on this system or file system
        pass
    return handle


def append_line(handle: int, path: Path, line: bytes) -> None:
    """Add a line to an index, durably.

    Raises:
        StoreError: it cannot be written; what was written of it is taken back.
    """
    before = os.fstat(handle).st_size
    with _explained(path):
        try:
            _write(handle, memoryview(line))
            os.fsync(handle)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, before)
            raise


def _write(handle: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(handle, data) :]


def _update(checksum: Checksum, group: Sequence[memoryview]) -> None:
    for view in group:
        checksum.update(view)
