"""The contract of the figures of a run: each is drawn from published tables, wide and narrow, and can be read.

The few tables that are too large to publish are made up, and so are the runs of `conftest`.
"""

from __future__ import annotations

import io
import shutil
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from figure_geometry import alike_in_grey, problems
from panel_examples import RESULTS, ledger, mentions, pixels, published, token_words, tokens_in_two_dimensions
from PIL import Image

from slitlamp.reports import probe_sections
from slitlamp.reports.data import RunData
from slitlamp.reports.figures import FIGURES, SWEEPS, run_figures, to_png, to_svg
from slitlamp.reports.style import NARROW, WIDE

DRAWN: dict[str, tuple[str, ...]] = {
    "tools_patching": ("activation_patching_positions", "activation_patching_heads", "activation_patching_attribution"),
    "tools_knockout": ("attention_knockout_knockout", "attention_knockout_causal"),
    "tools_rollout": ("attention_rollout_inside", "attention_rollout_depths"),
    "tools_linear_probe": ("linear_probe_layers", "linear_probe_2_layers"),
    "tools_logit_lens": ("logit_lens_text", "logit_lens_image"),
    "tools_similarity": ("representation_similarity_models",),
    "tools_similarity_layers": ("representation_similarity_layers",),
    "tools_steering": ("steering_vectors_layers",),
    "tools_token_ablation": ("token_ablation_change", "token_ablation_flipped"),
    "truthful_layers": tuple(
        f"truthful_direction_{one}" for one in ("layers", "scores", "roc", "pmc", "layer_transfer")
    ),
    "truthful_transfer_models": ("truthful_direction_transfer_models", "truthful_direction_components"),
    "truthful_transfer_data": ("truthful_direction_transfer_datasets",),
    "outliers_maps": tuple(
        f"cls_outliers_{one}" for one in ("overlap", "influence", "maps", "definitions", "norms", "concentration")
    ),
    "vhd_fig2_heads": tuple(
        f"head_divergence_{one}"
        for one in ("sentence_histogram", "t_vhd_areas", "consistency", "consistency_steps", "outliers", "causal")
    ),
    "vhd_fig1_language_prior": ("head_divergence_language_prior",),
    "vhd_contrasts": ("head_divergence_contrasts", "head_divergence_contrast_maps"),
    "vhd_fig10_consistency": ("head_divergence_points",),
    "ledger": tuple(
        f"token_ledger_{one}" for one in ("ranking", "roc", "strip", "classes", "redundancy", "comparison")
    ),
    "ima_fig2": tuple(
        f"implicit_alignment_{one}" for one in ("alignment_curves", "matched_pairs", "token_map", "across_datasets")
    ),
    "ima_fig3": ("implicit_alignment_change_and_norms", "implicit_alignment_reductions"),
    "ima_fig4_vocabulary": ("implicit_alignment_vocabulary_kl", "implicit_alignment_vocabulary_histogram"),
    "ima_fig7_checkpoints": tuple(
        f"implicit_alignment_{one}"
        for one in ("checkpoint_curves", "alignment_and_performance", "alignment_and_hallucination")
    ),
    "ima_fig8": ("implicit_alignment_inside_blocks",),
    "ima_fig6_subnetworks": tuple(
        f"subnetworks_{one}" for one in ("iou_by_layer", "iou_by_type", "task_overlap", "overlap_by_kind")
    ),
    "ima_fig11_skipping": ("skipped_operations", "skipped_from", "generation_time"),
    "dose_subnet_mask": ("subnetwork_masks", "dose_response", "verdicts", "differences"),
    "dose_m3id": ("dose_response", "verdicts", "differences", "recall_curve"),
    "vhd_fig5_layers": ("reinforced_layers",),
}
"""Which figures are drawn from the published tables of which experiment."""
COMPOSED = ("interaction_matrix", "verdicts", "differences")
"""Which are drawn from the run of pairs of `conftest`."""


def supplement(experiment: str) -> dict[str, pd.DataFrame]:
    """Tables that are too large to be published, made up."""
    part = {"condition": "baseline", "dataset": "emoji_scenes/captions"}
    if experiment == "truthful_layers":
        return {"truthful_direction_mentions": mentions().assign(**part)}
    if experiment == "outliers_maps":
        items = published("outliers_maps", "cls_outliers_maps")["item"].unique()
        return {"cls_outliers_pictures": pd.concat([pixels().assign(item=item, **part) for item in items])}
    if experiment.startswith("vhd_") and experiment != "vhd_fig5_layers":
        kinds = published("vhd_fig2_heads", "head_divergence_sentence_means")["mean_over"].unique()
        sentences = pd.concat([token_words(mean_over=kind) for kind in kinds])
        return {
            "head_divergence_tokens": token_words(**part), "head_divergence_sentences": sentences.assign(**part),
        }  # fmt: skip
    if experiment == "ima_fig2":
        return {"implicit_alignment_tokens": tokens_in_two_dimensions().assign(**part)}
    if experiment == "ledger":
        ranking = published("ledger", "token_ledger_ranking")
        parts = [ranking.assign(model=name, **part) for name in ("one", "other")]
        pair = {f"{key}_{side}": value for side in "ab" for key, value in part.items()} | {
            "model_a": "one",
            "model_b": "other",
        }
        return {
            "token_ledger_ledger": ledger().assign(**part),
            "token_ledger_compare_rankings": pd.concat(parts),
            "token_ledger_compare_agreement": pd.DataFrame([{**pair, "spearman": 0.9, "low": 0.8, "high": 0.95}]),
        }
    if experiment == "ima_fig7_checkpoints":
        return {"implicit_alignment_compare_score_relation": _relation()}
    return {}


