"""Every panel of a figure under its name, for notebooks: from a table of a run, drawn on your axes or on new ones.

    import slitlamp as sl
    from slitlamp.reports import panels

    run = sl.load_run("runs/vhd_fig2_heads")
    ax = panels.head_map(run.table("head_divergence_heads"))
    ax.figure.savefig("heads.png", dpi=200)

Every function takes `ax` (None: the only axes of a new figure) and returns it; a table without the columns that it needs, or
without rows, is an `InputError` that says so. The figures of a run, which put panels together, are
`slitlamp.reports.figure(run, name)`.
"""

from __future__ import annotations

from slitlamp.reports.activation_patching import estimate_panel, head_panel, position_panel
from slitlamp.reports.attention_knockout import knockout_panel
from slitlamp.reports.attention_rollout import depth_panel, inside_panel
from slitlamp.reports.captions import mention_index, recall_curve
from slitlamp.reports.causal import causal_panel
from slitlamp.reports.cls_outliers_maps import outlier_picture, token_map
from slitlamp.reports.cls_outliers_panels import (
    concentration_lines,
    count_points,
    difference_points,
    influence_points,
    jaccard_points,
    norm_densities,
    norm_ratios,
    overlap_curves,
)
from slitlamp.reports.conditions import conditions_panel, differences_panel, pope_panel
from slitlamp.reports.dose import dose_curve
from slitlamp.reports.head_areas import area_panel
from slitlamp.reports.head_consistency import agreement_panel, outlier_rows, steps_map
from slitlamp.reports.head_layers import reinforcement_curve, time_bars
from slitlamp.reports.head_prior import prior_by_kind, prior_by_place
from slitlamp.reports.heads import head_intervals, head_map, t_vhd_histogram
from slitlamp.reports.implicit_alignment_panels import (
    alignment_curve,
    alignment_curves,
    scatter_tokens,
    score_scatter,
    vocabulary_bars,
)
from slitlamp.reports.interactions import interaction_panel
from slitlamp.reports.ledger_drawings import (
    class_panel,
    comparison_panel,
    ranking_panel,
    sensitivity_panel,
    signal_roc_panel,
)
from slitlamp.reports.ledger_maps import redundancy_panel, strip_panel
from slitlamp.reports.linear_probe import probe_curves
from slitlamp.reports.logit_lens import lens_panel
from slitlamp.reports.representation_similarity import similarity_map
from slitlamp.reports.scene import attention_panel, scene_panel, words_panel
from slitlamp.reports.skipping import cost_curves
from slitlamp.reports.steering_vectors import steering_curves
from slitlamp.reports.subnetworks import overlap_by_kind, overlap_by_layer, overlap_by_type, overlap_map
from slitlamp.reports.token_ablation import effect_points
from slitlamp.reports.truthful_panels import (
    component_panel,
    matrix_panel,
    pmc_difference_panel,
    pmc_panel,
    score_histogram,
    score_roc_panel,
    truth_curve,
)
from slitlamp.reports.verdicts import verdict_panel

__all__ = [
    "agreement_panel",
    "alignment_curve",
    "alignment_curves",
    "area_panel",
    "attention_panel",
    "causal_panel",
    "class_panel",
    "comparison_panel",
    "component_panel",
    "concentration_lines",
    "conditions_panel",
    "cost_curves",
    "count_points",
    "depth_panel",
    "difference_points",
    "differences_panel",
    "dose_curve",
    "effect_points",
    "estimate_panel",
    "head_intervals",
    "head_map",
    "head_panel",
    "influence_points",
    "inside_panel",
    "interaction_panel",
    "jaccard_points",
    "knockout_panel",
    "lens_panel",
    "matrix_panel",
    "mention_index",
    "norm_densities",
    "norm_ratios",
    "outlier_picture",
    "outlier_rows",
    "overlap_by_kind",
    "overlap_by_layer",
    "overlap_by_type",
    "overlap_curves",
    "overlap_map",
    "pmc_difference_panel",
    "pmc_panel",
    "pope_panel",
    "position_panel",
    "prior_by_kind",
    "prior_by_place",
    "probe_curves",
    "ranking_panel",
    "recall_curve",
    "redundancy_panel",
    "reinforcement_curve",
    "scatter_tokens",
    "scene_panel",
    "score_histogram",
    "score_roc_panel",
    "score_scatter",
    "sensitivity_panel",
    "signal_roc_panel",
    "similarity_map",
    "steering_curves",
    "steps_map",
    "strip_panel",
    "t_vhd_histogram",
    "time_bars",
    "token_map",
    "truth_curve",
    "verdict_panel",
    "vocabulary_bars",
    "words_panel",
]
