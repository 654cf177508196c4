"""Figures and tables of TruthPrInt (ICCV 2025, arXiv 2503.10602); no code and no figure numbers of it were at hand."""

from __future__ import annotations

from typing import Final

from slitlamp.reports.papers.claims import (
    AGREES,
    DIFFERS,
    OPEN,
    Claim,
    Finding,
    Lacking,
    Tables,
    apart,
    best,
    chair,
    changes,
    difference,
    estimate,
    lies,
    rows,
    seconds,
    together,
)

PAPER: Final = "TruthPrInt"
DIRECTION: Final = "a direction (`experiments/directions/README.md` makes one for another)"
METHOD: Final = "logistic"
LR_PLUS: Final = 20.0


def scores(tables: Tables) -> Finding:
    """Distributions of scores. States before objects tell hallucinated from true: AUROC of the best layer above .5."""
    found = rows(tables, "truthful_direction_layers", method=METHOD)
    layer = best(found, "auroc")
    judged = lies(estimate(layer, "auroc"), "above", 0.5, f"AUROC of layer {int(layer['layer'].iloc[0])}")
    control = estimate(layer, "control_auroc", "control_low", "control_high")
    return Finding(
        judged.verdict,
        f"{judged.text}, the best of its layers; random labels of the objects reach {control.text()}, so that what an object is "
        "may be all that is read",
    )


def roc(tables: Tables) -> Finding:
    """ROC. At a false-positive rate of .01 the true-positive rate is 20 times as high, or more."""
    found = rows(tables, "truthful_direction_threshold", method=METHOD, wanted_fpr=0.01)
    lr = estimate(rows({"t": found}, "t", metric="lr_plus"))
    tpr = estimate(rows({"t": found}, "t", metric="tpr"))
    judged = lies(lr, "above", LR_PLUS, "TPR over FPR, at a threshold set for .01,")
    return Finding(judged.verdict, f"{judged.text}; TPR {tpr.text()}")


def layers(tables: Tables) -> Finding:
    """Layers. The AUROC of the best layer that is neither the first block nor the last lies above those of both."""
    found = rows(tables, "truthful_direction_layers", method=METHOD)
    found = found[found["layer"] >= 0].sort_values("layer")
    if len(found) < 3:
        raise Lacking("fewer than three blocks")
    between = best(found.iloc[1:-1], "auroc")
    ends = [estimate(found.iloc[[place]], "auroc") for place in (0, -1)]
    middle = estimate(between, "auroc")
    judged = together(*(apart(middle, "above", end, "") for end in ends))
    return Finding(
        judged.verdict,
        f"AUROC {middle.text()} after block {int(between['layer'].iloc[0])}, {ends[0].text()} after the first, {ends[1].text()} "
        "after the last",
    )


def transfer_models(tables: Tables) -> Finding:
    """Model x model. Subspace alignment (ComnHallu) carries a direction better than none does, by whole intervals, both ways."""
    return _transfer(tables, "model", "source_model", "target_model")


def transfer_data(tables: Tables) -> Finding:
    """Data x data. Subspace alignment carries a direction better than none does, by whole intervals, between all pairs."""
    return _transfer(tables, "dataset", "source_dataset", "target_dataset")


def _transfer(tables: Tables, varies: str, source: str, target: str) -> Finding:
    found = rows(tables, "truthful_direction_compare_transfer", varies=varies)
    parts, reached = [], []
    for _, pair in found.groupby([source, target], sort=False):
        aligned = pair[pair["alignment"] == "subspace"]
        plain = pair[pair["alignment"] == "none"]
        if aligned.empty or plain.empty:
            raise Lacking("no subspace alignment beside none")
        parts.append(
            apart(estimate(best(aligned, "auroc"), "auroc"), "above", estimate(plain, "auroc"), "{first} ({second})")
        )
        reached.append(estimate(best(pair, "auroc"), "auroc").value)
    better, worse = (sum(one.verdict == verdict for one in parts) for verdict in (AGREES, DIFFERS))
    shown = parts[:2] if len(parts) > 2 else parts
    return Finding(
        together(*parts).verdict,
        f"AUROC with subspace alignment (without any), best number of components: {', '.join(one.text for one in shown)}"
        f"{', ...' if len(parts) > len(shown) else ''}; better in {better} and worse in {worse} of {len(parts)} transfers; the "
        f"best of all alignments reaches {min(reached):.2f} to {max(reached):.2f}",
    )


