"""Where the weights of a model are: on one device, spread over several, or offloaded by accelerate (`device_map`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slitlamp.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """The device that takes the input ids: that of the embedding, or the one it is run on when its weights are offloaded.

    Offloaded weights are on the meta device between calls; accelerate's hook around the module says where it runs.
    """
    embedding = model.get_input_embeddings()
    device = next(embedding.parameters()).device
    if device.type != "meta":
        return device
    for hook in _hooks(embedding):
        place = getattr(hook, "execution_device", None)
        if place is not None:
            return torch.device(place)
    return device


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights by name, in order of the names, one at a time, those that accelerate has offloaded included. What a
    quantised module has packed comes as its integers and their scales.

    Raises:
        UnsupportedError: a weight that is on the meta device and was not put there by accelerate.
    """
    for name, value in sorted(model.state_dict().items()):
        for part, tensor in _tensors(name, value):
            yield part, tensor.detach() if tensor.device.type != "meta" else _offloaded(model, part, tensor)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that an entry of a state dict is made of; entries that are not tensors hold none."""
    if isinstance(value, tuple | list):
        for number, one in enumerate(value):
            yield from _tensors(f"{name}.{number}", one)
    elif isinstance(value, Tensor) and value.is_quantized:
        yield f"{name}.integers", value.int_repr()
        if value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
            yield f"{name}.scales", value.q_per_channel_scales()
            yield f"{name}.zeros", value.q_per_channel_zero_points()
        else:
            yield f"{name}.scale", torch.tensor([value.q_scale(), value.q_zero_point()], dtype=torch.float64)
    elif isinstance(value, Tensor):
        yield name, value


def _offloaded(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The content of an offloaded weight: a hook of its module, or of one around it, knows where it lies."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:depth]))
        for hook in _hooks(module):
            stored: Mapping[str, Tensor] | None = getattr(hook, "weights_map", None)
            if stored is None:
                continue
            try:
                found = stored[".".join(parts[depth:])]
            except KeyError:
                continue
            return found.detach().to(tensor.dtype)
    raise UnsupportedError(
        f"the weight {name!r} is on the meta device, so this model has no numbers; load it with from_pretrained, where "
        "device_map may offload weights"
    )


def _hooks(module: nn.Module) -> list[Any]:
    """Accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
