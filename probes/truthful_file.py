"""A fitted `TruthfulDirection` as a file that interventions read, with what a threshold and its controls need."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from probes.direction_targets import random_directions
from probes.linear_fits import permuted
from probes.truthful_fits import Options, fit_layers
from slitlamp.errors import InputError, unknown

if TYPE_CHECKING:
    from probes.truthful_direction import TruthfulDirection

N_RANDOM = 5
"""Random directions in a file."""


@dataclass(frozen=True)
class Detector:
    """A direction that scores states, with its scores of true mentions that it was not fitted on.

    Attributes:
        direction: float32 [d_model].
        intercept: added to the projection.
        true_scores: float32 [true mention].
    """

    direction: Tensor
    intercept: float
    true_scores: Tensor

    def score(self, states: Tensor) -> Tensor:
        """[batch] in float32, of states [batch, d_model]; higher means hallucinated."""
        return states.float() @ self.direction.to(states.device) + self.intercept

    def threshold(self, fpr: float) -> float:
        """The lowest score above which no more than a share `fpr` of true mentions lies; infinite for 0, at which none may ever.

        It is `slitlamp.evaluation.operating_points.threshold_at_fpr` of these scores.
        """
        ordered = self.true_scores.double().sort(descending=True).values
        allowed = int(fpr * len(ordered) + 5e-10)  # as there: 0.29 x 100 is 28.999999999999996
        if not fpr:
            return float("inf")
        return float(ordered[allowed]) if allowed < len(ordered) else -float("inf")


@dataclass(frozen=True)
class TruthfulFile:
    """What `TruthfulDirection.save` wrote.

    Attributes:
        layer: whose output is scored; -1 for the input of the first block.
        detectors: "probe"; "shuffled", of shuffled labels; "random" and, for further ones, "random 1", "random 2", ...
        words: the first words, in lower case, of the mentions that the scores are of; () where they are not known.
    """

    layer: int
    detectors: Mapping[str, Detector]
    words: tuple[str, ...]

    @staticmethod
    def read(given: Any, whose: str) -> TruthfulFile:
        """From a file, or from a mapping of the tensors in it.

        Raises:
            InputError: no such file, another kind of file, or tensors that do not fit each other or are not finite.
            UnknownNameError: a tensor is missing.
        """
        words: tuple[str, ...] = ()
        if isinstance(given, Mapping):
            tensors = {str(name): torch.as_tensor(value) for name, value in given.items()}
            source = "the given tensors"
        else:
            tensors, words = _read(Path(given), whose)
            source = str(given)
        layer = _wanted(tensors, ("layer",), source, whose)[0]
        detectors = {"probe": _detector(tensors, "", source, whose)}
        if "shuffled_direction" in tensors:
            detectors["shuffled"] = _detector(tensors, "shuffled_", source, whose)
        if "random_directions" in tensors:
            directions, scores = _wanted(tensors, ("random_directions", "random_true_scores"), source, whose)
            if directions.ndim != 2 or scores.ndim != 2 or len(directions) != len(scores):
                raise InputError(
                    f"{whose}: {source} needs random_directions [n, d_model] and random_true_scores [n, mention]; found "
                    f"{list(directions.shape)} and {list(scores.shape)}"
                )
            for number, (direction, drawn) in enumerate(zip(directions, scores, strict=True)):
                given = {"direction": direction, "intercept": torch.tensor(0.0), "true_scores": drawn}
                detectors[f"random {number}" if number else "random"] = _detector(given, "", source, whose)
        return TruthfulFile(int(layer), detectors, words)


def _wanted(tensors: Mapping[str, Tensor], names: Sequence[str], source: str, whose: str) -> list[Tensor]:
    for name in names:
        if name not in tensors:
            raise unknown(f"tensor in {source} ({whose}):", name, tensors)
    return [tensors[name] for name in names]


def _read(path: Path, whose: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            words = json.loads((file.metadata() or {}).get("words", "[]"))
            return {name: file.get_tensor(name) for name in file.keys()}, tuple(words)  # noqa: SIM118  no mapping
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InputError(
            f"{whose}: {path} cannot be read as a truthful direction ({error}); write it with TruthfulDirection.save"
        ) from error


def _detector(tensors: Mapping[str, Tensor], prefix: str, source: str, whose: str) -> Detector:
    names = [f"{prefix}{name}" for name in ("direction", "true_scores", "intercept")]
    direction, scores, shift = (one.float() for one in _wanted(tensors, names, source, whose))
    intercept = float(shift)
    if direction.ndim != 1 or scores.ndim != 1 or not len(scores):
        raise InputError(
            f"{whose}: {source} needs a direction [d_model] and at least one score of a true mention [mention]; found "
            f"{list(direction.shape)} and {list(scores.shape)}"
        )
    if not bool(direction.isfinite().all() and scores.isfinite().all() and np.isfinite(intercept)):
        raise InputError(f"{whose}: {source} holds NaN or infinity; fit it again")
    return Detector(direction, intercept, scores)


def save_direction(probe: TruthfulDirection, path: str | Path, layer: int | None, method: str) -> Path:
    """Write a fitted direction; see `TruthfulDirection.save`."""
    if probe.position != "before":
        raise InputError(
            f"decoding is stopped by the state that chooses a token: fit with position='before', found {probe.position!r}"
        )
    direction, intercept = probe.direction(layer, method)
    layer = probe.best_layer(method) if layer is None else layer
    mentions, states = probe.mentions(), probe.states(layer)
    true = ~mentions["hallucinated"].to_numpy(dtype=bool)
    scores = torch.from_numpy(probe.fits(method).own_scores(layer))
    drawn = torch.stack(random_directions(len(direction), probe.seed, N_RANDOM))
    tensors = {
        "direction": direction,
        "intercept": torch.tensor(intercept),
        "layer": torch.tensor(layer),
        "true_scores": scores[true].float(),
        "hallucinated_scores": scores[~true].float(),
        "random_directions": drawn,
        "random_true_scores": drawn @ states[true].T,
        **_shuffled(probe, layer, method, true),
    }
    words = sorted({str(word).strip().lower() for word in mentions["word"]} - {""})
    written = Path(path)
    save_file(
        {name: one.contiguous() for name, one in tensors.items()},
        written,
        metadata={"method": method, "words": json.dumps(words)},
    )
    return written


def _shuffled(probe: TruthfulDirection, layer: int, method: str, true: np.ndarray) -> dict[str, Tensor]:
    """The same fit to labels that were dealt out again to whole images, and its scores of the mentions that are true."""
    mentions = probe.mentions()
    rng = np.random.default_rng([probe.seed, 11])
    dealt = permuted(~true, mentions["group"].to_numpy(dtype=str), rng)
    options = Options(
        tuple(probe.strengths),
        probe.n_folds,
        n_controls=0,
        permutations=0,
        target_fpr=probe.target_fpr,
        seed=probe.seed,
    )
    fit = fit_layers(probe.states, [layer], mentions.assign(hallucinated=dealt), method, options)
    return {
        "shuffled_direction": fit.cv.directions[0].float(),
        "shuffled_intercept": fit.cv.intercepts[0].float(),
        "shuffled_true_scores": torch.from_numpy(fit.own_scores(layer))[true].float(),
    }
