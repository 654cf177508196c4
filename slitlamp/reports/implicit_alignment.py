"""The figures of `ImplicitAlignment` on one model; those of its comparisons are in `implicit_alignment_compare`."""

from __future__ import annotations

from typing import Final

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slitlamp.reports import implicit_alignment_panels as panels
from slitlamp.reports.draw import (
    is_narrow,
    layer_axis,
    outer_labels,
    own_legend,
    panel_grid,
    reference_line,
)
from slitlamp.reports.drawing import Drawing, Tables
from slitlamp.reports.implicit_alignment_compare import FIGURES as COMPARED
from slitlamp.reports.implicit_alignment_panels import (
    CONTROL_LINES,
    DOTTED,
    KL,
    MODALITIES,
    PAIRS,
    TAPS,
    VARIANTS,
    Look,
)
from slitlamp.reports.style import BLUE, INK, ORANGE, PURPLE, SKY, VERMILLION, new_figure, styled

REDUCTIONS: Final = {
    "avg": Look(INK, "-", "o", "avg: of mean tokens"),
    "mean": Look(BLUE, (0, (6, 1.5)), "s", "mean"),
    "median": Look(SKY, DOTTED, "D", "median"),
    "max": Look(VERMILLION, "-", "^", "max"),
    "min": Look(PURPLE, (0, (2, 1.2)), "v", "min"),
    "max_mean": Look(ORANGE, (0, (4, 1.5, 1, 1.5)), "P", "max_mean"),
}


def _title_size(width: float) -> float:
    """Of the titles of panels that stay side by side where it is narrow."""
    return 8.0 if is_narrow(width) else 9.5


