from __future__ import annotations

from pathlib import Path

import pytest

from slitlamp.errors import InputError
from slitlamp.experiments.config import Config, find_config, parse_config, read_config
from slitlamp.experiments.places import inside
from slitlamp.experiments.yaml_file import YamlFile

GOOD = """\
title: A demo
model: organism
datasets:
  - emoji_scenes/captions
  - {name: mine, task: pope, questions: q.jsonl, images: images, take: 3}
conditions:
  baseline: []
  vhr:
    - HeadReinforcement: {alpha: 2.0}
    - Other
controls: true
comparisons: [[vhr, baseline]]
max_new_tokens: 16
"""


def read(text: str, *overrides: str) -> Config:
    return parse_config(YamlFile.parse(text, "x.yaml"), overrides)


def test_a_good_file() -> None:
    config = read(GOOD)
    assert config.model.id == "organism"
    assert [one.name for one in config.datasets] == ["emoji_scenes/captions", "mine"]
    assert config.datasets[1].take == 3
    assert list(config.conditions) == ["baseline", "vhr"]
    assert [(c.name, c.parameters) for c in config.conditions["vhr"]] == [
        ("HeadReinforcement", {"alpha": 2.0}),
        ("Other", {}),
    ]
    assert config.comparisons == [("vhr", "baseline")]
    assert config.max_new_tokens == {"pope": 16, "captions": 16}
    assert config.seed == 0


def test_overrides() -> None:
    config = read(
        GOOD,
        "seed=7",
        "datasets.1.take=9",
        "conditions.vhr.0.HeadReinforcement.alpha=3",
        "model=a/b",
        "model.dtype=float32",
        "take=2",
    )
    assert (config.seed, config.datasets[1].take, config.model.id, config.take) == (7, 9, "a/b", 2)
    assert config.model.dtype == "float32"
    assert config.conditions["vhr"][0].parameters == {"alpha": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: [a]\nconditons: {}\n", r"x.yaml:2: unknown key 'conditons'; did you mean 'conditions'"),
        ("datasets:\n- {name: a, tak: 3}\n", r"x.yaml:2: unknown key 'datasets.0.tak'; did you mean 'ta"),
        (
            "datasets: [a]\nmodel: {id: x, revison: y}\n",
            r"x.yaml:2: unknown key 'model.revison'; did you mean 'revision'",
        ),
        ("datasets: [a]\nzzz: 1\n", r"x.yaml:2: unknown key 'zzz'; known: .*conditions"),
        ("datasets: [a]\n\nbatch_size: 0\n", r"x.yaml:3: batch_size: .*greater than or equal to 1; found 0"),
        ("datasets: [a]\nbatch_size: many\n", r"x.yaml:2: batch_size: .*integer.*found 'many'"),
        ("seed: 1\n", r"'datasets' is missing"),
        ("datasets: []\n", r"x.yaml:1: datasets: .*at least 1 item"),
        ("datasets: [a]\nconditions: {}\n", r"x.yaml:2: conditions: .*at least 1 item"),
        ("datasets: [a]\nconditions:\n  'a/b': []\n", r"x.yaml:2: conditions: .*condition 'a/b'"),
        (
            "datasets: [a]\nconditions:\n  b:\n  - {A: {}, B: {}}\n",
            r"x.yaml:4: conditions.b.0: expected a name, or 'Name",
        ),
        ("datasets: [a]\nseed: 1\nseed: 2\n", r"x.yaml:3: the key 'seed' is here twice; the first is in line 2"),
        ("datasets: [a\nseed: 1\n", r"x.yaml:2: malformed YAML"),
        ("a: b: c\n", r"x.yaml:1: malformed YAML"),
        ("- a\n", r"expected keys and values, found list"),
        ("", r"expected keys and values, found NoneType"),
        ("datasets:\n- {name: a, questions: q.jsonl}\n", r"x.yaml:2: datasets.0: questions: only with 'task'"),
        ("datasets:\n- {name: a, task: pope}\n", r"datasets.0: .*also needs images, questions"),
        ("datasets:\n- {name: a, task: pope, questions: q, images: i, captions: s}\n", r"takes no captions"),
        ("datasets: [a]\nx: !!python/object/apply:os.system [ls]\n", r"x.yaml:2: malformed YAML"),
    ],
)
def test_every_mistake_is_named_with_its_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", r"--set sed=1: unknown key 'sed'; did you mean 'seed'"),
        ("seed", r"expected key=value"),
        ("seed.a=1", r"'seed' is 0 and has no entry 'a'"),
        ("datasets.5.take=1", r"'datasets' is a list of 2 and has no entry '5'"),
        ("batch_size=x", r"--set batch_size=x: batch_size: .*integer"),
        ("seed=[1", r"malformed YAML"),
    ],
)
def test_mistakes_in_overrides(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(GOOD + "seed: 0\n", override)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_config(tmp_path / "none.yaml")


def test_experiments_are_found_by_path_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text(GOOD)
    assert find_config("demo", [tmp_path]) == tmp_path / "demo.yaml"
    assert find_config("experiments/demo.yaml", [tmp_path]) == tmp_path / "demo.yaml"
    assert find_config(tmp_path / "demo.yaml", []) == tmp_path / "demo.yaml"
    with pytest.raises(InputError, match="did you mean 'demo'"):
        find_config("dmeo", [tmp_path])


def test_paths_stay_inside_the_named_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "q.jsonl").touch()
    folders = [tmp_path / "a", tmp_path / "b"]
    assert inside("q.jsonl", folders, "questions") == tmp_path / "b" / "q.jsonl"
    assert inside(tmp_path / "b" / "q.jsonl", folders, "questions") == tmp_path / "b" / "q.jsonl"
    assert inside("new", folders, "output") == tmp_path / "a" / "new"
    for outside in ("../c", "/etc/passwd", "x/../../c"):
        with pytest.raises(InputError, match=r"questions: .* lies outside the folders of this configuration"):
            inside(outside, folders, "questions")
    (tmp_path / "a" / "link").symlink_to("/etc")
    with pytest.raises(InputError, match="lies outside"):
        inside("link/passwd", folders[:1], "questions")
