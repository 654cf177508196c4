"""Figures of IMA (Shukor and Cord, NeurIPS 2024, arXiv 2405.16700)."""

from __future__ import annotations

from typing import Final

from slitlamp.reports.papers.claims import (
    AGREES,
    DIFFERS,
    OPEN,
    Claim,
    Finding,
    Lacking,
    Side,
    Tables,
    apart,
    changes,
    difference,
    estimate,
    lies,
    rows,
    together,
)
from slitlamp.reports.wording import number

PAPER: Final = "IMA"
CHECKPOINTS: Final = "the checkpoints of `slitlamp train-organism`, or `models` of your own"
MARGIN: Final = 0.05
"""Largest loss of accuracy that counts as little in the figure of skipping: ours, 5 points."""
SPARSITY: Final = 0.5


def modality_gap(tables: Tables) -> Finding:
    """Figure 2. At every layer the interval of the image-text cosine lies below those of image-image and text-text."""
    similarity = rows(tables, "implicit_alignment_similarity", variant="raw")
    similarity = similarity[similarity["dataset"] == similarity["dataset"].iloc[0]]
    layers = sorted(similarity["layer"].unique())
    parts = []
    for layer in layers:
        pair = {
            name: estimate(rows({"similarity": similarity}, "similarity", layer=layer, pair=name))
            for name in ("image-text", "image-image", "text-text")
        }
        parts += [
            apart(pair["image-text"], "below", pair[other], f"{other} at layer {layer}: {{first}} against {{second}}")
            for other in ("image-image", "text-text")
        ]
    below = sum(one.verdict == AGREES for one in parts)
    middle = layers[len(layers) // 2]
    shown = [
        f"{name} {estimate(rows({'similarity': similarity}, 'similarity', layer=middle, pair=name)).text()}"
        for name in ("image-text", "image-image", "text-text")
    ]
    return Finding(
        together(*parts).verdict,
        f"image-text cosine below image-image and below text-text in {below} of {len(parts)} comparisons at {len(layers)} "
        f"layers; at layer {middle}: {', '.join(shown)}",
    )


def change_and_norms(tables: Tables) -> Finding:
    """Figure 3. In the first block image tokens change less than text, and enter it with the larger norm."""
    first = {
        kind: estimate(rows(tables, "implicit_alignment_change", interval=1, layer=0, modality=kind))
        for kind in ("image", "text")
    }
    norm = {
        kind: estimate(rows(tables, "implicit_alignment_norms", layer=0, modality=kind)) for kind in ("image", "text")
    }
    return together(
        apart(
            first["image"], "above", first["text"], "cosine across the first block {first} of image, {second} of text"
        ),
        apart(norm["image"], "above", norm["text"], "norm at the input {first} of image, {second} of text"),
    )


def vocabulary(tables: Tables) -> Finding:
    """Figure 4. At every layer the divergence of the words of image from those of text lies above that between halves of text."""
    kl = rows(tables, "implicit_alignment_kl")
    layers = sorted(kl["layer"].unique())

    def of(pair: str, layer: int) -> Finding:
        return apart(
            estimate(rows(tables, "implicit_alignment_kl", pair="image to text", layer=layer)),
            "above",
            estimate(rows(tables, "implicit_alignment_kl", pair=pair, layer=layer)),
            "KL of image from text after the last block {first}, between halves of the "
            + pair.split()[0]
            + " {second}",
        )

    parts = [of(pair, layer) for layer in layers for pair in ("text halves", "image halves")]
    last = [of(pair, layers[-1]).text for pair in ("text halves", "image halves")]
    above = sum(one.verdict == AGREES for one in parts)
    return Finding(
        together(*parts).verdict, f"above in {above} of {len(parts)} comparisons; {last[0]}; {last[1].split(', ')[-1]}"
    )


def subnetworks(tables: Tables) -> Finding:
    """Figures 5 and 6. The IoU of what image and text tokens activate lies above that of random masks, at half of the weights."""
    row = rows(tables, "subnetworks_iou_by_type", type="all", sparsity=SPARSITY)
    found, random = estimate(row, "iou"), float(row["random"].iloc[0])
    judged = lies(found, "above", random, "IoU of image and text at sparsity .5")
    shuffled = float(row["shuffled"].iloc[0])
    return Finding(
        judged.verdict,
        f"{judged.text} (random masks {number(random)}; the same weights with shuffled norms {number(shuffled)}, so that most of "
        "it is the weights' own)",
    )


def task_overlap(tables: Tables) -> Finding:
    """Figure 22. Subnetworks of one kind of token on captions and on each set of questions overlap more than random masks.

    Sets of questions are not compared with each other: they share their images.
    """
    found = rows(tables, "subnetworks_compare_tasks", type="all", sparsity=SPARSITY)
    captions = [found[side].astype(str).str.endswith("captions") for side in ("dataset_a", "dataset_b")]
    found = found[(captions[0] != captions[1]) & (found["tokens_a"] == found["tokens_b"])]
    if found.empty:
        raise Lacking("no pair of captions and questions")
    parts = []
    for tokens, pairs in found.groupby("tokens_a", sort=False):
        least = pairs.loc[[pairs["iou"].idxmin()]]
        random = float(least["random"].iloc[0])
        text = f"IoU of {tokens} tokens of captions and questions, the least of {len(pairs)} (random {number(random)})"
        parts.append(lies(estimate(least, "iou"), "above", random, text))
    return together(*parts)


def training(tables: Tables) -> Finding:
    """Figure 7. The image-text cosine, mean over layers, of the last checkpoint lies above that of the first."""
    scores = rows(tables, "implicit_alignment_compare_model_scores", kind="same_layer", variant="raw")
    scores = scores[scores["step"].notna()].sort_values("order")
    if len(scores) < 2:
        raise Lacking("no two checkpoints")
    ends = scores.iloc[[0]], scores.iloc[[-1]]
    own = [estimate(one, "difference", "difference_low", "difference_high").text() for one in ends]
    judged = apart(
        estimate(ends[1]),
        "above",
        estimate(ends[0]),
        "cosine, mean over layers: {first} at the last checkpoint, {second} at the first, random weights",
    )
    return Finding(judged.verdict, f"{judged.text} (own minus another's text: {own[1]} and {own[0]})")


def inside(tables: Tables) -> Finding:
    """Figure 8. From the normed input of a block to its end the image-text cosine rises (intervals apart) in most blocks: agrees;
    it does not, and falls in one: differs.
    """
    found = rows(tables, "implicit_alignment_inside_similarity", variant="raw")
    layers = sorted(found["layer"].unique())
    parts = [
        apart(
            estimate(found[(found["tap"] == "resid_post") & (found["layer"] == layer)]),
            "above",
            estimate(found[(found["tap"] == "ln1") & (found["layer"] == layer)]),
            "",
        )
        for layer in layers
    ]
    rises, falls = (sum(one.verdict == verdict for one in parts) for verdict in (AGREES, DIFFERS))
    verdict = AGREES if 2 * rises > len(layers) else DIFFERS if falls else OPEN
    last = {
        tap: estimate(found[(found["tap"] == tap) & (found["layer"] == layers[-1])]).text()
        for tap in ("ln1", "mlp_out", "resid_post")
    }
    return Finding(
        verdict,
        f"from the input of a block to its end the cosine rises in {rises} and falls in {falls} of {len(layers)} blocks; in the "
        f"last: {last['ln1']} at the input, {last['mlp_out']} of the MLP's output, {last['resid_post']} at the end",
    )


def performance(tables: Tables) -> Finding:
    """Figure 9. The rank correlation over models of alignment with accuracy is above 0."""
    return _correlation(tables, "accuracy", "above")


def hallucination(tables: Tables) -> Finding:
    """Figure 10. The rank correlation over models of alignment with CHAIR_i is below 0."""
    return _correlation(tables, "chair_i", "below")


def _correlation(tables: Tables, metric: str, side: Side) -> Finding:
    """The rank correlation with a score; beside it that of the training step, which checkpoints of one training share with it."""
    table = rows(tables, "implicit_alignment_compare_correlations", metric=metric, method="spearman")
    table = table[(table["kind"] == "same_layer") & (table["variant"] == "raw")]
    found = rows({"correlations": table}, "correlations", of="alignment")
    n = int(found["n_models"].iloc[0])
    judged = lies(estimate(found, "r"), side, 0.0, f"rank correlation with {metric} over {n} models")
    step = table[table["of"] == "training step"]
    beside = "" if step.empty else f" (of the training step alone {estimate(step, 'r').text()})"
    return Finding(judged.verdict, judged.text + beside)


def skipping(tables: Tables) -> Finding:
    """Figure 11. Image tokens that pass every second MLP by lose less than 5 points of accuracy, by the whole interval."""
    half = difference(tables, "ffn_half", "baseline", "accuracy", "pope")
    judged = lies(half, "above", -MARGIN, "accuracy on questions without every second MLP of image tokens")
    more = difference(tables, "ffn_every", "baseline", "accuracy", "pope")
    caption = difference(tables, "ffn_every", "baseline")
    return Finding(
        judged.verdict,
        f"{judged.text}, without all between the first and the last {more.text(signed=True)}, CHAIR_i of captions then "
        f"{caption.text(signed=True)}",
    )


def alpha_subnet(tables: Tables) -> Finding:
    """Figure 12. At sparsity .5 the alpha-SubNet answers better than random masks of equal size and than the largest weights."""
    return together(
        *(
            changes(
                difference(tables, "alpha_0.5", f"alpha_0.5_{control}", "accuracy", "pope"),
                "above",
                f"accuracy of the alpha-SubNet minus that of {name}",
            )
            for control, name in (("random", "random masks"), ("magnitude", "the largest weights"))
        ),
    )


CLAIMS: Final = (
    Claim(
        PAPER,
        "figure 2",
        "ima_fig2",
        "image-text cosine is far below image-image and text-text, near zero",
        modality_gap,
    ),
    Claim(
        PAPER,
        "figure 3",
        "ima_fig3",
        "image tokens change slowly across depth and text sharply early; image norms are above text norms",
        change_and_norms,
    ),
    Claim(
        PAPER,
        "figure 4",
        "ima_fig4_vocabulary",
        "image and text tokens stay distinct as distributions over the vocabulary",
        vocabulary,
    ),
    Claim(
        PAPER,
        "figures 5 and 6",
        "ima_fig6_subnetworks",
        "image and text tokens activate much the same weights",
        subnetworks,
    ),
    Claim(
        PAPER,
        "figure 7",
        "ima_fig7_checkpoints",
        "image-text alignment rises with training",
        training,
        CHECKPOINTS,
    ),
    Claim(PAPER, "figure 8", "ima_fig8", "image-text alignment rises within blocks", inside),
    Claim(PAPER, "figure 9", "ima_fig9", "alignment correlates positively with performance", performance, CHECKPOINTS),
    Claim(
        PAPER,
        "figure 10",
        "ima_fig9",
        "alignment correlates negatively with hallucination",
        hallucination,
        CHECKPOINTS,
    ),
    Claim(
        PAPER,
        "figure 11",
        "ima_fig11_skipping",
        "image tokens can skip much of the MLPs' computation at little loss",
        skipping,
    ),
    Claim(
        PAPER,
        "figure 12",
        "ima_fig12_subnet",
        "one subnetwork that all tasks share serves better than random or magnitude masks of equal sparsity",
        alpha_subnet,
        "masks (`experiments/masks/README.md` makes them for another)",
    ),
    Claim(
        PAPER,
        "figure 22",
        "ima_fig6_subnetworks",
        "tasks share most of the weights that they activate",
        task_overlap,
    ),
)
