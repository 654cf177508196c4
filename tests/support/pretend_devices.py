"""A second device where there is none: every tensor is on the CPU, but says that it is on the device it was moved to.

Under `PretendDevices`, a torch function that is given tensors of two devices raises the error that it raises on a machine
with two GPUs, and so does turning a tensor of another device into a numpy array. What torch allows there is allowed here:
indices on the CPU, and single numbers on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
_INDEXED = ("__getitem__", "__setitem__", "index_put_", "index_put")
_SHAPES = ("new_zeros", "new_full", "new_ones", "new_empty", "new_tensor", "zeros_like", "ones_like", "full_like")


def place(tensor: Tensor) -> torch.device:
    """The device that a tensor pretends to be on."""
    found: torch.device = getattr(tensor, "_pretended", CPU)
    return found


class PretendDevices(TorchFunctionMode):
    """While it is in force, devices `cuda:N` exist."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__self__", None) is Tensor.device:
            return place(args[0])
        if func is torch.device:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func is torch.autograd.grad:  # a gradient lies where that lies whose gradient it is
            slopes = func(*args, **kwargs)
            for slope, tensor in zip(slopes, args[1], strict=True):
                if slope is not None:
                    slope._pretended = place(tensor)
            return slopes
        if name in ("numpy", "__array__") and place(args[0]) != CPU:
            raise TypeError(f"can't convert {place(args[0])} device type tensor to numpy")
        given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, Tensor)]
        target: torch.device | None = None

        def really(value: Any) -> Any:
            nonlocal target
            if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith(("cuda", "cpu"))):
                target = torch.device(value)
                return CPU
            return value

        args, kwargs = tree_map(really, args), tree_map(really, kwargs)
        if name == "cpu":
            target = CPU
        elif name in ("to", "type_as") and len(given) == 2:
            target = place(given[1])
        of = [place(one) for one in given if one.ndim > 0 or place(one) != CPU]
        if name in _INDEXED:
            of = [place(args[0]), *(one for one in of if one != CPU)]
        elif name in _SHAPES or name == "copy_":
            of = [place(args[0])]
        if target is None and len(set(of)) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {set(of)} in {name}")
        result = func(*args, **kwargs)
        where = target if target is not None else of[0] if of else CPU

        def put(value: Any) -> Any:
            if not isinstance(value, Tensor) or place(value) == where:
                return value
            if any(value is one for one in given):  # torch had nothing to move
                value = value.clone()
            value._pretended = where  # type: ignore[attr-defined]
            return value

        return result if isinstance(result, torch.Size) else tree_map(put, result)


def dispatch(model: nn.Module, places: dict[str, str]) -> None:
    """Put modules on devices (all others on the CPU) and move what is given to a module to where it is, as accelerate's hooks
    do around the `forward` of every module that has weights.
    """
    for path, module in list(model.named_modules()):
        parts = path.split(".")
        above = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        device = torch.device(next((places[one] for one in above if one in places), "cpu"))
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for weight in own:
            weight._pretended = device  # type: ignore[attr-defined]
        if own or path in places:
            module.forward = _moving(module.forward, device)  # type: ignore[method-assign]
    model.forward = _moving(model.forward, CPU, after=True)  # type: ignore[method-assign]


def _moving(forward: Callable[..., Any], device: torch.device, *, after: bool = False) -> Callable[..., Any]:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    @functools.wraps(forward)
    def moved(*args: Any, **kwargs: Any) -> Any:
        if not after:
            args, kwargs = tree_map(move, args), tree_map(move, kwargs)
        output = forward(*args, **kwargs)
        if after:
            for key, value in output.items():
                output[key] = tree_map(move, value)
        return output

    return moved
