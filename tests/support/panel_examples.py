"""A table for every panel function of the figures, small or cut from the published results, and what of it must be drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from slitlamp.reports.implicit_alignment_panels import PAIRS
from slitlamp.reports.wording import Estimate

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
BARS = ("value", "low", "high")


@dataclass
class Example:
    """How a panel is called, and the numbers that its artists must hold.

    Attributes:
        args: positional arguments before `ax`.
        kwargs: the others.
        columns: of the first argument, drawn one and all.
        scale: what these are multiplied with.
        lines: places of lines of reference (chance, zero, the unmodified model).
        shares: number of histograms, each of which must sum to one.
        bare: whether the panel has no words of its own (an image).
        height: in inches, where it is read.
        narrow: keyword arguments where it is narrow.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    scale: float = 1.0
    lines: tuple[float, ...] = ()
    shares: int = 0
    bare: bool = False
    height: float = 4.0
    narrow: dict[str, Any] = field(default_factory=dict)


def published(experiment: str, table: str, **chosen: object) -> pd.DataFrame:
    """A committed table of an experiment: the rows with these values, of its first condition and data set."""
    path = RESULTS / experiment / "tables" / f"{table}.csv"
    rows = pd.read_csv(path, keep_default_na=False, na_values=[""])  # a family of signals is called null
    for column in ("condition", "dataset"):
        if column in rows:
            rows = rows[rows[column] == rows[column].iloc[0]]
    for column, value in chosen.items():
        rows = rows[rows[column] == value]
    return rows.reset_index(drop=True)


def scores(metric: str = "chair_i") -> pd.DataFrame:
    """One number of three conditions, with intervals."""
    value = np.array([0.24, 0.2, 0.22])
    return pd.DataFrame(
        {
            "condition": ["baseline", "treated", "treated_random"], "dataset": "captions", "metric": metric, "value": value,
            "low": value - 0.02, "high": value + 0.03,
        }
    )  # fmt: skip


def pope() -> pd.DataFrame:
    """Accuracy of two conditions on two splits of POPE."""
    rows = [
        (condition, f"pope_{split}", "accuracy", at, at - 0.02, at + 0.02)
        for condition, split, at in (
            *(("baseline", "random", 0.8), ("baseline", "popular", 0.75)),
            *(("treated", "random", 0.83), ("treated", "popular", 0.71)),
        )
    ]
    return pd.DataFrame(rows, columns=["condition", "dataset", "metric", *BARS])


def verdicts() -> pd.DataFrame:
    """Two treatments against the reference and their strongest controls."""
    return pd.DataFrame(
        {
            "treatment": ["a", "b"], "value": [-0.05, 0.01], "low": [-0.08, -0.02], "high": [-0.02, 0.04],
            "control_value": [-0.03, 0.02], "control_low": [-0.05, -0.01], "control_high": [-0.01, 0.05],
            "verdict": ["beats the reference and every control", "nothing is shown"],
        }
    )  # fmt: skip


