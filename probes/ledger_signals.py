"""The signals of the token ledger: what each is, where it comes from, and which way it should point.

A signal is one number per generated object token. Its expected sign is declared here, before any data are seen: +1 where a
hallucinated object should have the higher value, -1 where it should have the lower. All are measured at the position that
predicts the object's first token. `register` adds one:

    from probes.ledger_signals import Readings, Signal, register

    def certainty(readings: Readings) -> Tensor:
        return readings.logits.softmax(dim=-1).max(dim=-1).values

    register(Signal("top_1", "largest probability", "...", "own", -1, certainty, needs=("logits",)))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import pandas as pd
import torch
from torch import Tensor

from probes.ledger_readings import NEEDS, Need, Readings
from slitlamp.errors import InputError, unknown

Family = Literal["visual dependence", "attention", "states", "certainty", "baseline", "null"]
FAMILIES: Final[tuple[str, ...]] = get_args(Family)
"""What a signal is made of. `certainty` reads the next-token distribution alone; `baseline` reads nothing of the model."""


@dataclass(frozen=True)
class Signal:
    """One column of the ledger.

    Attributes:
        name: of the column.
        title: a few words for a figure.
        meaning: its definition, in a sentence.
        source: the paper that it is from.
        sign: +1: hallucinated objects should have the higher value; -1: the lower; 0: it should make no difference.
        function: from the readings of some object tokens to their values [token]; None for what is computed from the whole
            ledger at the end (the probe's out-of-fold score, the random number).
        family: what it is made of.
        needs: what must be recorded for it.
    """

    name: str
    title: str
    meaning: str
    source: str
    sign: int
    function: Callable[[Readings], Tensor] | None
    family: Family = "states"
    needs: tuple[Need, ...] = ()


SIGNALS: Final[dict[str, Signal]] = {}
"""All signals by name, in the order of the ledger's columns."""


def register(signal: Signal) -> Signal:
    """Add a signal to the ledger.

    Raises:
        InputError: a name that is taken or is no identifier, or a sign other than -1, 0 and 1.
        UnknownNameError: an unknown family, or an unknown recording among its needs.
    """
    if signal.name in SIGNALS or not signal.name.isidentifier():
        raise InputError(f"a signal needs a name of its own that is an identifier; found {signal.name!r}")
    if signal.sign not in (-1, 0, 1):
        raise InputError(f"the sign of {signal.name!r} must be -1, 0 or 1, found {signal.sign}")
    if signal.family not in FAMILIES:
        raise unknown("family of signals", signal.family, FAMILIES)
    for need in signal.needs:
        if need not in NEEDS:
            raise unknown(f"recording that {signal.name!r} needs", need, NEEDS)
    SIGNALS[signal.name] = signal
    return signal


def chosen_signals(names: Sequence[str] | None) -> list[Signal]:
    """The signals of these names, in the order of the registry; all for None.

    Raises:
        UnknownNameError: a name that no signal has.
        InputError: no name, or one twice.
    """
    if names is None:
        return list(SIGNALS.values())
    for name in names:
        if name not in SIGNALS:
            raise unknown("signal", name, SIGNALS)
    if not names or len(set(names)) != len(names):
        raise InputError(f"signals must be one or more different names, found {list(names)}")
    return [one for one in SIGNALS.values() if one.name in names]


def signal_table(signals: Sequence[Signal]) -> pd.DataFrame:
    """One row per signal: signal, title, family, sign, meaning, source."""
    columns = ("title", "family", "sign", "meaning", "source")
    rows = [{"signal": one.name, **{name: getattr(one, name) for name in columns}} for one in signals]
    return pd.DataFrame(rows)


def hellinger(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Hellinger distance of distributions given by their logarithms: [..., outcome] to [...], between 0 and 1."""
    return (0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(dim=-1)).clamp(max=1).sqrt()


def entropy(probabilities: Tensor) -> Tensor:
    """Shannon entropy in nats: [..., outcome] to [...]."""
    return torch.special.entr(probabilities).sum(dim=-1)


def t_vhd(readings: Readings) -> Tensor:
    """The sum over layers of the `top_k` largest head divergences of each layer (VHD, Eq. 4)."""
    divergence = readings.divergence
    k = min(readings.settings.top_k, divergence.shape[-1])
    return divergence.topk(k, dim=-1).values.sum(dim=(-2, -1))


def pdm_h(readings: Readings) -> Tensor:
    """Hellinger distance between the next-token distributions with and without the image."""
    return hellinger(readings.log_p, readings.log_p_without)


def visual_dependence(readings: Readings) -> Tensor:
    """The token's logit with the image minus its logit with the noised image."""
    return readings.of_token(readings.logits) - readings.of_token(readings.logits_noised)


def pmi(readings: Readings) -> Tensor:
    """The token's log-probability with the image minus that without it, in nats."""
    return readings.of_token(readings.log_p) - readings.of_token(readings.log_p_without)


def attention_image(readings: Readings) -> Tensor:
    """Attention weight on all image tokens, averaged over layers and heads."""
    return readings.attention.sum(dim=-1).mean(dim=-1)


def attention_outliers(readings: Readings) -> Tensor:
    """The outlier tokens' share of the attention on the image, from weights averaged over layers and heads."""
    weights = readings.attention.mean(dim=1)
    return (weights * readings.outliers).sum(dim=-1) / weights.sum(dim=-1)


def attention_entropy(readings: Readings) -> Tensor:
    """Entropy of the attention over the image tokens of each layer, over its largest possible value; mean over the layers
    that look at the image at all (a sliding window may leave it out of sight).
    """
    weights = readings.attention
    spread = entropy(weights / weights.sum(dim=-1, keepdim=True))  # NaN where there is no weight
    return spread.nanmean(dim=-1) / readings.n_image_tokens.to(spread).log()


def lens_agreement(readings: Readings) -> Tensor:
    """The largest probability of the token in the logit lenses of the image tokens."""
    return readings.lens


def surprisal(readings: Readings) -> Tensor:
    """-log p of the token, in nats."""
    return -readings.of_token(readings.log_p)


def prediction_entropy(readings: Readings) -> Tensor:
    """Entropy of the next-token distribution, in nats."""
    return entropy(readings.log_p.exp())


def margin(readings: Readings) -> Tensor:
    """Largest minus second largest probability of the next token."""
    top = readings.log_p.topk(2, dim=-1).values.exp()
    return top[..., 0] - top[..., 1]


_VHD = "VHD, Liu et al., ACL 2025, arXiv 2412.13949, Eq. 3-4"
_DAMRO = "DAMRO, Gong et al., EMNLP 2024, arXiv 2410.04514"

for _signal in (
    Signal(
        "t_vhd", "T-VHD", "How far the heads' outputs move when the image is removed, summed over the most divergent heads.",
        _VHD, -1, t_vhd, "visual dependence", ("heads",),
    ),
    Signal(
        "pdm_h", "prompt dependency (PDM-H)", "Hellinger distance of the next-token distributions with and without the image.",
        "M3ID, Favero et al., CVPR 2024, arXiv 2403.14003", -1, pdm_h, "visual dependence", ("logits", "without"),
    ),
    Signal(
        "visual_dependence", "token visual dependence", "Logit of the token with the image minus that with a noised image.",
        "TPO, Gu et al. 2024, arXiv 2412.14487", -1, visual_dependence, "visual dependence", ("logits", "noised"),
    ),
    Signal(
        "pmi", "PMI of image and token", "Log-probability of the token with the image minus that without it.",
        "pointwise mutual information", -1, pmi, "visual dependence", ("logits", "without"),
    ),
    Signal(
        "truthful_score", "truthful-direction probe", "Out-of-fold score of a logistic probe on the state before the object.",
        "TruthPrInt, Duan et al., ICCV 2025, arXiv 2503.10602", 1, None, "states", ("state",),
    ),
    Signal(
        "lens_agreement", "logit lens of the image", "Largest probability of the token in the logit lenses of image tokens.",
        "Jiang et al., ICLR 2025, arXiv 2410.02762", -1, lens_agreement, "states", ("lens",),
    ),
    Signal(
        "attention_image", "attention on the image", "Attention weight on image tokens, mean over layers and heads.",
        "PAI, Liu et al., ECCV 2024, arXiv 2407.21771", -1, attention_image, "attention", ("attention",),
    ),
    Signal(
        "attention_outliers", "image attention on outliers",
        "Share of the attention on the image that goes to the tokens the vision tower itself attends to most.",
        _DAMRO, 1, attention_outliers, "attention", ("attention", "outliers"),
    ),
    Signal(
        "attention_entropy", "spread of image attention", "Entropy of the attention over image tokens, relative to even.",
        "own choice", 1, attention_entropy, "attention", ("attention",),
    ),
    Signal(
        "surprisal", "−log p of the token", "Negative log-probability of the token.",
        "LURE, Zhou et al., ICLR 2024, arXiv 2310.00754", 1, surprisal, "certainty", ("logits",),
    ),
    Signal(
        "entropy", "entropy of the prediction", "Entropy of the next-token distribution.",
        "predictive entropy", 1, prediction_entropy, "certainty", ("logits",),
    ),
    Signal(
        "margin", "top-1 margin", "Largest minus second largest next-token probability.",
        "margin sampling", -1, margin, "certainty", ("logits",),
    ),
    Signal(
        "position", "position in the caption", "How many tokens were generated before it.",
        "LURE, Zhou et al., ICLR 2024, arXiv 2310.00754", 1, lambda readings: readings.position, "baseline",
    ),
    Signal(
        "mention", "mention index", "Which mention of an object in the caption it is, from 1.",
        "own choice", 1, lambda readings: readings.mention, "baseline",
    ),
    Signal(
        "frequency", "object frequency", "The share of the data set's images that hold the object.",
        "POPE, Li et al., EMNLP 2023, arXiv 2305.10355", 1, lambda readings: readings.frequency, "baseline",
    ),
    Signal(
        "random", "random number", "A number drawn for each token: what no signal looks like.",
        "control", 0, None, "null",
    ),
):  # fmt: skip
    register(_signal)
