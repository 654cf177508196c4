from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from slitlamp.errors import RunFolderError
from slitlamp.experiments.folder import RunFolder, Unit, UnitResult, differences

CONFIG = {"seed": 0, "conditions": {"baseline": [], "vhr": [{"HeadReinforcement": {"alpha": 2.0}}]}, "take": None}


def test_a_part_comes_back_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    unit = Unit("baseline", "emoji_scenes/captions", 3)
    part = UnitResult(
        predictions=[{"id": "1", "text": "a <b>\n", "n": 3, "label": None}],
        states={"head_divergence": {"sum": np.ones((2, 3)), "tokens/word": np.array(["a", "dog"])}, "empty": {}},
        seconds={"generate": 0.5},
        arrays={"x": np.arange(3)},
    )
    assert not folder.has_part(unit)
    folder.write_part(unit, part)
    found = folder.read_part(unit)
    assert folder.has_part(unit)
    assert found.predictions == part.predictions
    assert found.seconds == part.seconds
    assert set(found.states) == {"head_divergence", "empty"}
    assert found.states["head_divergence"]["tokens/word"].tolist() == ["a", "dog"]
    assert (found.arrays["x"] == np.arange(3)).all()


def test_the_same_configuration_may_go_on_and_another_may_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.open(CONFIG):
        pass
    with folder.open(CONFIG):
        pass
    other = {"seed": 1, "conditions": {"baseline": [], "vhr": [{"HeadReinforcement": {"alpha": 3.0}}]}, "take": None}
    with pytest.raises(RunFolderError, match="another configuration") as caught, folder.open(other):
        pass
    assert "seed: the folder has 0, this run has 1" in str(caught.value)
    assert "conditions.vhr.0.HeadReinforcement.alpha: the folder has 2.0, this run has 3.0" in str(caught.value)
    assert "take" not in str(caught.value)


def test_overwrite_deletes_the_earlier_run_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.open(CONFIG):
        folder.write_part(Unit("a", "b", 0), UnitResult([]))
        (folder.path / "notes.txt").write_text("mine")
    with folder.open({"seed": 5}, overwrite=True):
        assert not folder.has_part(Unit("a", "b", 0))
    assert (folder.path / "notes.txt").read_text() == "mine"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="not made by slitlamp"):
        RunFolder(tmp_path).check_writable()


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder(tmp_path / "file").check_writable()
    with pytest.raises(RunFolderError, match="is not a folder"):
        RunFolder(tmp_path / "file" / "run").check_writable()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(RunFolderError, match="cannot write"):
        RunFolder(locked / "run").check_writable()


def test_a_failing_write_test_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for root, who may write everywhere: the file system refuses."""

    def refuse(self: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(RunFolderError, match=r"cannot write to .* Permission denied"):
        RunFolder(tmp_path / "run").check_writable()


@pytest.mark.skipif(sys.platform == "win32", reason="no advisory locks there")
def test_a_folder_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    one, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with one.open({"seed": 0}), pytest.raises(RunFolderError, match="another process"), other.open({"seed": 0}):
        pass
    with other.open({"seed": 0}):
        pass


def test_differences_name_every_entry() -> None:
    lines = differences({"a": 1, "b": [1, 2], "c": {"d": 1}}, {"a": 1, "b": [1, 2, 3], "c": {"e": 2}})
    assert lines == [
        "b: the folder has [1, 2], this run has [1, 2, 3]",
        "c.d: the folder has 1, this run has nothing",
        "c.e: the folder has nothing, this run has 2",
    ]
    assert differences({"a": (1, 2)}, {"a": (1, 2)}) == []
