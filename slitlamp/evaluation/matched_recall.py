"""CHAIR at matched recall: captions cut after their k-th mention, and conditions compared at the same recall.

A condition that names fewer objects hallucinates fewer. Cutting every caption after its k-th mention traces how
CHAIR_i and recall grow together; conditions are then compared where their recalls are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from slitlamp.errors import InputError
from slitlamp.evaluation.ground_truth import GroundTruth, ImageId
from slitlamp.evaluation.statistics import FloatArray, cluster_bootstrap, ratio


@dataclass(frozen=True)
class _Cuts:
    """Counts per image when its caption ends after mention 0..K, `[image, cut]` each."""

    mentions: FloatArray
    hallucinated: FloatArray
    true_objects: FloatArray

    @property
    def n(self) -> int:
        return int(self.mentions.shape[1])

    def flat(self) -> FloatArray:
        return np.hstack([self.mentions, self.hallucinated, self.true_objects])


def recall_curve(
    mentions: pd.DataFrame, truth: GroundTruth, image_ids: Sequence[ImageId] | None = None
) -> pd.DataFrame:
    """Recall and CHAIR_i when every caption ends after its k-th mention: columns cut (k), recall, chair_i, n_images.

    `mentions` is made by `chair_mentions`. A caption without a mention has no row there but its objects count for
    recall, so the images are `image_ids`, or all of `truth` (use `truth.subset`). Cut 0 mentions nothing: chair_i NaN.
    """
    images = _images(truth, image_ids)
    cuts = _cuts(mentions, truth, images)
    n_objects = sum(len(truth.objects[image]) for image in images)
    return pd.DataFrame(
        {
            "cut": np.arange(cuts.n),
            "recall": ratio(cuts.true_objects.sum(axis=0), n_objects),
            "chair_i": ratio(cuts.hallucinated.sum(axis=0), cuts.mentions.sum(axis=0)),
            "n_images": len(images),
        }
    )


def matched_recall(
    mentions_by_condition: Mapping[str, pd.DataFrame],
    truth: GroundTruth,
    recall: float | None = None,
    *,
    image_ids: Sequence[ImageId] | None = None,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """CHAIR_i of every condition at one recall, with intervals over images and paired differences to the first one.

    Between cut k and k + 1 the three counts (hallucinated mentions, mentions, true objects) are interpolated linearly.
    Where several cuts have the recall wanted, the latest counts, so a condition at its own full recall has the CHAIR_i
    of its full captions. `recall` None takes the lowest full recall of all conditions, anew in every resample. A given
    `recall` above a condition's full recall is an error; resamples that fall short of it are left out, and
    share_reached says how many did not (keep a given recall well below the full ones).

    Columns: condition, recall, cut, value (CHAIR_i), low, high, difference, difference_low, difference_high, p,
    full_recall, full_chair_i, share_reached, n_images; images as in `recall_curve`.
    """
    if not mentions_by_condition:
        raise InputError("matched_recall needs at least one condition: found none")
    images = _images(truth, image_ids)
    names = list(mentions_by_condition)
    cuts = [_cuts(table, truth, images) for table in mentions_by_condition.values()]
    objects = np.array([[len(truth.objects[image])] for image in images], dtype=np.float64)
    sums = np.hstack([objects, *(item.flat() for item in cuts)])
    sizes = [item.n for item in cuts]
    observed = _split(sums.sum(axis=0), sizes)
    full = ratio(np.array([item.true_objects[-1] for item in observed]), objects.sum())
    if recall is not None and not 0 < recall <= full.min() + 1e-12:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, full, strict=True))
        raise InputError(f"recall {recall} is not reached by every condition; full recalls are {shown}")

    def statistic(totals: FloatArray) -> FloatArray:
        """CHAIR_i, differences to the first condition, and cuts: `[..., 3 * condition]`."""
        parts = _split(totals, sizes)
        if recall is None:
            wanted = np.minimum.reduce([part.true_objects[..., -1] for part in parts])
        else:
            wanted = recall * totals[..., 0]
        values, positions = zip(*(_at(part, wanted) for part in parts), strict=True)
        chair = np.stack(values, axis=-1)
        return np.concatenate([chair, chair - chair[..., :1], np.stack(positions, axis=-1)], axis=-1)

    intervals = cluster_bootstrap(sums, statistic, level=level, n_resamples=n_resamples, seed=seed, p_value=True)
    assert isinstance(intervals, list)
    n = len(names)
    target = float(full.min()) if recall is None else recall
    rows = []
    for i, name in enumerate(names):
        value, difference = intervals[i], intervals[n + i]
        rows.append(
            {
                "condition": name,
                "recall": target,
                "cut": intervals[2 * n + i].value,
                "value": value.value,
                "low": value.low,
                "high": value.high,
                "difference": difference.value,
                "difference_low": difference.low,
                "difference_high": difference.high,
                "p": difference.p,
                "full_recall": full[i],
                "full_chair_i": float(ratio(observed[i].hallucinated[-1], observed[i].mentions[-1])),
                "share_reached": 1 - intervals[2 * n + i].n_undefined / n_resamples,
                "n_images": len(images),
            }
        )
    table = pd.DataFrame(rows)
    # The first condition is the reference: it has no difference to itself.
    table.loc[0, ["difference", "difference_low", "difference_high", "p"]] = np.nan
    return table


def _images(truth: GroundTruth, image_ids: Sequence[ImageId] | None) -> list[ImageId]:
    images = list(truth.objects) if image_ids is None else [truth.resolve(image) for image in image_ids]
    if not images or len(set(images)) != len(images):
        raise InputError(f"need at least one image, each once: found {len(images)} with {len(set(images))} distinct")
    return images


def _cuts(mentions: pd.DataFrame, truth: GroundTruth, images: Sequence[ImageId]) -> _Cuts:
    missing = {"image_id", "index", "hallucinated", "first"} - set(mentions.columns)
    if missing:
        raise InputError(f"need mentions made by chair_mentions: lacks {', '.join(sorted(missing))}")
    row_of = {image: row for row, image in enumerate(images)}
    resolved = [truth.resolve(image) for image in mentions["image_id"].tolist()]
    outside = [image for image in resolved if image not in row_of]
    if outside:
        raise InputError(f"mentions of image {outside[0]!r}, which is not among the {len(images)} images compared")
    if mentions.duplicated(["image_id", "index"]).any():
        raise InputError("mentions hold the same image and index twice: several conditions in one table?")
    index = mentions["index"].to_numpy(np.int64)
    hallucinated = mentions["hallucinated"].to_numpy(bool)
    shape = (len(images), int(index.max(initial=0)) + 1)
    at = (np.array([row_of[image] for image in resolved], dtype=np.int64), index)
    added = np.zeros((3, *shape))
    added[0][at] = 1
    added[1][at] = hallucinated
    added[2][at] = mentions["first"].to_numpy(bool) & ~hallucinated
    return _Cuts(*added.cumsum(axis=2))


def _split(totals: FloatArray, sizes: Sequence[int]) -> list[_Cuts]:
    """Undo the horizontal stacking of sums: one _Cuts of `[..., cut]` per condition."""
    parts = []
    begin = 1
    for size in sizes:
        block = totals[..., begin : begin + 3 * size]
        parts.append(_Cuts(block[..., :size], block[..., size : 2 * size], block[..., 2 * size :]))
        begin += 3 * size
    return parts


def _at(part: _Cuts, wanted: FloatArray) -> tuple[FloatArray, FloatArray]:
    """CHAIR_i `[...]` at the last cut that has `wanted` true objects, and that cut; NaN where none has so many."""
    found = part.true_objects
    # Counts are whole numbers, `wanted` may carry the rounding of recall x objects.
    slack = 1e-9 * (1 + np.abs(wanted))
    below = (found <= (wanted + slack)[..., None]).sum(axis=-1) - 1
    last = found.shape[-1] - 1
    after = np.minimum(below + 1, last)

    def pick(values: FloatArray, cut: np.ndarray) -> FloatArray:
        return np.take_along_axis(values, cut[..., None], axis=-1)[..., 0]

    gain = pick(found, after) - pick(found, below)
    share = np.where(gain > 0, (wanted - pick(found, below)) / np.where(gain > 0, gain, 1), 0.0)
    share = np.clip(share, 0.0, 1.0)

    def between(values: FloatArray) -> FloatArray:
        return pick(values, below) + share * (pick(values, after) - pick(values, below))

    chair = ratio(between(part.hallucinated), between(part.mentions))
    reached = found[..., -1] >= wanted - slack
    return np.where(reached, chair, np.nan), np.where(reached, below + share, np.nan)
