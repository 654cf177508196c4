"""Figures and tables of VHR (Liu et al., ACL 2025, arXiv 2412.13949)."""

from __future__ import annotations

from typing import Final

from slitlamp.reports.papers.claims import (
    OPEN,
    Claim,
    Finding,
    Lacking,
    Tables,
    apart,
    chair,
    changes,
    difference,
    estimate,
    lies,
    rows,
    seconds,
    together,
)

PAPER: Final = "VHR"
TOP_K: Final = 4
"""Heads per layer whose divergences T-VHD sums, of the k that the runs have; the paper leaves it open."""
HEADS: Final = "heads of one image (`experiments/heads/README.md` makes them for another)"


def language_prior(tables: Tables) -> Finding:
    """Figure 1. Without the image the most probable token is that with it more often than by chance; and the distributions are
    closer at hallucinated objects than at true ones.
    """
    prior = {label: rows(tables, "head_divergence_prior", label=label) for label in ("all", "hallucinated", "object")}
    chance = float(prior["all"]["same_chance"].iloc[0])
    return together(
        lies(
            estimate(prior["all"], "same", "same_low", "same_high"),
            "above",
            chance,
            f"the same most probable token without the image (chance {chance:.2f})",
        ),
        apart(
            estimate(prior["hallucinated"], "kl", "kl_low", "kl_high"),
            "below",
            estimate(prior["object"], "kl", "kl_low", "kl_high"),
            "KL {first} at hallucinated and {second} at true objects",
        ),
    )


