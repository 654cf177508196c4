"""One small experiment with everything in it, and what its folder holds."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from interventions import HeadReinforcement
from probes import HeadDivergence
from slitlamp.errors import RunFolderError, UnknownNameError
from slitlamp.experiments import Dataset, Experiment, Run, load_run, read_config
from slitlamp.vlm import VLM


def make(vlm: VLM | str, data: list[Dataset], output: Path, **options: object) -> Experiment:
    settings = {
        "conditions": {"baseline": [], "vhr": [HeadReinforcement(alpha=3.0)]},
        "controls": ["random"],
        "probes": [HeadDivergence(n_resamples=100)],
        "showcase": True,
        "max_new_tokens": {"captions": 8, "pope": 2},
        "batch_size": 3,
        "n_resamples": 100,
        "progress": False,
        **options,
    }
    return Experiment(model=vlm, dataset=data, output=output, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def run(vlm: VLM, captions: Dataset, pope: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(vlm, [pope, captions], tmp_path_factory.mktemp("run") / "run").run()


def test_the_folder_is_complete_and_holds_no_leftovers(run: Run) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        *(".slitlamp-run", "config.yaml", "environment.json", "predictions.parquet"),
        *("tables", "states", "showcase"),
    }
    assert run.finished


def test_predictions_are_what_the_model_says(run: Run, vlm: VLM, captions: Dataset, pope: Dataset) -> None:
    rows = run.predictions
    assert len(rows) == 3 * (len(captions) + len(pope))
    own = rows[(rows["condition"] == "baseline") & (rows["dataset"] == captions.name)]
    assert own["item"].tolist() == [item.id for item in captions.items]
    items = captions.items[:3]  # the first unit, in one batch as in the run
    batch = vlm.encode(images=[one.image for one in items], prompts=[one.prompt for one in items])
    expected = vlm.generate(batch, max_new_tokens=8)
    assert own["text"].tolist()[:3] == list(expected.texts)
    assert [list(one) for one in own["tokens"]][:3] == [list(one) for one in expected.tokens]
    assert own["stopped"].tolist()[:3] == list(expected.stopped)


def test_conditions_differ_and_are_all_compared(run: Run) -> None:
    texts = run.predictions.groupby("condition", sort=False)["text"].apply(tuple)
    assert texts.index.tolist() == ["baseline", "vhr", "vhr_random"]
    assert len(set(texts)) == 3
    pairs = run.table("differences")[["condition", "reference"]].drop_duplicates()
    assert list(pairs.itertuples(index=False, name=None)) == [
        ("vhr", "baseline"),
        ("vhr_random", "baseline"),
        ("vhr", "vhr_random"),
    ]
    info = run.table("condition_info")
    assert info["role"].tolist() == ["reference", "treatment", "control"]
    assert info["control_of"].tolist()[2] == "vhr"


def test_views_by_task(run: Run) -> None:
    assert set(run.table("pope")["metric"]) >= {"accuracy", "yes_ratio"}
    assert set(run.table("chair")["metric"]) >= {"chair_i", "recall"}
    assert {"pope", "chair", "conditions"} <= set(run.tables())
    with pytest.raises(UnknownNameError, match="did you mean 'conditions'"):
        run.table("condition")


def test_probe_tables_equal_one_pass_over_all_captions(run: Run, vlm: VLM, captions: Dataset) -> None:
    """Chunks, states on disk and merging change nothing but the rounding of another batch's padding."""
    items = captions.items
    batch = vlm.encode([i.image for i in items], [i.prompt for i in items], ids=[i.id for i in items])
    probe = HeadDivergence(n_resamples=100)
    vlm.measure(probe, vlm.generate(batch, max_new_tokens=8).teacher_forced())
    expected, found = probe.result().tables, run.table("head_divergence_heads")
    assert set(found["condition"]) == {"baseline"}
    assert set(found["dataset"]) == {captions.name}
    np.testing.assert_allclose(found["vhd"], expected["heads"]["vhd"], rtol=1e-4)
    tokens = run.table("head_divergence_tokens")
    np.testing.assert_allclose(tokens["t_vhd_2"], expected["tokens"]["t_vhd_2"], rtol=1e-4)


