"""The files of an activation store: a manifest, shards, and per writer an index of its shards.

    manifest.json                     what was recorded, of which model: written once
    shard-0-00000.safetensors         recordings of some items
    index-0.jsonl                     a line per shard of writer 0: its items, its bytes, its CRC-32

A shard gets its name when it is whole and on the disk, and its line after that: a shard without a line, and a line without its
end, are what a killed process leaves behind, and count for nothing.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slitlamp.errors import InputError, StoreError

SCHEMA = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial"


@dataclass(frozen=True)
class ShardSite:
    """What a shard holds of one recording.

    Attributes:
        shape: of one unit (an item; of a vision site, a tile); None along an axis where units differ.
        dtype: torch's name of it; None where no unit has any number.
        tiles: of a vision site, per item, its number of tiles; None of other sites, which have one unit per item.
    """

    shape: tuple[int | None, ...]
    dtype: str | None
    tiles: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Shard:
    """A line of an index.

    Attributes:
        file: name of the shard.
        ids: its items, in order.
        size: of the file, in bytes.
        crc32: of the file.
        sites: by label.
        run: what all runs of a store must share: whether they generated, and the interventions in force.
    """

    file: str
    ids: tuple[str, ...]
    size: int
    crc32: str
    sites: Mapping[str, ShardSite]
    run: Mapping[str, Any] = field(default_factory=dict)

    def line(self) -> bytes:
        """As a line of JSON."""
        return (json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":")) + "\n").encode()

    @staticmethod
    def of(line: bytes) -> Shard:
        """From a line of JSON. Raises ValueError, KeyError or TypeError when it is not one."""
        found = json.loads(line)
        sites = {
            label: ShardSite(tuple(one["shape"]), one["dtype"], None if one["tiles"] is None else tuple(one["tiles"]))
            for label, one in found.pop("sites").items()
        }
        return Shard(**{**found, "ids": tuple(found["ids"]), "sites": sites})

    def damage(self, folder: Path) -> str | None:
        """What is wrong with the file as far as its size tells, or None."""
        try:
            size = (folder / self.file).stat().st_size
        except OSError:
            return "the file is missing"
        return None if size == self.size else f"the file has {size} bytes, its index says {self.size}"


def check_writer(name: str | int) -> str:
    """The name of a writer, which is part of file names.

    Raises:
        InputError: characters other than letters, digits, `_` and `-`.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)):
        raise InputError(f"the name of a writer is made of letters, digits, _ and -; found {name!r}")
    return str(name)


def index_path(folder: Path, writer: str) -> Path:
    """The index of a writer."""
    return folder / f"index-{writer}.jsonl"


def shard_name(writer: str, number: int) -> str:
    """The file of a shard."""
    return f"shard-{writer}-{number:05d}.safetensors"


def shard_number(writer: str, name: str) -> int | None:
    """The number of a shard of a writer; None for another file."""
    found = re.fullmatch(rf"shard-{re.escape(writer)}-(\d{{5,}})\.safetensors", name)
    return int(found.group(1)) if found else None


def read_index(path: Path) -> tuple[list[Shard], dict[str, str], int]:
    """The shards of an index.

    Returns:
        The shards; what is wrong with unreadable lines, by "file, line n"; and where the last whole line ends, in bytes:
        what follows is the beginning of a line that a killed process did not finish.
    """
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    shards, damaged = [], {}
    for number, line in enumerate(data[:end].splitlines(), start=1):
        try:
            shards.append(Shard.of(line))
        except (ValueError, KeyError, TypeError) as error:
            damaged[f"{path.name}, line {number}"] = f"the line cannot be read ({type(error).__name__}: {error})"
    return shards, damaged, end


def read_indices(folder: Path) -> tuple[dict[str, list[Shard]], dict[str, str]]:
    """The shards of every writer, and what is wrong with unreadable lines."""
    shards: dict[str, list[Shard]] = {}
    damaged: dict[str, str] = {}
    # writer 10 after writer 2
    for path in sorted(folder.glob("index-*.jsonl"), key=lambda one: (len(one.name), one.name)):
        shards[path.stem.removeprefix("index-")], wrong, _ = read_index(path)
        damaged |= wrong
    return shards, damaged


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest.

    Raises:
        StoreError: there is none, it cannot be read, or a later version of slitlamp wrote it.
    """
    path = folder / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{folder} is no activation store: it has no {MANIFEST}") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {error}") from error
    if found.get("schema") != SCHEMA:
        raise StoreError(
            f"{path}: schema {found.get('schema')!r}; this slitlamp reads schema {SCHEMA}. Read it with slitlamp "
            f"{found.get('slitlamp', 'of its own version')}."
        )
    return found


class Checksum:
    """CRC-32 of bytes that come in pieces; as text, eight hexadecimal digits."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: memoryview) -> None:
        """Take in the next piece."""
        self._value = zlib.crc32(data, self._value)

    def __str__(self) -> str:
        return f"{self._value:08x}"


def checksum_of(path: Path) -> str:
    """The checksum of a file."""
    checksum, buffer = Checksum(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            checksum.update(buffer[:size])
    return str(checksum)
