"""Figures of reinforcement by layers and by time, from run folders written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from slitlamp.reports.data import RunData
from slitlamp.reports.head_layers import (
    generation_time,
    generation_times,
    last_layers,
    layer_scores,
    reinforced_layers,
)


def reinforce(*layers: int) -> list[dict[str, Any]]:
    return [{"HeadReinforcement": {"layers": list(layers)}}]


CONDITIONS: dict[str, Any] = {
    "baseline": [],
    "one": reinforce(3),
    "two": reinforce(-1, 2),
    "gap": reinforce(1, 3),
    "early": reinforce(0, 1),
    "other": [{"SkipPerceptual": {"layers": [3]}}],
    "default": [{"HeadReinforcement": {}}],
}


def run_folder(folder: Path, conditions: dict[str, Any], timing: dict[str, float] | None = None) -> RunData:
    names = [*conditions, "two_random"] if "two" in conditions else list(conditions)
    (folder / "tables").mkdir(parents=True)
    info = pd.DataFrame(
        {
            "condition": names,
            "role": ["reference", *["control" if name == "two_random" else "treatment" for name in names[1:]]],
            "control_of": ["two" if name == "two_random" else None for name in names],
            "description": "",
        }
    )
    info.to_parquet(folder / "tables" / "condition_info.parquet")
    rows = [
        {
            "condition": name,
            "dataset": "captions",
            "metric": metric,
            "value": 0.1 * place,
            "low": 0.0,
            "high": 0.5,
            "n": 9,
        }
        for place, name in enumerate(names)
        for metric in ("chair_i", "recall")
    ]
    pd.DataFrame(rows).to_parquet(folder / "tables" / "conditions.parquet")
    (folder / "config.yaml").write_text(yaml.safe_dump({"conditions": conditions}))
    (folder / "environment.json").write_text(json.dumps({"n_layers": 4, "finished": True, "timing": timing or {}}))
    return RunData(folder)


def test_which_conditions_reinforce_the_last_layers() -> None:
    assert last_layers(CONDITIONS, 4) == {"baseline": 0, "one": 1, "two": 2}


def test_scores_by_number_of_layers_and_control(tmp_path: Path) -> None:
    table = layer_scores(run_folder(tmp_path / "run", CONDITIONS))
    assert table is not None
    rows = table[table["metric"] == "chair_i"].set_index(["control", "n_layers"])["value"]
    assert rows.to_dict() == pytest.approx({("", 0): 0.0, ("", 1): 0.1, ("", 2): 0.2, ("random", 2): 0.7})


def test_the_curve_holds_the_scores(tmp_path: Path) -> None:
    figure = reinforced_layers(run_folder(tmp_path / "run", CONDITIONS), 6.6)
    assert figure is not None
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert lines["_method"].get_xdata().tolist() == [0, 1, 2]  # type: ignore[union-attr]
    assert list(lines["_method"].get_ydata()) == pytest.approx([0, 0.1, 0.2])  # type: ignore[arg-type]
    assert list(lines["_random"].get_xdata()) == [0, 2]  # type: ignore[arg-type]


def test_other_runs_have_no_such_figure(tmp_path: Path) -> None:
    data = run_folder(tmp_path / "run", {"baseline": [], "default": [{"HeadReinforcement": {}}]})
    assert layer_scores(data) is None
    assert reinforced_layers(data, 6.6) is None
    assert generation_time(data, 6.6) is None


def test_times_are_ratios_to_the_reference(tmp_path: Path) -> None:
    timing = {"generate baseline": 2.0, "generate default": 3.0, "encode default": 9.0, "total": 14.0}
    data = run_folder(tmp_path / "run", {"baseline": [], "default": [{"HeadReinforcement": {}}]}, timing)
    table = generation_times(data)
    assert table is not None
    assert table.values.tolist() == [["baseline", 2.0, 1.0], ["default", 3.0, 1.5]]
    figure = generation_time(data, 3.5)
    assert figure is not None
    assert [bar.get_width() for bar in figure.axes[0].patches] == [2.0, 3.0]  # type: ignore[attr-defined]


def test_image_tokens_are_told_where_conditions_differ_in_them(tmp_path: Path) -> None:
    timing = {"generate baseline": 2.0, "generate pruned": 1.0}
    data = run_folder(tmp_path / "run", {"baseline": [], "pruned": [{"ClsPruning": {}}]}, timing)
    counts = pd.DataFrame(
        [("baseline", "a", 3, 64.0), ("baseline", "b", 1, 64.0), ("pruned", "a", 3, 16.0), ("pruned", "b", 1, 24.0)],
        columns=["condition", "dataset", "n_items", "image_tokens"],
    )
    counts.to_parquet(data.folder / "tables" / "token_counts.parquet")
    table = generation_times(data)
    assert table is not None
    assert table["image_tokens"].tolist() == [64.0, 18.0]
    figure = generation_time(data, 6.6)
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].texts] == ["×1.00 (64 tokens)", "×0.50 (18 tokens)"]
    assert figure.axes[0].get_xlabel().endswith("(image tokens)")
    counts.assign(image_tokens=64.0).to_parquet(data.folder / "tables" / "token_counts.parquet")
    same = generation_times(RunData(data.folder))
    assert same is not None
    assert "image_tokens" not in same