def ledger(n: int = 80) -> pd.DataFrame:
    """Objects of eight captions with every signal of the published ranking, all higher when hallucinated."""
    generator = np.random.default_rng(5)
    false = generator.random(n) < 0.3
    signals = [*published("ledger", "token_ledger_ranking")["signal"], "combined"]
    values = {name: generator.normal(size=n) + false for name in signals}
    return pd.DataFrame(
        {
            "item": [str(place // 10) for place in range(n)], "image": [str(place // 10) for place in range(n)], "token": 3,
            "word": [("dog", "cup", "car")[place % 3] for place in range(n)],
            "label": np.where(false, "hallucinated", "object"), **values,
        }
    )  # fmt: skip


def mentions(n: int = 120) -> pd.DataFrame:
    """Mentions with the scores of two probes and of the token's probability."""
    generator = np.random.default_rng(6)
    false = generator.random(n) < 0.3
    scores = {f"score_{name}": generator.normal(size=n) + false for name in ("logistic", "mlp")}
    return pd.DataFrame(
        {
            "hallucinated": false,
            "neg_log_p": generator.gamma(1 + false),
            "mention": generator.integers(1, 6, n),
            **scores,
        }
    )


def tokens_in_two_dimensions() -> pd.DataFrame:
    """Points of both modalities in three layers."""
    generator = np.random.default_rng(7)
    return pd.DataFrame(
        {
            "layer": np.repeat([0, 3, 6], 20), "modality": ["image", "text"] * 30, "explained": 0.5,
            **{name: generator.normal(size=60) for name in ("pc1", "pc2", "tsne1", "tsne2")},
        }
    )  # fmt: skip


def token_words(n: int = 90, **more: object) -> pd.DataFrame:
    """Words of three kinds with their T-VHD."""
    generator = np.random.default_rng(8)
    label = np.array(["object", "hallucinated", "other"])[np.arange(n) % 3]
    return pd.DataFrame({"label": label, "t_vhd_4": generator.normal(10, 2, n) + 3 * (label == "object"), **more})


def word_means(**more: object) -> pd.DataFrame:
    """Their means with intervals."""
    return pd.DataFrame(
        {"k": 4, "label": ["object", "hallucinated", "other"], "mean": [13.0, 10.0, 9.5], "low": [12.5, 9.0, 9.0],
         "high": [13.5, 11.0, 10.0], **more}
    )  # fmt: skip


def pixels(side: int = 16) -> pd.DataFrame:
    """An image of a red square on grey, pixel by pixel."""
    image = np.asarray(picture(side))
    y, x = np.mgrid[:side, :side].reshape(2, -1)
    red, green, blue = image.reshape(-1, 3).T
    return pd.DataFrame({"item": "0", "y": y, "x": x, "red": red, "green": green, "blue": blue})


def picture(side: int = 16) -> Image.Image:
    """The same as an image."""
    image = np.full((side, side, 3), 180, np.uint8)
    image[side // 4 : side // 2, side // 4 : side // 2] = (200, 40, 40)
    return Image.fromarray(image)


def alignment(n_models: int = 4) -> pd.DataFrame:
    """Alignment and accuracy of some checkpoints."""
    x = np.linspace(0.1, 0.4, n_models)
    return pd.DataFrame(
        {
            "model": [f"m{place}" for place in range(n_models)], "order": range(n_models),
            "step": [*range(n_models - 1), np.nan], "metric": "accuracy", "value": x,
            "low": x - 0.02, "high": x + 0.03, "score": 0.9 - x, "score_low": 0.86 - x, "score_high": 0.95 - x,
        }
    )  # fmt: skip


def costs(x: str, by: str, series: tuple[str, ...]) -> pd.DataFrame:
    """CHAIR_i of the reference and of some series at two places."""
    rows = [("reference", 0.0, 0.2)]
    rows += [(name, at, 0.2 + at / 300 + 0.01 * place) for place, name in enumerate(series) for at in (20.0, 40.0)]
    table = pd.DataFrame(rows, columns=[by, x, "value"])
    return table.assign(low=table["value"] - 0.02, high=table["value"] + 0.02, metric="chair_i", dataset="captions")


def doses() -> pd.DataFrame:
    """CHAIR_i of a method and of its control at three strengths, and of the unmodified model."""
    rows = [(np.nan, "", 0.24), *((dose, control, 0.24 - 0.02 * dose * (control == "")) for control in ("", "random")
                                  for dose in (0.5, 1.0, 2.0))]  # fmt: skip
    table = pd.DataFrame(rows, columns=["dose", "control", "value"])
    return table.assign(metric="chair_i", low=table["value"] - 0.02, high=table["value"] + 0.02)


def _ranking() -> pd.DataFrame:
    return published("ledger", "token_ledger_ranking")


def _layer_transfer() -> pd.DataFrame:
    rows = published("truthful_layers", "truthful_direction_layer_transfer", alignment="none")
    return rows.assign(source=rows["source_layer"].astype(str), target=rows["target_layer"].astype(str))


def _pair() -> pd.DataFrame:
    rows = published("truthful_transfer_models", "truthful_direction_compare_transfer")
    return rows[(rows["source_model"] == rows["source_model"].iloc[0]) & (rows["varies"] == "model")]


def examples() -> dict[str, Example]:
    """By the name of the panel function."""
    patching = {"experiment": "tools_patching", "direction": "noising"}
    iou = {"experiment": "ima_fig6_subnetworks", "sparsity": 0.5}
    layers = published("tools_linear_probe", "linear_probe_layers")
    truth = published("truthful_layers", "truthful_direction_layers", method="logistic")
    vocabulary = published(
        "ima_fig4_vocabulary", "implicit_alignment_vocabulary_histogram", layer=0, modality="text", top=1
    )
    overlap = published("outliers_maps", "cls_outliers_overlap", encoder_layer=3)
    norms = published("outliers_maps", "cls_outliers_norms", stream="tower")
    maps = published("outliers_maps", "cls_outliers_maps", item=0)
    head_areas = published("vhd_fig2_heads", "head_divergence_t_vhd_auroc")
    prior = published("vhd_fig1_language_prior", "head_divergence_prior")
    places = published("vhd_fig1_language_prior", "head_divergence_prior_place")
    consistency = published("vhd_fig2_heads", "head_divergence_consistency")
    influence = published("outliers_maps", "cls_outliers_influence", features=True)
    effects = published("tools_token_ablation", "token_ablation_effects")
    redundancy = published("ledger", "token_ledger_redundancy")
    similarity = published("ima_fig2", "implicit_alignment_similarity", variant="raw")
    square = pd.DataFrame([[1.0, 0.6, 0.4], [0.6, 1.0, 0.5], [0.4, 0.5, 1.0]], index=list("abc"), columns=list("abc"))
    recall = pd.DataFrame(
        {"condition": ["a"] * 3 + ["b"] * 3, "cut": [1, 2, 3] * 2, "recall": [0.3, 0.5, 0.6, 0.25, 0.45, 0.5],
         "chair_i": [0.1, 0.15, 0.2, 0.09, 0.12, 0.18]}
    )  # fmt: skip
    order = pd.DataFrame({"condition": "a", "index": [1, 2, 3], "value": [0.1, 0.2, 0.3], "n": [30, 20, 10]})
    order = order.assign(low=order["value"] - 0.05, high=order["value"] + 0.05)
    reinforced = pd.DataFrame(
        {"n_layers": [0, 2, 4, 2, 4], "control": ["", "", "", "random", "random"], "metric": "chair_i",
         "value": [0.24, 0.2, 0.22, 0.23, 0.25]}
    )  # fmt: skip
    reinforced = reinforced.assign(low=reinforced["value"] - 0.02, high=reinforced["value"] + 0.02)
    words = pd.DataFrame(
        {"word": "a dog and a cup".split(), "label": ["other", "object", "other", "other", "hallucinated"],
         "t_vhd": [1.0, 5.0, 2.0, np.nan, 3.0]}
    )  # fmt: skip
    components = _pair()
    first = str(effects["role"].iloc[0])
    transfer = _layer_transfer()
    names = list(dict.fromkeys(transfer["source"]))
    parts = pd.concat([_ranking().assign(part="one"), _ranking().assign(part="other")], ignore_index=True)
    steps = published("vhd_fig2_heads", "head_divergence_consistency_steps")
    return {
        "position_panel": Example(
            (published(table="activation_patching_positions", **patching),), columns=("effect", "effect_low", "effect_high"),
            lines=(0.0, 1.0),
        ),
        "head_panel": Example((published(table="activation_patching_heads", **patching),), columns=("effect",)),
        "estimate_panel": Example(
            (published(table="activation_patching_attribution", **patching),), columns=("effect", "exact")
        ),
        "knockout_panel": Example(
            (published("tools_knockout", "attention_knockout_effects", flow="image_to_last"), "image_to_last"), scale=100,
            columns=("change", "change_low", "change_high", "control", "control_low", "control_high"), lines=(0.0,),
        ),
        "inside_panel": Example(
            (published("tools_rollout", "attention_rollout_shares", place="object"),),
            columns=("inside", "inside_low", "inside_high", "area", "opposite"),
        ),
        "depth_panel": Example(
            (published("tools_rollout", "attention_rollout_depths", place="object"), "inside", "share in the box"),
            columns=("inside", "inside_low", "inside_high", "area"),
        ),
        "recall_curve": Example((recall,), {"matched": 0.4}, ("recall", "chair_i"), lines=(0.4,)),
        "mention_index": Example((order,), {"overall": 0.22}, BARS, lines=(0.22,)),
        "causal_panel": Example(
            (published("vhd_fig2_heads", "head_divergence_causal", outcome="kl"),), lines=(0.0,),
            columns=("effect", "low", "high", "control_effect", "control_low", "control_high", "draws_min", "draws_max"),
        ),
        "token_map": Example((maps, "decoder"), columns=("decoder",)),
        "outlier_picture": Example((pixels(), maps)),
        "overlap_curves": Example((overlap,), columns=("overlap", "low", "high", "chance")),
        "influence_points": Example(
            (influence,), columns=tuple(f"{a}{b}" for a in ("influence", "matched", "random") for b in ("", "_low", "_high")),
            lines=(float(influence["chance"].iloc[0]),),
        ),
        "difference_points": Example(
            (published("outliers_maps", "cls_outliers_influence_difference", features=True),),
            columns=("difference", "low", "high"), lines=(0.0,),
        ),
        "jaccard_points": Example(
            (published("outliers_maps", "cls_outliers_agreement").query("n_items > 0"),),
            columns=("jaccard", "low", "high", "chance"),
        ),
        "count_points": Example(
            (published("outliers_maps", "cls_outliers_outliers"),),
            columns=("attention", "attention_low", "attention_high", "share"),
        ),
        "norm_densities": Example((published("outliers_maps", "cls_outliers_norm_histogram", stream="tower"), norms),
                                  columns=("share",)),
        "norm_ratios": Example((norms,), columns=("max_over_median", "low", "high", "largest_ratio")),
        "concentration_lines": Example(
            (published("outliers_maps", "cls_outliers_concentration"),),
            columns=("top_share", "low", "high", "chance", "on_objects", "on_objects_low", "on_objects_high", "area"),
        ),
        "conditions_panel": Example((scores(), "chair_i"), {"reference": "baseline"}, BARS, lines=(0.24,)),
        "pope_panel": Example((pope(), "accuracy"), columns=BARS, lines=(0.5,)),
        "differences_panel": Example((scores().assign(value=[-0.02, 0.01, 0.0], low=-0.05, high=0.03), "chair_i"),
                                     columns=BARS, lines=(0.0,)),
        "verdict_panel": Example(
            (verdicts(), "chair_i"), columns=(*BARS, "control_value", "control_low", "control_high"), lines=(0.0,)
        ),
        "dose_curve": Example((doses(), "chair_i", "alpha"), columns=("value",), lines=(0.24,)),
        "area_panel": Example((head_areas,), columns=("auroc", "low", "high", "adjusted_auroc", "place_auroc"), lines=(0.5,)),
        "agreement_panel": Example((consistency, list(consistency["comparison"].str.slice(0, 14)), "spearman"),
                                   columns=("spearman", "low", "high"), lines=(0.0,)),
        "steps_map": Example((steps,), columns=("spearman",)),
        "outlier_rows": Example((published("vhd_fig2_heads", "head_divergence_outliers"),),
                                columns=("zeroed", "low", "high", "expected")),
        "reinforcement_curve": Example((reinforced, "chair_i"), columns=("value",)),
        "time_bars": Example(
            (pd.DataFrame({"condition": ["a", "b"], "seconds": [20.0, 30.0], "ratio": [1.0, 1.5]}),), columns=("seconds",)
        ),
        "prior_by_kind": Example((prior, "same", "share unchanged"), columns=("same", "same_low", "same_high", "same_chance")),
        "prior_by_place": Example((places, "kl", "KL divergence (nats)"), columns=("kl", "kl_low", "kl_high")),
        "head_map": Example((published("vhd_fig2_heads", "head_divergence_heads"),), columns=("vhd",)),
        "head_intervals": Example((published("vhd_fig2_heads", "head_divergence_heads"),), columns=("vhd", "low", "high")),
        "t_vhd_histogram": Example((token_words(), "t_vhd_4", word_means()), shares=6),
        "alignment_curve": Example((similarity[similarity["pair"] == "image-text"], PAIRS["image-text"]), columns=BARS),
        "alignment_curves": Example((similarity, "pair", PAIRS), {"zero": True}, BARS, lines=(0.0,)),
        "scatter_tokens": Example((tokens_in_two_dimensions().query("layer == 0"), "pc1", "pc2"), columns=("pc1", "pc2")),
        "vocabulary_bars": Example((vocabulary[vocabulary["rank"] <= 8],), columns=BARS),
        "score_scatter": Example((alignment(), {f"m{place}": f"step {place}" for place in range(4)}),
                                 columns=("value", "low", "high", "score", "score_low", "score_high"), lines=(0.5,)),
        "interaction_panel": Example(
            (["a", "b"], {"a": Estimate(-0.05, -0.08, -0.02), "b": Estimate(0.01, -0.02, 0.04)},
             {("a", "b"): Estimate(-0.03, -0.06, 0.0)}, {("a", "b"): Estimate(0.01, -0.01, 0.03)}, "chair_i"),
        ),
        "ranking_panel": Example((_ranking(),), columns=("auroc", "low", "high", "partial", "partial_low", "partial_high"),
                                 lines=(0.5,)),
        "sensitivity_panel": Example((_ranking(),), columns=("tpr", "tpr_low", "tpr_high"), lines=(0.01,)),
        "signal_roc_panel": Example((ledger(), _ranking().head(3)), {"rate": 0.05}),
        "comparison_panel": Example((parts,), columns=("auroc", "low", "high"), lines=(0.5,)),
        "class_panel": Example((ledger(), "entropy", "entropy"), shares=4),
        "redundancy_panel": Example((redundancy, dict.fromkeys(redundancy["signal_a"], 1)), height=5.7,
                                    narrow={"annotate": False}),
        "strip_panel": Example((ledger(), "2", _ranking().head(6)), narrow={"annotate": False}),
        "probe_curves": Example((layers, "auroc"), lines=(0.5,),
                                columns=("auroc", "low", "high", "control", "control_low", "control_high", "null_high")),
        "lens_panel": Example((published("tools_logit_lens", "logit_lens_text", metric="probability", kind="object"), "kind"),
                              {"chance": 0.01}, BARS, lines=(0.01,)),
        "similarity_map": Example((published("tools_similarity_layers", "representation_similarity_layers", measure="cka"),),
                                  {"both": True}, ("value",)),
        "scene_panel": Example((picture(),), bare=True),
        "attention_panel": Example((picture(), np.eye(4)), bare=True),
        "words_panel": Example((words,), bare=True),
        "cost_curves": Example((costs("saved", "series", ("skip the FFN", "skip the block")), "saved", "series"), columns=BARS,
                               lines=(0.2,)),
        "steering_curves": Example((published("tools_steering", "steering_vectors_layers"),), columns=("auroc", "low", "high"),
                                   lines=(0.5,)),
        "overlap_by_layer": Example((published(table="subnetworks_iou", type="q", **iou),),
                                    columns=("iou", "low", "high", "shuffled", "image_halves", "text_halves")),
        "overlap_by_type": Example((published(table="subnetworks_iou_by_type", **iou),),
                                   columns=("iou", "low", "high", "shuffled", "image_halves", "text_halves")),
        "overlap_map": Example((square,), {"random": 0.2}, ("a", "b", "c"), narrow={"small": True}),
        "overlap_by_kind": Example(
            (published("ima_fig6_subnetworks", "subnetworks_compare_tasks_by_kind", type="all", sparsity=0.5),),
            columns=("iou", "low", "high"),
        ),
        "effect_points": Example((effects[effects["role"] == first], ("change", "low", "high")), lines=(0.0,),
                                 columns=("change", "low", "high")),
        "truth_curve": Example((truth, "logistic"), lines=(0.5,),
                               columns=("auroc", "low", "high", "control_auroc", "control_low", "control_high")),
        "score_histogram": Example((mentions(), "neg_log_p"), shares=4),
        "score_roc_panel": Example((mentions(), [("score_logistic", "logistic", "#0072B2", "-"),
                                                 ("neg_log_p", "-log p", "#D55E00", (0, (5, 2)))]),),
        "matrix_panel": Example((transfer, names, names), columns=("auroc",)),
        "component_panel": Example((components,), lines=(0.5,), columns=("target_trained",)),
        "pmc_panel": Example((published("truthful_layers", "truthful_direction_pmc_by_length").query("n_mentions >= 5"),),
                             columns=("mean", "low", "high")),
        "pmc_difference_panel": Example(
            (published("truthful_layers", "truthful_direction_pmc").query("quantity.str.startswith('hallucinated minus')"),),
            columns=BARS, lines=(0.0,),
        ),
    }  # fmt: skip