def _relation() -> pd.DataFrame:
    """Scores that fall as alignment rises, for every pair of data set and metric whose correlation is published."""
    found = pd.read_csv(RESULTS / "ima_fig7_checkpoints" / "tables" / "implicit_alignment_compare_correlations.csv")
    found = found[(found["kind"] == "same_layer") & (found["variant"] == "raw")]
    x = np.linspace(0.1, 0.4, 5)
    models = pd.DataFrame(
        {"model": [f"m{place}" for place in range(5)], "order": range(5), "step": np.arange(5.0) * 100, "value": x,
         "low": x - 0.02, "high": x + 0.02, "score": 0.9 - x, "score_low": 0.86 - x, "score_high": 0.94 - x}
    )  # fmt: skip
    keys = found[["kind", "variant", "metric", "score_dataset", "dataset"]].drop_duplicates()
    return keys.merge(models, how="cross")


def run_of(experiment: str, folder: Path) -> RunData:
    """A run folder from what is published of an experiment."""
    source = RESULTS / experiment
    (folder / "tables").mkdir(parents=True)
    for name in ("config.yaml", "environment.json"):
        shutil.copy(source / name, folder / name)
    tables = {
        path.stem: pd.read_csv(path, keep_default_na=False, na_values=[""]) for path in source.glob("tables/*.csv")
    }
    for name, table in {**tables, **supplement(experiment)}.items():
        table.to_parquet(folder / "tables" / f"{name}.parquet")
    if experiment == "ima_fig11_skipping":
        scores = tables["conditions"]
        pd.DataFrame(
            [("baseline", name, 80, 64, 30) for name in scores["dataset"].unique()],
            columns=["condition", "dataset", "n_prompt", "n_image", "n_tokens"],
        ).to_parquet(folder / "predictions.parquet")
    return RunData(folder)


def check(data: RunData, name: str) -> None:
    """Draw a figure wide and narrow, and read it."""
    one = run_figures(data)[name]
    for width in (WIDE, NARROW):
        drawn = one.draw(data, width)
        assert drawn is not None, f"{name} has not been drawn"
        assert drawn.get_figwidth() <= width + 1e-9
        assert problems(drawn) == [], f"{name} at {width} inches"
        for ax in drawn.axes:
            assert alike_in_grey(ax) == [], f"{name} at {width} inches"
        assert all(ax.has_data() or ax.texts or not ax.axison for ax in drawn.axes)
    assert one.title
    assert one.note(data).rstrip().endswith(".")


@pytest.mark.slow
@pytest.mark.parametrize("experiment", DRAWN)
def test_figures_from_published_tables_can_be_read(experiment: str, tmp_path: Path) -> None:
    data = run_of(experiment, tmp_path / "run")
    for name in DRAWN[experiment]:
        check(data, name)


@pytest.mark.parametrize("name", COMPOSED)
def test_figures_of_pairs_can_be_read(name: str, composed_run: Path) -> None:
    check(RunData(composed_run), name)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_scores_can_be_read(name: str, demo_run: Path) -> None:
    check(RunData(demo_run), name)


def test_every_figure_that_there_is_is_drawn_here() -> None:
    declared: set[str] = {"causal"}
    for point in entry_points(group="slitlamp.probe_figures"):
        if point.value.startswith("slitlamp."):
            declared |= {f"{point.name}_{name}" for name in probe_sections.drawings(point.name)}
    drawn = {*COMPOSED, *(name for names in DRAWN.values() for name in names)}
    missing = {*declared, *SWEEPS, *FIGURES} - drawn - set(FIGURES)
    assert missing == {"causal"}
    assert "head_divergence_causal" in drawn, "it is the same for all probes"


def test_print_size_and_bytes(demo_run: Path) -> None:
    data = RunData(demo_run)
    for name in ("chair", "head_divergence", "t_vhd_histogram"):
        one: Any = run_figures(data)[name].draw(data, WIDE)
        other: Any = run_figures(data)[name].draw(data, WIDE)
        assert to_svg(one) == to_svg(other)
        printed = Image.open(io.BytesIO(to_png(one)))
        assert printed.width == round(WIDE * 200)
