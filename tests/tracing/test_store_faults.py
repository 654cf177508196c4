"""Killed processes, several writers, damaged shards, full disks and folders that cannot be written.

A writing process is a fork of this one, so that it starts in a millisecond with the model loaded; it is ended by SIGKILL.
"""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

import slitlamp as sl
from slitlamp.errors import InputError, StoreError
from slitlamp.tracing import sites
from slitlamp.tracing.store import files as store_files

if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

IDS = [f"item {number}" for number in range(12)]
SITES = [
    sites.resid_post(),
    sites.attention(queries="text", keys="all", layers=1, label="ragged"),
    sites.vision_resid_post(layers=0),
]


@pytest.fixture
def record(llava, image):
    """A function that stores those of some items that are pending, two at a time, a shard per run."""
    prompts = ["<image> what ?", "<image> describe this .", "what is a dog ?"]

    def run(folder, ids=IDS, **options):
        with llava.trace(*SITES, store=sl.StoreOptions(folder, shard_bytes=1, **options)) as trace:
            pending = trace.pending(ids)
            for pair in zip(pending[::2], pending[1::2], strict=True):
                numbers = [IDS.index(one) for one in pair]
                pictures = [None if number % 3 == 2 else image(number) for number in numbers]
                llava.forward(llava.encode(pictures, [prompts[number % 3] for number in numbers], ids=pair))

    return run


def fork(function):
    """Run a function in a process of its own."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        function()
        status = 0
    finally:
        os._exit(status)


def ended(child):
    """The signal that ended a process; 0 if it ended well."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def undisturbed(record, tmp_path):
    record(tmp_path / "undisturbed")
    return files(tmp_path / "undisturbed")


def test_killed_at_random_moments(record, undisturbed, tmp_path):
    """Killed again and again and continued each time, a store ends with the bytes of one that was not."""
    folder, rng = tmp_path / "store", np.random.default_rng(0)
    kills = 0
    while kills < 8:
        child = fork(lambda: record(folder))
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        if ended(child):
            kills += 1
            check_prefix(folder)
        else:
            shutil.rmtree(folder)
    record(folder)
    assert files(folder) == undisturbed


def check_prefix(folder):
    """A store that a killed process left opens, and holds the first so many items once each, whole."""
    if not (folder / "manifest.json").exists():
        return
    store = sl.open_store(folder)
    assert store.ids == tuple(IDS[: len(store)])
    assert store.verify() == {}


@pytest.mark.parametrize(
    ("call", "calls"),
    # of two shards and a manifest: what every file, its folder and the index need
    [("write", 2 * 7), ("fsync", 2 * 3 + 2), ("replace", 2), ("link", 1), ("unlink", 3)],
)
def test_killed_at_every_call_to_the_file_system(call, calls, record, tmp_path):
    """The n-th call is the last thing that a process does, for every n; a write is cut off in its middle."""
    record(tmp_path / "undisturbed", IDS[:4])
    n = 0
    while True:
        folder = tmp_path / f"store {n}"
        child = fork(lambda n=n, folder=folder: record_until(call, n, lambda: record(folder, IDS[:4])))
        if not ended(child):
            break
        check_prefix(folder)
        record(folder, IDS[:4])
        assert files(folder) == files(tmp_path / "undisturbed")
        n += 1
    assert n >= calls


