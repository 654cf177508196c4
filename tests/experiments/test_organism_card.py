"""The card of the embedded model: every number is there and in range, and what it must not be by mistake."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from slitlamp.experiments.organism_card import card_table, measure_organism, write_card_tables
from slitlamp.vlm import VLM


@pytest.fixture(scope="module")
def measured(organism: VLM) -> pd.DataFrame:
    return measure_organism(organism, n_images=16, progress=False)


def value(table: pd.DataFrame, what: str, on: str, metric: str) -> float:
    (found,) = table[(table["what"] == what) & (table["on"] == on) & (table["metric"] == metric)]["value"]
    return float(found)


def test_values_lie_inside_their_intervals(measured: pd.DataFrame) -> None:
    known = measured.dropna(subset=["low"])
    assert len(known) > 25
    assert ((known["low"] <= known["value"] + 1e-9) & (known["value"] <= known["high"] + 1e-9)).all()


def test_the_model_reads_its_image(measured: pd.DataFrame) -> None:
    """On 16 scenes (about 84 questions a split) the standard error is .05: .75 is two below the card's values."""
    for split in ("random", "popular", "adversarial"):
        assert value(measured, f"POPE {split}", "own image", "accuracy") > 0.7
        assert value(measured, f"POPE {split}", "another scene's image", "accuracy") < 0.68
    assert (
        value(measured, "captions", "own image", "chair_i")
        < value(measured, "captions", "blank image", "chair_i") - 0.3
    )


def test_positions_are_better_than_the_commonest_answer(measured: pd.DataFrame) -> None:
    where = "where is the ...?"
    assert value(measured, where, "own image", "accuracy") > value(measured, where, "chance", "accuracy") + 0.1


def test_card_is_a_table_of_models(measured: pd.DataFrame, tmp_path: Path) -> None:
    path = write_card_tables(tmp_path, {"seed 0": measured, "seed 1": measured})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines == card_table({"seed 0": measured, "seed 1": measured}).splitlines()
    assert len(lines) == len(measured) + 2
    assert all(line.count("|") == 6 for line in lines)
    assert len(pd.read_csv(tmp_path / "card.csv")) == 2 * len(measured)