def tracebacks(tables: Tables) -> Finding:
    """Tracebacks against CHAIR. One lowers CHAIR_i, and five do not lower it further than one."""
    few = chair(tables, "max_tracebacks_1", "baseline", "below")
    more = difference(tables, "max_tracebacks_5", "max_tracebacks_1")
    further = DIFFERS if more.high < 0 else AGREES if more.low >= 0 else OPEN
    return together(few, Finding(further, f"CHAIR_i with 5 minus with 1 {more.text(signed=True)}"))


def traceback_time(tables: Tables) -> Finding:
    """Tracebacks against time. A run has one time of each condition and no interval, so that nothing is decided from it."""
    plain = seconds(tables, "baseline")
    shown = [f"{seconds(tables, f'max_tracebacks_{n}') / plain:.1f} with {n}" for n in (1, 2, 3, 5)]
    return Finding(
        OPEN, f"times the plain time: {', '.join(shown)} tracebacks; one run on shared cores, so no interval"
    )


def table(tables: Tables) -> Finding:
    """The main table. CHAIR_i is lower under pre-intervention than in greedy decoding, at the paper's false-positive rate."""
    judged = chair(tables, "fpr_0.01", "greedy", "below")
    more = chair(tables, "fpr_0.1", "greedy", "below")
    control = difference(tables, "fpr_0.1", "fpr_0.1_random_places")
    return Finding(
        judged.verdict,
        f"{judged.text}; {more.text}, minus as many stops at random places {control.text(signed=True)}",
    )


def pmc(tables: Tables) -> Finding:
    """Table 7. The least confidence in the sentence so far is higher before hallucinated objects than before true ones."""
    found = {
        name: estimate(rows(tables, "truthful_direction_pmc", quantity=name))
        for name in ("hallucinated minus true", "mean before hallucinated objects", "mean before true objects")
    }
    judged = changes(found["hallucinated minus true"], "above", "PMC before hallucinated minus before true objects")
    return Finding(
        judged.verdict,
        f"{judged.text} ({found['mean before hallucinated objects'].text()} and {found['mean before true objects'].text()})",
    )


CLAIMS: Final = (
    Claim(
        PAPER,
        "distributions of scores",
        "truthful_layers",
        "states just before an object know whether it is hallucinated (AUROC .93 in domain, LLaVA-1.5-13B)",
        scores,
    ),
    Claim(PAPER, "ROC", "truthful_layers", "TPR over FPR is about 20 at an FPR of .01", roc),
    Claim(PAPER, "layer against AUROC", "truthful_layers", "a middle layer is best (of 12 to 20 of 32)", layers),
    Claim(
        PAPER,
        "transfer, model x model",
        "truthful_transfer_models",
        "aligned subspaces carry the direction of one model to another",
        transfer_models,
        "two models of equal width: `--set 'models=[A, B]'`",
    ),
    Claim(
        PAPER,
        "transfer, data x data",
        "truthful_transfer_data",
        "aligned subspaces carry the direction of one data set to another (.58 zero-shot, by a re-measurement)",
        transfer_data,
    ),
    Claim(
        PAPER,
        "tracebacks against CHAIR",
        "truthful_tracebacks",
        "going back lowers CHAIR, and few tracebacks are best",
        tracebacks,
        DIRECTION,
    ),
    Claim(
        PAPER, "tracebacks against time", "truthful_tracebacks", "time grows with tracebacks", traceback_time, DIRECTION
    ),
    Claim(
        PAPER,
        "main table",
        "truthful_table1",
        "CHAIR_i of Qwen2-VL falls from 4.9 to 3.4, of InternVL from 4.8 to 3.0",
        table,
        DIRECTION,
    ),
    Claim(
        PAPER,
        "table 7",
        "truthful_pmc",
        "PMC is .29 before hallucinated and .22 before true objects (a replication: .247 and .2975)",
        pmc,
    ),
)