def record_until(call, n, function):
    original, calls = getattr(os, call), []

    def counted(*args, **options):
        if len(calls) == n:
            if call == "write":
                original(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(None)
        return original(*args, **options)

    setattr(os, call, counted)
    function()


def test_killed_twice_in_the_manifest(record, tmp_path, monkeypatch):
    """The first process dies between linking the manifest and taking the file it wrote away, the second as it writes anew."""
    folder = tmp_path / "store"
    assert ended(fork(lambda: record_until("unlink", 1, lambda: record(folder, IDS[:4]))))
    assert len(list(folder.iterdir())) == 2  # two names of one file

    def die(*args, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    def again():
        monkeypatch.setattr(store_files.json, "dumps", die)
        record(folder, IDS[:4])

    assert ended(fork(again))
    check_prefix(folder)


def test_two_processes_write_one_store(record, undisturbed, tmp_path):
    folder, whole = tmp_path / "store", tmp_path / "undisturbed"
    children = [fork(lambda rank=rank: record(folder, IDS[rank * 6 :][:6], writer=rank)) for rank in (0, 1)]
    assert [ended(child) for child in children] == [0, 0]
    assert {name for name in files(folder) if "index" in name} == {"index-0.jsonl", "index-1.jsonl"}
    store, alone = sl.open_store(folder), sl.open_store(whole)
    assert store.ids == alone.ids
    for label in store.sites:
        for layer in store[label]:
            assert store[label][layer].ids == alone[label][layer].ids
            for left, right in zip(store[label][layer], alone[label][layer], strict=True):
                assert torch.equal(left, right)
    record(folder, IDS, writer="third")  # nothing is left to be done
    assert len(sl.open_store(folder)) == 12


def test_writers_that_store_the_same_items(record, tmp_path):
    """Data-parallel samplers repeat items to fill up the last batch: they are named, and read once."""
    record(tmp_path / "a", IDS[:6], writer=0)
    record(tmp_path / "b", IDS[4:8], writer=1)
    for path in (tmp_path / "b").glob("*-1*"):
        shutil.copy(path, tmp_path / "a" / path.name)
    with pytest.warns(UserWarning, match="2 items are stored more than once, such as 'item 4' in shard-0-00002"):
        store = sl.open_store(tmp_path / "a")
    assert store.ids == tuple(IDS[:8])
    assert sorted(store.duplicates) == ["item 4", "item 5"]
    assert store["resid_post"][0].ids == tuple(IDS[:8])
    tiles = [one for number, one in enumerate(IDS[:8]) if number % 3 != 2]
    assert store["vision_resid_post"][0].ids == tuple(tiles)


# -- damage ---------------------------------------------------------------------------------------------------------------


def test_a_damaged_shard_is_named_and_the_rest_reads(record, undisturbed, tmp_path):
    folder = tmp_path / "undisturbed"
    whole = {one: tensor.clone() for one, tensor in zip(IDS, sl.open_store(folder)["resid_post"][1], strict=True)}
    (folder / "shard-0-00001.safetensors").unlink()
    cut = folder / "shard-0-00003.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged and left out") as caught:
        store = sl.open_store(folder)
    said = [str(one.message).removeprefix(f"{folder}/") for one in caught]
    assert said[0] == "shard-0-00001.safetensors is damaged and left out: the file is missing"
    assert said[1].startswith("shard-0-00003.safetensors is damaged and left out: the file has")
    assert set(store.damaged) == {"shard-0-00001.safetensors", "shard-0-00003.safetensors"}
    rest = [one for one in IDS if one not in ("item 2", "item 3", "item 6", "item 7")]
    assert list(store.ids) == rest
    for one, tensor in zip(rest, store["resid_post"][1], strict=True):
        assert torch.equal(tensor, whole[one])
    with pytest.raises(
        StoreError, match=r"item 'item 2' is in .*shard-0-00001.safetensors, which is damaged: .* missing"
    ):
        store["resid_post"][1]["item 2"]
    record(folder)  # its items are pending, and are recorded again
    with pytest.warns(UserWarning, match="damaged"):
        store = sl.open_store(folder)
    assert sorted(store.ids) == sorted(IDS)
    assert all(torch.equal(store["resid_post"][1][one], whole[one]) for one in IDS)


def test_changed_bytes_are_found_by_their_checksum(record, undisturbed, tmp_path):
    path = tmp_path / "undisturbed" / "shard-0-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    store = sl.open_store(tmp_path / "undisturbed")
    assert list(store.verify()) == ["shard-0-00002.safetensors"]
    assert "CRC-32" in store.verify()["shard-0-00002.safetensors"]
    path.write_bytes(b"\xff" * len(data))
    with pytest.raises(StoreError, match=r"shard-0-00002\.safetensors is damaged"):
        store["resid_post"][0]["item 4"]
    assert store["resid_post"][0]["item 6"].numel()


def test_a_shard_cut_off_under_an_open_store(undisturbed, tmp_path):
    store = sl.open_store(tmp_path / "undisturbed")
    os.truncate(tmp_path / "undisturbed" / "shard-0-00000.safetensors", 500)
    with pytest.raises(StoreError, match=r"shard-0-00000\.safetensors is damaged: the file has 500 bytes"):
        store["resid_post"][0][0]


def test_an_unreadable_line_of_an_index_is_named(undisturbed, tmp_path):
    path = tmp_path / "undisturbed" / "index-0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b'{"file": 3}\n', *lines[2:]]))
    with pytest.warns(UserWarning, match=r"index-0\.jsonl, line 2 is damaged"):
        store = sl.open_store(tmp_path / "undisturbed")
    assert len(store) == 10


def test_what_is_no_store(undisturbed, tmp_path):
    with pytest.raises(StoreError, match="is no activation store"):
        sl.open_store(tmp_path)
    path = tmp_path / "undisturbed" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(StoreError, match="schema 99; this slitlamp reads schema 1"):
        sl.open_store(path.parent)
    path.write_text("{")
    with pytest.raises(StoreError, match="cannot read"):
        sl.open_store(path.parent)


# -- disks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
def test_a_disk_that_is_full_loses_nothing_that_was_stored(llava, record, tmp_path):
    record(tmp_path, IDS[:4])
    before = files(tmp_path)
    batches = [llava.encode([None], ["what ?"], ids=[one]) for one in ("x", "y")]
    options = sl.StoreOptions(tmp_path, shard_bytes=1)
    with llava.trace(*SITES, store=options) as trace:
        # what the shard is written to: the kernel itself says that there is no space left
        (tmp_path / ".shard-0-00002.safetensors.partial").symlink_to("/dev/full")
        with pytest.raises(StoreError, match=r"the disk is full\. Everything stored before is safe"):
            llava.forward(batches[0])
        with pytest.raises(StoreError, match="takes nothing more"):
            llava.forward(batches[1])
    assert files(tmp_path) == before
    with llava.trace(*SITES, store=options) as trace:
        assert trace.pending([*IDS[:4], "x"]) == ["x"]
        llava.forward(batches[0])
    assert sl.open_store(tmp_path).ids == (*IDS[:4], "x")


def test_a_full_disk_at_the_end_does_not_hide_another_exception(llava, tmp_path):
    def run():
        with llava.trace(sites.resid_post(), store=tmp_path):
            llava.forward(llava.encode([None], ["what ?"], ids=["x"]))
            (tmp_path / ".shard-0-00000.safetensors.partial").symlink_to("/dev/full")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        run()
    assert "the disk is full" in caught.value.__notes__[0]


def test_no_space_for_the_line_of_a_shard(llava, tmp_path, monkeypatch):
    """The shard is whole, its line is not: the line is taken back, and the items are pending."""
    original = os.write

    def full(handle, data):
        if bytes(data[:9]) == b'{"file":"':
            original(handle, data[:20])
            raise OSError(28, "No space left on device")
        return original(handle, data)

    batch = llava.encode([None], ["what ?"], ids=["x"])
    with llava.trace(sites.resid_post(), store=sl.StoreOptions(tmp_path, shard_bytes=1)):
        monkeypatch.setattr(store_files.os, "write", full)
        with pytest.raises(StoreError, match="disk is full"):
            llava.forward(batch)
        monkeypatch.undo()
    assert (tmp_path / "index-0.jsonl").read_bytes() == b""
    with llava.trace(sites.resid_post(), store=tmp_path) as trace:
        assert trace.pending(["x"]) == ["x"]
        llava.forward(batch)
    assert len(sl.open_store(tmp_path)["resid_post"][0]) == 1


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_runs(llava, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StoreError, match="cannot write"):
            llava.trace(sites.resid_post(), store=path).__enter__()

    original = store_files.Path.open

    def refuse(path, *args, **options):
        if tmp_path in path.parents:
            raise OSError(30, "Read-only file system")
        return original(path, *args, **options)

    monkeypatch.setattr(store_files.Path, "open", refuse)
    with pytest.raises(StoreError, match=r"Read-only file system\. Give a folder that can be written"):
        llava.trace(sites.resid_post(), store=tmp_path / "store").__enter__()


def test_a_store_that_the_disk_cannot_hold_is_refused(llava, image, tmp_path, caplog, monkeypatch):
    batch = llava.encode([image(0)], ["<image> what ?"], ids=["x"])
    runs = []
    handle = llava.model.register_forward_pre_hook(lambda module, args: runs.append(1))
    try:
        with llava.trace(sites.resid_post(), store=sl.StoreOptions(tmp_path / "a", expected_items=10**12)):
            with pytest.raises(
                StoreError, match=r"would need .* GB more \(1000000000000 items of .* by an estimate, 0 stored"
            ):
                llava.forward(batch)
            assert not runs
        # the size of tiles is known when the tower has run: the run is kept, the next is refused
        vision = sl.StoreOptions(tmp_path / "b", expected_items=10**12)
        with (
            llava.trace(sites.vision_resid_post(), store=vision),
            pytest.raises(StoreError, match="the first run took"),
        ):
            llava.forward(batch)
        assert len(sl.open_store(tmp_path / "b")) == 1
    finally:
        handle.remove()
    caplog.set_level("INFO", logger="slitlamp.tracing.store.writer")
    with llava.trace(sites.resid_post(), store=sl.StoreOptions(tmp_path / "c", expected_items=1000)):
        llava.forward(batch)
    estimate, measured = (record.getMessage() for record in caplog.records)
    numbers = sl.open_store(tmp_path / "c")["resid_post"][0][0].numel() * 4 * 3
    for line, by in ((estimate, "an estimate"), (measured, "what the first run took")):
        assert f"{numbers / 1e6:.3g} MB per item ({by}), {numbers / 1e6:.3g} GB for the items to come" in line


def test_shard_bytes_must_be_positive(llava, tmp_path):
    with pytest.raises(InputError, match="shard_bytes must be 1 or more, found 0"):
        llava.trace(sites.resid_post(), store=sl.StoreOptions(tmp_path, shard_bytes=0)).__enter__()