def test_token_labels_agree_with_chair(run: Run) -> None:
    labels = run.table("head_divergence_tokens")["label"].value_counts()
    mentions = run.table("chair_mentions")
    mentions = mentions[mentions["condition"] == "baseline"]
    assert labels.get("hallucinated", 0) == mentions["hallucinated"].sum() > 0
    assert labels.get("object", 0) == (~mentions["hallucinated"]).sum()


def test_showcase(run: Run, vlm: VLM, captions: Dataset) -> None:
    items, words = run.table("showcase_items"), run.table("showcase_words")
    for row in items.to_dict("records"):
        assert (run.folder / row["image"]).is_file()
        own = words[words["item"] == row["item"]]
        assert [row["caption"][start:end] for start, end in zip(own["start"], own["end"], strict=True)] == own[
            "word"
        ].tolist()
        assert own["t_vhd"].notna().all()
    attention = run.table("showcase_attention")
    total = attention.groupby(["item", "index", "layer", "head"])["attention"].sum()
    assert (total > 0).all()
    assert (total <= 1 + 1e-5).all()
    chosen = attention.groupby(["item", "layer", "head"])["chosen"].first()
    assert chosen.groupby(["item", "layer"]).sum().le(vlm.anatomy.n_heads / 2).all()
    assert len(attention[["row", "column"]].drop_duplicates()) == 64


def test_the_environment_says_what_made_it(run: Run, vlm: VLM) -> None:
    found = run.environment
    assert found["weights_hash"] == vlm.weights_hash
    assert (found["seed"], found["device"], found["dtype"]) == (0, "cpu", "float32")
    assert {"python", "torch", "transformers", "slitlamp", "numpy"} <= set(found["versions"])
    assert {"generate baseline", "generate vhr", "measure baseline", "tables", "total"} <= set(found["timing"])


def test_a_finished_run_is_read_and_not_done_again(run: Run, vlm: VLM, captions: Dataset, pope: Dataset) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.parquet")}
    again = make(vlm, [pope, captions], run.folder).run()
    assert again.table("conditions").equals(run.table("conditions"))
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.parquet")} == before


def test_another_configuration_or_other_data_are_refused(
    run: Run, vlm: VLM, captions: Dataset, pope: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunFolderError, match=r"batch_size: the folder has 3, this run has 2"):
        make(vlm, [pope, captions], run.folder, batch_size=2).run()
    with pytest.raises(
        RunFolderError, match=r"conditions.vhr.0.HeadReinforcement.alpha: the folder has 3.0, this run has 2"
    ):
        make(
            vlm, [pope, captions], run.folder, conditions={"baseline": [], "vhr": [HeadReinforcement(alpha=2.0)]}
        ).run()
    changed = replace(captions, items=(replace(captions.items[0], prompt="What is this?"), *captions.items[1:]))
    with pytest.raises(RunFolderError, match="identity"):
        make(vlm, [pope, changed], run.folder).run()
    monkeypatch.setattr(vlm, "weights_hash", "other weights")
    shutil.copytree(run.folder, run.folder.with_name("copy"))
    (run.folder.with_name("copy") / "predictions.parquet").unlink()
    with pytest.raises(RunFolderError, match="weights_hash"):
        make(vlm, [pope, captions], run.folder.with_name("copy")).run()


def test_the_stored_configuration_can_be_run(run: Run, data_folder: Path, tmp_path: Path) -> None:
    config = read_config(run.folder / "config.yaml")
    again = Experiment.from_config(config, output=tmp_path / "again", folders=[data_folder]).check()
    assert again.config() == run.config


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a run folder"):
        load_run(tmp_path)


def test_sampling_has_a_seed_per_unit_shared_by_conditions(vlm: VLM, captions: Dataset, tmp_path: Path) -> None:
    def texts(name: str, seed: int) -> pd.DataFrame:
        same = {"one": [], "two": []}
        options = {"conditions": same, "controls": False, "probes": [], "showcase": False, "seed": seed}
        sampled = {"do_sample": True, "temperature": 1.0}
        done = make(vlm, [captions], tmp_path / name, generation=sampled, max_new_tokens=4, **options).run()
        return done.predictions.pivot(index="item", columns="condition", values="text")

    first, again, other = texts("a", 0), texts("b", 0), texts("c", 1)
    assert first["one"].tolist() == first["two"].tolist() == again["one"].tolist()
    assert first["one"].tolist() != other["one"].tolist()
