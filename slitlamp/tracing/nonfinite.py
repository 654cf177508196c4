"""NaN and infinity in what was recorded: found at the end of a run, and reported by where they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from slitlamp.errors import NonFiniteError, unknown
from slitlamp.tracing.sites import Site

if TYPE_CHECKING:
    from slitlamp.tracing.trace import Step, Trace

NonFinite = Literal["raise", "warn", "keep"]
POLICIES: tuple[NonFinite, ...] = ("raise", "warn", "keep")
_REPORTED = 5


class NonFiniteWarning(UserWarning):
    """Recordings hold NaN or infinity."""


def check_policy(policy: str) -> None:
    """Refuse an unknown policy.

    Raises:
        UnknownNameError: not "raise", "warn" or "keep".
    """
    if policy not in POLICIES:
        raise unknown("policy for NaN and infinity", policy, POLICIES)


def check_finite(trace: Trace, policy: NonFinite) -> None:
    """Look for NaN and infinity in the recordings of a run, and raise or warn.

    One pass over what was recorded; only when it finds something is each recording looked at. NaN that says that there was
    nothing to reduce (a row without image tokens, say) is not reported: it is what a reduction over nothing gives.

    Args:
        trace: the recordings.
        policy: "raise", "warn", or "keep": do not look.

    Raises:
        NonFiniteError: the policy is "raise" and there is NaN or infinity. The recordings stay in the trace.
    """
    if policy == "keep" or not trace.steps:
        return
    tensors = [one for step in trace.steps for layers in step.values.values() for one in layers.values()]
    if _all_finite(tensors):
        return
    found = list(_places(trace))
    if not found:
        return
    more = f"; and {len(found) - _REPORTED} more" if len(found) > _REPORTED else ""
    message = f"NaN or infinity in what was recorded: {'; '.join(found[:_REPORTED])}{more}"
    if policy == "raise":
        raise NonFiniteError(f'{message}. To keep such values, trace with nonfinite="keep"')
    warnings.warn(message, NonFiniteWarning, stacklevel=2)


def _all_finite(tensors: list[Tensor]) -> bool:
    """Whether every value is finite, by sums: one of NaN or infinity is NaN or infinite. A sum that overflows is too, so
    that a false answer needs a closer look.
    """
    sums: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for one in _whole(tensors):
        if one.is_floating_point():
            wide = torch.float64 if one.dtype == torch.float64 else torch.float32
            sums.setdefault((one.device, wide), []).append(one.detach().sum(dtype=wide))
    return all(bool(torch.stack(of).isfinite().all()) for of in sums.values())


def _whole(tensors: list[Tensor]) -> Iterator[Tensor]:
    """The same values in fewer tensors: recordings that are the parts of one tensor (the layers of a decode step) as that."""
    parts: dict[int, list[Tensor]] = {}
    for one in tensors:
        parts.setdefault(id(one if one._base is None else one._base), []).append(one)
    for of in parts.values():
        base = of[0]._base
        if base is not None and len(of) > 1 and sum(one.numel() for one in of) == base.numel():
            yield base
        else:
            yield from of


def _places(trace: Trace) -> Iterator[str]:
    """Where NaN and infinity are: site, layer, forward call and item."""
    ids = trace.batch.ids if trace.batch is not None else ()
    for number, step in enumerate(trace.steps):
        for label, layers in step.values.items():
            site = trace.sites[label]
            for layer, values in layers.items():
                bad = _bad(site, step, label, values)
                for row in bad.reshape(len(bad), -1).any(dim=1).nonzero()[:, 0].tolist():
                    one = bad[row]
                    who = f"tile {row}" if site.is_vision or row >= len(ids) else f"item {ids[row]!r}"
                    yield (
                        f"{label}, layer {layer}, forward call {number}, {who}: {int(one.sum())} of {one.numel()} values"
                    )


def _bad(site: Site, step: Step, label: str, values: Tensor) -> Tensor:
    """bool, of the shape of the values: NaN or infinite, and not the NaN of a reduction over nothing."""
    bad = ~values.isfinite()
    on_purpose: list[Tensor] = []
    if (site.reduce_queries if site.is_attention else site.reduce) is not None:
        on_purpose.append(~step.masks[label].any(dim=1))
    if site.is_attention and site.reduce_keys is not None:
        on_purpose.append(~step.key_masks[label].any(dim=1))
    for rows in on_purpose:
        if len(rows) == len(bad):
            empty = rows.to(bad.device).view(-1, *[1] * (bad.ndim - 1))
            bad = bad & ~(empty & values.isnan())
    return bad
