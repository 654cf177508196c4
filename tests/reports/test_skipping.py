"""The figures of skipping and of subnetworks, from a run folder whose numbers are made up but for the operations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from interventions import SkipPerceptual
from slitlamp.flops import BlockSizes, Tokens
from slitlamp.reports import skipping
from slitlamp.reports.data import RunData
from slitlamp.reports.style import NARROW, WIDE

SIZES = {"n_layers": 6, "n_heads": 8, "n_kv_heads": 8, "d_model": 192, "d_head": 24, "d_mlp": 512, "gated": True}
CONDITIONS: dict[str, list[Any]] = {
    "baseline": [],
    "ffn_every": [{"SkipPerceptual": {"interval": 1}}],
    "ffn_half": [{"SkipPerceptual": {"interval": 2}}],
    "ffn_late": [{"SkipPerceptual": {"interval": 1, "start": 2}}],
    "parallel": [{"SkipPerceptual": {"skip": "parallel", "interval": 1}}],
    "both": [{"SkipPerceptual": {}}, {"HeadReinforcement": {}}],
    "alpha_0.3": [{"SubnetMask": {"sparsity": 0.3}}],
    "alpha_0.5": [{"SubnetMask": {"sparsity": 0.5}}],
}
CONTROLS = {
    "ffn_every_random": "ffn_every",
    "ffn_every_text": "ffn_every",
    "ffn_late_random": "ffn_late",
    "alpha_0.5_magnitude": "alpha_0.5",
}


@pytest.fixture
def run(tmp_path: Path) -> RunData:
    names = [*CONDITIONS, *CONTROLS]
    (tmp_path / "tables").mkdir()
    rows = [
        (name, dataset, metric, 0.9 - 0.02 * place, 0.88 - 0.02 * place, 0.92 - 0.02 * place, task)
        for place, name in enumerate(names)
        for dataset, metric, task in (
            ("emoji_scenes/captions", "chair_i", "captions"),
            ("emoji_scenes/captions", "recall", "captions"),
            ("emoji_scenes/captions", "mean_words", "captions"),
            ("emoji_scenes/pope_random", "accuracy", "pope"),
        )
    ]
    columns = ["condition", "dataset", "metric", "value", "low", "high", "task"]
    pd.DataFrame(rows, columns=columns).to_parquet(tmp_path / "tables/conditions.parquet")
    info = [(name, "reference" if name == "baseline" else "treatment", None, "") for name in CONDITIONS]
    info += [(name, "control", of, "") for name, of in CONTROLS.items()]
    pd.DataFrame(info, columns=["condition", "role", "control_of", "description"]).to_parquet(
        tmp_path / "tables/condition_info.parquet"
    )
    items = [("captions", 70, 64, 30), ("captions", 72, 64, 20), ("pope_random", 80, 64, 3)]
    pd.DataFrame(
        [("baseline", f"emoji_scenes/{name}", *numbers) for name, *numbers in items],
        columns=["condition", "dataset", "n_prompt", "n_image", "n_tokens"],
    ).to_parquet(tmp_path / "predictions.parquet")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"conditions": CONDITIONS}, sort_keys=False))
    (tmp_path / "environment.json").write_text(json.dumps({"finished": True, "block_sizes": SIZES}))
    return RunData(tmp_path)


def test_operations_saved_are_those_of_the_intervention(run: RunData) -> None:
    table = skipping.skipping_table(run)
    assert table is not None
    saved = table.set_index(["condition", "dataset", "metric"])["saved"]
    sizes = BlockSizes(**SIZES)  # type: ignore[arg-type]
    captions = [Tokens(0, 64, 6, 30), Tokens(0, 64, 8, 20)]
    for name, method in {
        "ffn_every": SkipPerceptual(interval=1),
        "ffn_half": SkipPerceptual(interval=2),
        "ffn_late": SkipPerceptual(interval=1, start=2),
        "ffn_every_text": SkipPerceptual(interval=1, tokens="text"),
    }.items():
        expected = np.mean([method.saved(sizes, tokens) for tokens in captions])
        assert saved[name, "emoji_scenes/captions", "recall"] == pytest.approx(expected)
    assert saved["ffn_every", "emoji_scenes/pope_random", "accuracy"] == pytest.approx(
        SkipPerceptual(interval=1).saved(sizes, Tokens(0, 64, 16, 3))
    )
    assert (saved["parallel"] == 0).all()
    assert (saved["baseline"] == 0).all()
    assert (saved["ffn_every_random"] == saved["ffn_every"]).all()


def test_series_tell_who_skips_what(run: RunData) -> None:
    table = skipping.skipping_table(run)
    assert table is not None
    series = table.drop_duplicates("condition").set_index("condition")
    assert series["series"].to_dict() == {
        "baseline": "reference",
        "ffn_every": "skip the FFN",
        "ffn_half": "skip the FFN",
        "ffn_late": "skip the FFN",
        "parallel": "attention and FFN in parallel",
        "ffn_every_random": "skip the FFN, random blocks",
        "ffn_every_text": "skip the FFN, text tokens",
        "ffn_late_random": "skip the FFN, random blocks",
    }
    assert set(series["series"]) - {"reference"} <= set(skipping.SKIP_LOOKS)
    assert series["n_blocks"].to_dict()["ffn_every"] == 4
    assert series["n_blocks"].to_dict()["ffn_late"] == 2


def test_masks_of_prompts_and_their_controls(run: RunData) -> None:
    table = skipping.mask_table(run)
    assert table is not None
    rows = table.drop_duplicates("condition").set_index("condition")[["rule", "tokens", "sparsity"]]
    assert [tuple(row) for row in rows.itertuples()] == [
        ("baseline", "reference", "", 0.0),
        ("alpha_0.3", "wanda", "both", 0.3),
        ("alpha_0.5", "wanda", "both", 0.5),
        ("alpha_0.5_magnitude", "magnitude", "both", 0.5),
    ]


def test_masks_of_a_file_are_shown_by_themselves(run: RunData) -> None:
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    config["conditions"]["alpha_0.5"] = [{"SubnetMask": {"masks": "some/alpha.safetensors", "sparsity": 0.5}}]
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    table = skipping.mask_table(RunData(run.folder))
    assert table is not None
    rows = table.drop_duplicates("condition").set_index("condition")[["rule", "tokens", "sparsity"]]
    assert [tuple(row) for row in rows.itertuples()] == [
        ("baseline", "reference", "", 0.0),
        ("alpha_0.5", "wanda", "file", 0.5),
        ("alpha_0.5_magnitude", "magnitude", "file", 0.5),
    ]
    assert "a file of masks was calibrated" in skipping.subnetworks_note(RunData(run.folder))


@pytest.mark.parametrize("draw", [skipping.skipped_operations, skipping.skipped_from, skipping.subnetworks])
def test_figures_show_the_scores(run: RunData, draw: Any) -> None:
    for width in (WIDE, NARROW):
        figure = draw(run, width)
        assert figure is not None
        titles = [ax.get_title() for ax in figure.axes if ax.get_visible()]
        assert len(titles) == 3  # CHAIR_i, recall, accuracy; the length of captions is none of them
        values = [y for line in figure.axes[0].lines for y in np.atleast_1d(np.asarray(line.get_ydata(), dtype=float))]
        assert pytest.approx(max(values)) == 0.9
    for note in (skipping.skipped_operations_note, skipping.skipped_from_note, skipping.subnetworks_note):
        assert "interval" in note(run)


def test_other_runs_have_no_such_figures(run: RunData) -> None:
    config = {"conditions": {"baseline": [], "vhr": [{"HeadReinforcement": {"alpha": 2.0}}]}}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    other = RunData(run.folder)
    for draw in (skipping.skipped_operations, skipping.skipped_from, skipping.subnetworks):
        assert draw(other, WIDE) is None


@pytest.mark.parametrize(
    ("conditions", "drawn"),
    [
        ({"skip": [{"SkipPerceptual": {"interval": 1}}], "mask": [{"SubnetMask": {"sparsity": 0.5}}]}, (False, False)),
        ({"skip": [{"SkipPerceptual": {"interval": 1}}], "half": [{"SkipPerceptual": {"interval": 2}}]}, (True, False)),
        ({"skip": [{"SkipPerceptual": {}}], "parallel": [{"SkipPerceptual": {"skip": "parallel"}}]}, (True, False)),
        ({"few": [{"SubnetMask": {"sparsity": 0.3}}], "many": [{"SubnetMask": {"sparsity": 0.5}}]}, (False, True)),
    ],
)
def test_one_condition_is_no_comparison(run: RunData, conditions: dict[str, Any], drawn: tuple[bool, bool]) -> None:
    names = ["baseline", *conditions]
    scores = pd.read_parquet(run.folder / "tables/conditions.parquet")
    rows = [scores[scores["condition"] == "baseline"].assign(condition=name) for name in names]
    pd.concat(rows).to_parquet(run.folder / "tables/conditions.parquet")
    info = pd.read_parquet(run.folder / "tables/condition_info.parquet").iloc[: len(names)]
    info.assign(condition=names, control_of=None).to_parquet(run.folder / "tables/condition_info.parquet")
    config = yaml.safe_dump({"conditions": {"baseline": [], **conditions}}, sort_keys=False)
    (run.folder / "config.yaml").write_text(config)
    data = RunData(run.folder)
    found = (skipping.skipped_operations(data, WIDE), skipping.subnetworks(data, WIDE))
    assert tuple(one is not None for one in found) == drawn


def test_without_the_sizes_of_the_model_operations_are_not_guessed(run: RunData) -> None:
    (run.folder / "environment.json").write_text(json.dumps({"finished": True}))
    assert skipping.skipping_table(RunData(run.folder)) is None