def _grid(width: float, n: int, height: float, columns: int, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Where it is narrow, two panels in a row from six on."""
    return panel_grid(width, n, height, columns=columns, narrow_columns=2 if n >= 6 else 1, sharey=sharey)


@styled
def _alignment_curves(tables: Tables, width: float) -> Figure | None:
    table = tables.get("similarity")
    if table is None:
        return None
    figure, axes = _grid(width, 3, 2.5, 3)
    for ax, (variant, title) in zip(axes, VARIANTS.items(), strict=True):
        panels.alignment_curves(table[table["variant"] == variant], "pair", PAIRS, ax, zero=True, spread=True)
        ax.set(ylim=(-1.05, 1.05), ylabel="cosine similarity")
        ax.set_title(title)
    outer_labels(axes)
    own_legend(figure, axes)
    return figure


@styled
def _matched(tables: Tables, width: float) -> Figure | None:
    table = tables.get("similarity")
    if table is None or table["difference"].isna().all():
        return None
    figure, axes = _grid(width, 3, 2.4, 3, sharey=True)
    looks = {name: PAIRS[name] for name in ("image-text", "input image-text")}
    for ax, (variant, title) in zip(axes, VARIANTS.items(), strict=True):
        panels.alignment_curves(table[table["variant"] == variant], "pair", looks, ax, zero=True, column="difference")
        ax.set_title(title)
        ax.set_ylabel("own minus other text")
    outer_labels(axes)
    own_legend(figure, axes)
    return figure


@styled
def _reductions(tables: Tables, width: float) -> Figure | None:
    table = tables.get("reductions")
    if table is None:
        return None
    raw = table[table["variant"] == "raw"]
    pairs = [name for name in PAIRS if (raw["pair"] == name).any()]
    figure, axes = _grid(width, len(pairs), 2.4, max(len(pairs), 1))
    for ax, pair in zip(axes, pairs, strict=True):
        panels.alignment_curves(raw[raw["pair"] == pair], "reduction", REDUCTIONS, ax, zero=True)
        ax.set(ylim=(-1.05, 1.05), ylabel="cosine similarity")
        ax.set_title(pair)
    outer_labels(axes)
    own_legend(figure, axes)
    return figure


@styled
def _token_map(tables: Tables, width: float) -> Figure | None:
    table = tables.get("tokens")
    if table is None:
        return None
    layers = sorted(table["layer"].unique())
    kinds = [("pc1", "pc2", "PCA")] + ([("tsne1", "tsne2", "t-SNE")] if "tsne1" in table else [])
    each = width / len(layers)
    figure = new_figure(width, each * len(kinds) + 0.6)
    axes = figure.subplots(len(kinds), len(layers), squeeze=False)
    for row, (x, y, name) in zip(axes, kinds, strict=True):
        for ax, layer in zip(row, layers, strict=True):
            here = table[table["layer"] == layer]
            panels.scatter_tokens(here, x, y, ax)
            ax.set_title(f"layer {layer}")
            if name == "PCA":
                ax.set_xlabel(f"{here['explained'].iloc[0]:.0%} of variance", fontsize=8)
        row[0].set_ylabel(name)
    own_legend(figure, list(axes[0]))
    return figure


@styled
def _change(tables: Tables, width: float) -> Figure | None:
    """Quantity 3 in the three spaces, and norms."""
    kept = tables.get("token_change")
    if kept is None:
        return None
    changes = tables["change"]
    steps = sorted(changes["interval"].unique())
    figure, axes = _grid(width, 3 * len(steps) + 1, 2.2, 2 if len(steps) == 1 else 3)
    places = [(step, variant) for step in steps for variant in VARIANTS]
    for ax, (step, variant) in zip(axes, places, strict=False):
        control = kept[(kept["interval"] == step) & (kept["variant"] == variant)]
        shown = changes[changes["interval"] == step] if variant == "raw" else control
        panels.alignment_curves(shown, "modality", MODALITIES, ax, zero=True)
        controls = {
            name: look._replace(line=CONTROL_LINES[name], marker="", name=f"control: other {name} tokens")
            for name, look in MODALITIES.items()
        }
        panels.alignment_curves(control, "modality", controls, ax, faint=True, column="control")
        name = "no massive" if variant == "removed" else variant
        ax.set_title(name if len(steps) == 1 else f"{name}, +{step}", fontsize=_title_size(width))
        ax.set_ylim(-0.55, 1.05)
        if variant == "raw":
            ax.set_ylabel(f"cosine with layer + {step}")
    panels.alignment_curves(tables["norms"], "modality", MODALITIES, axes[-1])
    panels.log_axis(axes[-1])
    axes[-1].set_title("norm")
    axes[-1].set_ylabel("median L2 norm")
    own_legend(figure, axes)
    return figure


@styled
def _kl(tables: Tables, width: float) -> Figure | None:
    if "kl" not in tables:
        return None
    entropy, change = tables["entropy"], tables["vocabulary_change"]
    figure, axes = _grid(width, 3, 2.5, 3)
    panels.alignment_curves(tables["kl"], "pair", KL, axes[0])
    axes[0].set_ylim(bottom=0)
    axes[0].set_title("KL, image from text")
    axes[0].set_ylabel("nats")
    pooled = {
        one: look._replace(line=CONTROL_LINES[one], name=f"{look.name}, pooled", marker="")
        for one, look in MODALITIES.items()
    }
    for kind, looks in (("of a token", MODALITIES), ("pooled", pooled)):
        panels.alignment_curves(entropy[entropy["kind"] == kind], "modality", looks, axes[1])
    reference_line(axes[1], float(entropy["uniform"].iloc[0]), "uniform", horizontal=True)
    axes[1].set_ylim(0, float(entropy["uniform"].iloc[0]) * 1.12)
    axes[1].set_title("entropy")
    for place, step in enumerate(sorted(change["interval"].unique())):
        looks = {
            one: look._replace(line=look.line if place == 0 else DOTTED, name=f"{look.name}, layer + {step}")
            for one, look in MODALITIES.items()
        }
        panels.alignment_curves(change[change["interval"] == step], "modality", looks, axes[2])
    axes[2].set_ylim(bottom=0)
    axes[2].set_title("KL, to a later layer")
    own_legend(figure, axes)
    return figure


@styled
def _histogram(tables: Tables, width: float) -> Figure | None:
    table = tables.get("vocabulary_histogram")
    if table is None:
        return None
    table = table[(table["top"] == 1) & (table["rank"] <= 8)]
    last = int(table["layer"].max())
    layers = sorted({0, (last + 1) // 2, last})
    figure = new_figure(width, 1.75 * len(layers) + 0.5)
    axes = figure.subplots(len(layers), 2, squeeze=False, sharex="row")
    for row, layer in zip(axes, layers, strict=True):
        for ax, modality in zip(row, MODALITIES, strict=True):
            here = table[(table["layer"] == layer) & (table["modality"] == modality)]
            panels.vocabulary_bars(here, ax).set_title(f"{modality}, layer {layer}")
    outer_labels(list(axes.ravel()))
    return figure


@styled
def _inside(tables: Tables, width: float) -> Figure | None:
    table = tables.get("inside")
    if table is None:
        return None
    cosines = tables["inside_similarity"]
    removed = bool((tables["massive"]["n_removed"] > 0).any())
    shown = [one for one in VARIANTS if removed or one != "removed"]
    figure, axes = _grid(width, 4 + len(shown), 2.2, 2)
    places = [(measured, modality) for measured in ("norm", "change") for modality in MODALITIES]
    for ax, (measured, modality) in zip(axes, places, strict=False):
        rows = table[(table["measure"] == measured) & (table["modality"] == modality)]
        panels.alignment_curves(rows, "tap", TAPS, ax)
        ax.set_title(f"{'norm' if measured == 'norm' else 'next block'}, {modality}", fontsize=_title_size(width))
        if measured == "norm":
            panels.log_axis(ax)
            ax.set_ylabel("median L2 norm")
        else:
            ax.set_ylim(-0.3, 1.05)
            ax.set_ylabel("cosine")
        layer_axis(ax, "block")
    for ax, variant in zip(axes[4:], shown, strict=True):
        panels.alignment_curves(cosines[cosines["variant"] == variant], "tap", TAPS, ax, zero=True)
        gap = "\n" if is_narrow(width) else " "
        ax.set_title(f"image-text,{gap}{variant}", fontsize=_title_size(width))
        ax.set_ylabel("cosine")
        layer_axis(ax, "block")
    own_legend(figure, axes)
    return figure


def _n(table: pd.DataFrame, what: str = "items") -> str:
    return f"{int(table['n_items'].max())} {what}"


def _curves_caption(tables: Tables) -> str:
    ratio = tables["norms"].query("modality == 'image / text' and layer == 0").iloc[0]
    removed = int(tables["massive"]["n_removed"].sum())
    none = (
        "none was found, so that the second panel is the first again" if not removed else f"{removed} over all layers"
    )
    return (
        "Cosine of mean-pooled tokens, mean over the whole grid of pairs of "
        f"{_n(tables['similarity'])} (image-image and text-text: one half against the other). Dark bands: 95 % intervals, images "
        "resampled; light bands: one standard deviation of the pairs. Dotted: the mean of all images against each text, "
        f"which no image of its own can explain. Massive dimensions: {none}. Standardised by the mean and deviation of both "
        "modalities together, opposite sides of the mean have negative cosines. At the input image tokens have "
        f"{ratio['value']:.1f} times the norm of text."
    )


FIGURES: Final = {
    "alignment_curves": Drawing("Image and text tokens by layer (IMA, figure 2)", _curves_caption, _alignment_curves),
    "matched_pairs": Drawing(
        "Is an image nearer to its own text?",
        lambda tables: (
            "Image-text cosine of matched pairs minus that of mismatched pairs (another image's text), "
            f"{_n(tables['similarity'])}, with 95 % intervals. Zero: an image is no nearer to its own text than to another's."
        ),
        _matched,
    ),
    "token_map": Drawing(
        "Tokens in two dimensions (IMA, figure 2)",
        lambda tables: (
            f"{int((tables['tokens']['layer'] == 0).sum() or len(tables['tokens']))} tokens, the same in every layer; each "
            "layer projected by itself, with the share of variance of two principal components. Distances in t-SNE have no scale."
        ),
        _token_map,
    ),
    "reductions": Drawing(
        "One number for many tokens: the reductions",
        lambda tables: (
            "Raw cosines of all token pairs of two examples, reduced in six ways; "
            f"{_n(tables['reductions'])} whose tokens are kept, with 95 % intervals. max and min are extremes of thousands of "
            "pairs: they are far from zero for unrelated tokens too."
        ),
        _reductions,
    ),
    "change_and_norms": Drawing(
        "Change across depth, and norms (IMA, figure 3)",
        lambda tables: (
            "Cosine of a token's state with its own state some layers on, mean over tokens and "
            f"{_n(tables['change'])} (spaces other than raw: {_n(tables['token_change'])}); dotted, different tokens of the same "
            f"example. Right: L2 norm, median over tokens, mean over {_n(tables['norms'])}. 95 % intervals."
        ),
        _change,
    ),
    "vocabulary_kl": Drawing(
        "Image and text tokens read as words (IMA, figure 4)",
        lambda tables: (
            "Distributions over the vocabulary by the model's own final norm and head, pooled over the tokens of an example; "
            f"mean over {_n(tables['kl'])} with 95 % intervals. Controls: every other token of the same image, and of "
            "the same text."
        ),
        _kl,
    ),
    "vocabulary_histogram": Drawing(
        "The words that tokens are read as (IMA, figure 4)",
        lambda tables: (
            "The most frequent most-probable words, as shares of the tokens, at the input, in the middle and at the end; "
            f"{_n(tables['vocabulary_histogram'])} whose tokens are kept, with 95 % intervals."
        ),
        _histogram,
    ),
    "inside_blocks": Drawing(
        "Inside the blocks (IMA, figure 8)",
        lambda tables: (
            f"Seven taps of every block, {_n(tables['inside'])}: median token norm, cosine of a token with itself at the same "
            "tap of the next block, and cosine of mean-pooled image and text tokens over all pairs; 95 % intervals. A tap "
            "that is missing does not exist in this family."
        ),
        _inside,
    ),
    **COMPARED,
}
