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
_STACKED = 2**18
"""Values that are summed at once, where recordings are small: 1 MB in float32."""
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
    alike: dict[tuple[torch.device, torch.dtype, torch.Size], list[Tensor]] = {}
    for one in _whole(tensors):
        if one.is_floating_point():
            alike.setdefault((one.device, one.dtype, one.shape), []).append(one)
    sums: dict[torch.device, list[Tensor]] = {}
    for (device, dtype, shape), of in alike.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        few = max(1, _STACKED // max(1, shape.numel()))
        for start in range(0, len(of), few):
            some = of[start : start + few]
            total = torch.stack(some) if len(some) > 1 else some[0]
            sums.setdefault(device, []).append(total.detach().sum(dtype=wide).double())
    return all(bool(torch.stack(of_device).isfinite().all()) for of_device in sums.values())


def _whole(tensors: list[Tensor]) -> Iterator[Tensor]:
    """The same values in fewer tensors: those that recordings are parts of (all layers of a decode step), once each."""
    seen: set[int] = set()
    for one in tensors:
        base = one._base
        if base is None:
            yield one
        elif id(base) not in seen:
            seen.add(id(base))
            yield base


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