def heads(tables: Tables) -> Finding:
    """Figure 2. The most divergent head lies, by its whole interval, above the median head's."""
    found = rows(tables, "head_divergence_heads").sort_values("vhd")
    top, middle = found.iloc[[-1]], found.iloc[[len(found) // 2]]
    place = f"{int(top['layer'].iloc[0])}.{int(top['head'].iloc[0])}"
    return apart(
        estimate(top, "vhd"),
        "above",
        estimate(middle, "vhd"),
        f"VHD {{first}} of head {place}, {{second}} of the median head",
    )


def t_vhd(tables: Tables) -> Finding:
    """Figure 3. Low T-VHD tells hallucinated from true, of words and of sentences: AUROC above .5."""
    word = rows(tables, "head_divergence_t_vhd_auroc", k=TOP_K)
    sentence = rows(tables, "head_divergence_sentence_auroc", k=TOP_K, mean_over="tokens")
    judged = together(
        lies(estimate(word, "auroc"), "above", 0.5, "AUROC of low T-VHD"),
        lies(estimate(sentence, "auroc"), "above", 0.5, "of sentences"),
    )
    beyond = estimate(word, "adjusted_auroc", "adjusted_low", "adjusted_high")
    return Finding(judged.verdict, f"{judged.text}; beyond the place in the caption {beyond.text()}")


def number_of_layers(tables: Tables) -> Finding:
    """Figure 5. The best number of last layers between the least and the greatest has a CHAIR_i below that of both, by whole
    intervals; differs where that of one of them lies below it.
    """
    found = rows(tables, "conditions", metric="chair_i")
    names = sorted(name for name in found["condition"].astype(str).unique() if name[5:].isdigit())
    if len(names) < 3:
        raise Lacking("fewer than three numbers of layers")
    values = {name: estimate(found[found["condition"] == name]) for name in names}
    between = names[1:-1]
    best = min(between, key=lambda name: values[name].value)
    judged = together(*(apart(values[best], "below", values[end], "") for end in (names[0], names[-1])))
    return Finding(
        judged.verdict,
        f"CHAIR_i {values[best].text()} with {best[5:]} layers, the best between, {values[names[0]].text()} with "
        f"{names[0][5:]}, {values[names[-1]].text()} with {names[-1][5:]}",
    )


def time(tables: Tables) -> Finding:
    """Figure 6. A run has one time of each condition and no interval, so that nothing is decided from it."""
    plain, vhr, vcd = (seconds(tables, name) for name in ("baseline", "vhr", "vcd"))
    return Finding(
        OPEN,
        f"{vhr / plain:.2f} times the plain time with VHR and {vcd / plain:.2f} times with VCD, of one run: no interval",
    )


def words(tables: Tables) -> Finding:
    """Figure 8. T-VHD at the first token of objects that are there lies above that of all other words."""
    label = {
        name: estimate(rows(tables, "head_divergence_t_vhd", k=TOP_K, label=name), "mean")
        for name in ("object", "other")
    }
    return apart(label["object"], "above", label["other"], "T-VHD {first} at true objects, {second} at other words")


def consistency(tables: Tables) -> Finding:
    """Figure 10. Rank correlations of head maps between images, at the first token and at objects, are above 0."""
    parts = []
    for comparison, name in (
        ("first token, between items", "at the first token"),
        ("object mentions, between items", "at objects"),
    ):
        found = rows(tables, "head_divergence_consistency", comparison=comparison)
        parts.append(
            lies(estimate(found, "spearman"), "above", 0.0, f"rank correlation of heads between images {name}")
        )
    return together(*parts)


def table_chair(tables: Tables) -> Finding:
    """The main table. CHAIR_i under VHR is below that of greedy decoding and that of VCD; random heads beside it."""
    judged = together(chair(tables, "vhr", "greedy", "below"), chair(tables, "vhr", "vcd", "below"))
    control = difference(tables, "vhr", "vhr_random")
    return Finding(judged.verdict, f"{judged.text}; minus as many random heads {control.text(signed=True)}")


def table_pope(tables: Tables) -> Finding:
    """The main table. F1 on POPE rises."""
    return changes(difference(tables, "vhr", "greedy", "f1", "pope"), "above", "F1 of vhr minus greedy")


def table_heads(tables: Tables) -> Finding:
    """The ablation of heads. CHAIR_i is higher with heads of one sample, and without the outlier rule, than with the method."""
    return together(chair(tables, "one_sample", "vhr", "above"), chair(tables, "no_outlier_rule", "vhr", "above"))


def table_layers(tables: Tables) -> Finding:
    """The ablation of layers. CHAIR_i is lower with both than with the second layer alone and with the last ones alone."""
    return together(chair(tables, "both", "second", "below"), chair(tables, "both", "last", "below"))


def table_alpha(tables: Tables) -> Finding:
    """The ablation of alpha. Below 1 CHAIR_i rises, above 1 it falls."""
    return together(
        *(
            chair(tables, f"alpha_{alpha}", "baseline", "above" if float(alpha) < 1 else "below")
            for alpha in ("0.2", "0.5", "2", "3", "4")
        )
    )


CLAIMS: Final = (
    Claim(
        PAPER,
        "figure 1",
        "vhd_fig1_language_prior",
        "with the image removed the model goes on from the same prefix by its language prior, which hallucinations follow",
        language_prior,
    ),
    Claim(PAPER, "figure 2", "vhd_fig2_heads", "some heads react to the image far more than others", heads),
    Claim(
        PAPER,
        "figure 3",
        "vhd_fig3_t_vhd",
        "T-VHD is lower for hallucinated than for correct words and sentences",
        t_vhd,
    ),
    Claim(
        PAPER,
        "figure 5",
        "vhd_fig5_layers",
        "CHAIR is best at a middle number of reinforced last layers",
        number_of_layers,
    ),
    Claim(
        PAPER, "figure 6", "vhd_fig6_time", "VHR takes hardly longer than plain decoding, less than other methods", time
    ),
    Claim(
        PAPER,
        "figure 8",
        "vhd_fig3_t_vhd",
        "set phrases have low T-VHD, objects high at first mention",
        words,
    ),
    Claim(
        PAPER,
        "figure 10",
        "vhd_fig10_consistency",
        "the vision-aware heads are much the same across samples and object steps",
        consistency,
    ),
    Claim(
        PAPER,
        "main table, CHAIR",
        "vhr_table1",
        "CHAIR_i of LLaVA-1.5 falls from 14.32 (greedy) to 9.71, with VCD it is 15.42",
        table_chair,
    ),
    Claim(PAPER, "main table, POPE", "vhr_table1", "F1 of LLaVA-1.5 rises from 84.98 to 85.47", table_pope),
    Claim(
        PAPER,
        "ablation, choice of heads",
        "vhr_table_heads",
        "CHAIR_i is 13.81 with the heads of one sample and 10.36 without the outlier rule, against 9.71",
        table_heads,
        HEADS,
    ),
    Claim(
        PAPER,
        "ablation, layers",
        "vhr_table_layers",
        "CHAIR_i is 12.00 with layer 1 alone, 12.56 with the last 14 alone, 9.71 with both",
        table_layers,
    ),
    Claim(
        PAPER,
        "ablation, alpha",
        "vhr_table_alpha",
        "CHAIR_i is 21.04 at alpha .2, 17.32 at .5, 9.71 at 2, 8.68 at 3, and 2.01 at 4 where captions degenerate",
        table_alpha,
    ),
)
