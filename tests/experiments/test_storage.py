from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from slitlamp.errors import RunFolderError
from slitlamp.experiments import storage


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    arrays = {
        "scalar": np.asarray(3.5),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "transposed": np.arange(6, dtype=np.int64).reshape(2, 3).T,
        "flags": np.array([True, False]),
        "words": np.array([["a", "hot dog"], ["ÿ", ""]]),
        "with_none": np.array(["a", None], dtype=object),
        "no_words": np.array([], dtype=str),
    }
    storage.write_arrays(tmp_path / "a.safetensors", arrays, {"note": "x"})
    found, metadata = storage.read_arrays(tmp_path / "a.safetensors")
    assert metadata == {"note": "x"}
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].shape == array.shape
        assert (found[name] == array).all()
    assert found["scalar"].dtype == np.float64


def test_unreadable_arrays_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(RunFolderError, match="cannot read"):
        storage.read_arrays(tmp_path / "a.safetensors")


def test_a_table_written_twice_has_the_same_bytes_and_values(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "name": ["a", None, "c"],
            "n": [1, 2, 3],
            "x": [0.1, np.nan, 1e-9],
            "words": [["a"], [], ["b", "c"]],
            "yes": [True] * 3,
        }
    )
    for name in ("one", "two"):
        storage.write_table(tmp_path / f"{name}.parquet", frame)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    found = storage.read_table(tmp_path / "one.parquet")
    assert list(found.columns) == list(frame.columns)
    assert found["n"].tolist() == [1, 2, 3]
    assert [list(words) for words in found["words"]] == [["a"], [], ["b", "c"]]
    assert np.array_equal(found["x"], frame["x"], equal_nan=True)


def test_frames_are_joined_in_order_and_keep_the_first_types(tmp_path: Path) -> None:
    frames = [pd.DataFrame({"a": [1.0], "b": [None]}), pd.DataFrame({"a": [2.0], "b": ["x"]})]
    assert storage.write_tables(tmp_path / "t.parquet", iter(frames)) == 2
    found = storage.read_table(tmp_path / "t.parquet")
    assert found["a"].tolist() == [1.0, 2.0]
    assert found["b"].iloc[1] == "x"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    storage.write_table(path, pd.DataFrame({"a": [1]}))
    before = path.read_bytes()
    bad = [pd.DataFrame({"a": [1]}), pd.DataFrame({"other": [1]})]
    with pytest.raises((KeyError, ValueError)):
        storage.write_tables(path, bad)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["t.parquet"]


def test_remove_partial_leaves_whole_files(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "deep" / "a.json", {"x": 1})
    (tmp_path / "deep" / f".a.json.123{storage.TEMPORARY}").write_text("half")
    storage.remove_partial(tmp_path)
    assert os.listdir(tmp_path / "deep") == ["a.json"]
