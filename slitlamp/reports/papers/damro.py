"""Figures and tables of DAMRO (Gong et al., EMNLP 2024, arXiv 2410.04514); figure numbers of it were not at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from slitlamp.reports.papers.claims import (
    AGREES,
    Claim,
    Finding,
    Tables,
    apart,
    chair,
    changes,
    difference,
    estimate,
    lies,
    rows,
    together,
)

PAPER: Final = "DAMRO"
TOWER: Final = "a vision tower with a CLS token"
OTHERS: Final = {"VCD": "vcd", "random tokens": "damro_random", "plausibility alone": "damro_apc_only"}


def overlap(tables: Tables) -> Finding:
    """H_i. At the end of the prompt the overlap of the first i tokens lies above chance, by whole intervals, for i of 1 to 10."""
    found = rows(tables, "cls_outliers_overlap", features=True, query="end of the prompt")
    found = found[found["i"] <= 10]
    parts = [
        lies(estimate(found.iloc[[place]], "overlap"), "above", float(found["chance"].iloc[place]), "")
        for place in range(len(found))
    ]
    at = rows({"o": found}, "o", i=6)
    other = estimate(at, "other_image", "other_low", "other_high")
    return Finding(
        together(*parts).verdict,
        f"H_i above chance for {sum(one.verdict == AGREES for one in parts)} of i = 1 to {len(parts)}; H_6 "
        f"{estimate(at, 'overlap').text()} (chance {float(at['chance'].iloc[0]):.3f}, against another image {other.text()})",
    )


def influence(tables: Tables) -> Finding:
    """F. At hallucinated objects the decoder attends more to the encoder's first tokens than at true ones, within images and
    between images; both have to show it.
    """
    found = {
        compared: estimate(
            rows(tables, "cls_outliers_influence_difference", features=True, tokens="influence", compared=compared),
            "difference",
        )
        for compared in ("within images", "between images", "between true neighbours")
    }
    judged = together(
        changes(found["within images"], "above", "F at hallucinated minus true objects within images"),
        changes(found["between images"], "above", "between images"),
    )
    neighbours = found["between true neighbours"].text(signed=True)
    return Finding(judged.verdict, f"{judged.text}; against the true objects named before and after {neighbours}")


def maps(tables: Tables) -> Finding:
    """Maps. The outlier tokens lie in the background: less of them on objects than the objects' share of the image."""
    found = rows(tables, "cls_outliers_outliers", definition="first in the encoder's attention")
    return apart(
        estimate(found, "on_objects", "on_objects_low", "on_objects_high"),
        "below",
        estimate(found, "area", "area_low", "area_high"),
        "{first} of the outlier tokens lie on named objects, which cover {second} of the image",
    )


def table_chair(tables: Tables) -> Finding:
    """The main table. CHAIR_i under DAMRO is below that of the plain model and of M3ID; VCD, random tokens and, where captions
    are sampled, plausibility alone beside it.
    """
    judged = together(chair(tables, "damro", "original", "below"), chair(tables, "damro", "m3id", "below"))
    compared = set(rows(tables, "differences", condition="damro")["reference"].astype(str))
    others = [
        f"{name} {difference(tables, 'damro', condition).text(signed=True)}"
        for name, condition in OTHERS.items()
        if condition in compared
    ]
    return Finding(judged.verdict, f"{judged.text}; CHAIR_i of damro minus that of {', '.join(others)}")


def table_pope(tables: Tables) -> Finding:
    """The main table. Accuracy and F1 on POPE rise."""
    return together(
        *(
            changes(difference(tables, "damro", "original", metric, "pope"), "above", f"{name} of damro minus original")
            for metric, name in (("accuracy", "accuracy"), ("f1", "F1"))
        )
    )


def tokens(tables: Tables) -> Finding:
    """The ablation of top-k. With 6 outlier tokens of 64, as in the main table, CHAIR_i is below that of the plain model and that
    with as many random tokens.
    """
    judged = together(
        chair(tables, "top_k_6", "baseline", "below"), chair(tables, "top_k_6", "top_k_6_random", "below")
    )
    return Finding(judged.verdict, f"{judged.text}; {_series(tables, 'top_k', ('1', '3', '10', '20'))}")


def strength(tables: Tables) -> Finding:
    """The ablation of alpha. At the paper's .5 CHAIR_i is below that of the plain model; random tokens beside it."""
    judged = chair(tables, "alpha_0.5", "baseline", "below")
    control = difference(tables, "alpha_0.5", "alpha_0.5_random")
    return Finding(
        judged.verdict,
        f"{judged.text}, minus as many random tokens {control.text(signed=True)}; "
        f"{_series(tables, 'alpha', ('0.25', '1', '2', '4'))}",
    )


def _series(tables: Tables, name: str, values: Sequence[str]) -> str:
    """What other values of a parameter do to CHAIR_i."""
    shown = [f"{value} {difference(tables, f'{name}_{value}', 'baseline').text(signed=True)}" for value in values]
    return f"CHAIR_i minus baseline at {name} {', '.join(shown)}"


CLAIMS: Final = (
    Claim(
        PAPER,
        "overlap H_i",
        "outliers_overlap",
        "encoder and decoder attend to the same image tokens, far above chance",
        overlap,
        TOWER,
    ),
    Claim(
        PAPER,
        "influence F",
        "outliers_influence",
        "the decoder leans more on the encoder's first tokens where it hallucinates",
        influence,
        TOWER,
    ),
    Claim(
        PAPER,
        "maps",
        "outliers_maps",
        "both attentions gather on a few background tokens instead of objects",
        maps,
        TOWER,
    ),
    Claim(
        PAPER,
        "main table, CHAIR",
        "damro_table1",
        "CHAIR_i of LLaVA-1.5 falls from 7.2 to 3.6, below M3ID (5.3; so in all its models) and VCD (4.1; in two of three)",
        table_chair,
        TOWER,
    ),
    Claim(
        PAPER,
        "main table, POPE",
        "damro_table1",
        "accuracy of LLaVA-1.5 rises from 82.08 to 85.31, F1 from 80.48 to 84.72, sampled",
        table_pope,
        TOWER,
    ),
    Claim(
        PAPER,
        "main table, CHAIR, greedy",
        "damro_table1_greedy",
        "nothing: all its numbers are sampled; the same is asked of greedy decoding",
        table_chair,
        TOWER,
    ),
    Claim(
        PAPER,
        "main table, POPE, greedy",
        "damro_table1_greedy",
        "nothing: all its numbers are sampled; the same is asked of greedy decoding",
        table_pope,
        TOWER,
    ),
    Claim(
        PAPER,
        "ablation, top-k",
        "damro_table_topk",
        "outlier tokens are what to contrast with (10 of 576 tokens for LLaVA)",
        tokens,
        TOWER,
    ),
    Claim(
        PAPER,
        "ablation, alpha",
        "dose_outlier_contrast",
        "a contrast of .5 (LLaVA, captions) lowers hallucination",
        strength,
        TOWER,
    ),
)
