"""Tensors that interventions are given: as numbers, or in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from slitlamp.errors import InputError, unknown


def from_file(path: Path | str, key: str, whose: str) -> tuple[Tensor, Mapping[str, Tensor]]:
    """One tensor of a safetensors file, and all of them.

    Args:
        path: the file.
        key: the tensor's name in it.
        whose: the intervention, for messages.

    Raises:
        InputError: no such file, or not a safetensors file.
        UnknownNameError: no tensor of this name.
    """
    try:
        found = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{whose}: {path} cannot be read as a safetensors file ({error}); write it with safetensors.torch.save_file"
        ) from error
    if key not in found:
        raise unknown(f"tensor in {path}:", key, found)
    return found[key].float(), found


def check_tensor(tensor: Tensor, shape: list[int], axes: str, whose: str) -> Tensor:
    """The tensor, if it has a shape and is finite.

    Raises:
        InputError: it has another shape, or holds NaN or infinity.
    """
    if list(tensor.shape) != shape:
        raise InputError(f"{whose}: expected {axes} = {shape}, found {list(tensor.shape)}; it is of another model")
    if not bool(tensor.isfinite().all()):
        raise InputError(f"{whose}: {axes} holds NaN or infinity; record it again")
    return tensor


def directions(
    given: Any, key: str, of_layer: int | None, layers: tuple[int, ...], d_model: int, whose: str
) -> dict[int, Tensor]:
    """The direction of each layer, float32 [d_model].

    Args:
        given: a tensor or numbers, [d_model], the same for all layers; or a safetensors file that holds such a tensor, or one of
            [layer, d_model] beside `layer`, the numbers of its layers: what `probes.SteeringVectors.save` writes.
        key: the tensor's name in the file.
        of_layer: the layer whose direction, of a file of several, is taken for all `layers`; None for each one's own.
        layers: for which.
        d_model: of the model.
        whose: the intervention, for messages.

    Raises:
        InputError: a tensor that does not fit the model, that is zero, or a file without a layer that is asked for.
    """
    if not isinstance(given, str | Path):
        vector = check_tensor(torch.as_tensor(given).float(), [d_model], "[d_model]", whose)
        return dict.fromkeys(layers, _not_zero(vector, whose))
    tensor, every = from_file(given, key, whose)
    if tensor.ndim != 2:
        vector = check_tensor(tensor, [d_model], "[d_model]", whose)
        return dict.fromkeys(layers, _not_zero(vector, whose))
    numbers = every["layer"].tolist() if "layer" in every else None
    if numbers is None or len(numbers) != len(tensor):
        raise InputError(
            f"{whose}: {given} holds {len(tensor)} directions but not of which layers; add an int64 tensor 'layer' of as many"
        )
    check_tensor(tensor, [len(numbers), d_model], "[layer, d_model]", whose)
    found = {}
    for layer in layers:
        wanted = layer if of_layer is None else of_layer
        if wanted not in numbers:
            raise InputError(f"{whose}: {given} has no direction of layer {wanted}; it has layers {numbers}")
        found[layer] = _not_zero(tensor[numbers.index(wanted)], whose)
    return found


def embeddings(given: Path | str | Sequence[Sequence[float]], key: str, d_model: int, whose: str) -> Tensor:
    """Embeddings that stand for tokens, float32 [token, d_model].

    Args:
        given: numbers, or a safetensors file that holds such a tensor.
        key: the tensor's name in the file.
        d_model: of the model.
        whose: the intervention, for messages.

    Raises:
        InputError: no tensor of this shape, no token in it, or numbers that are not finite.
    """
    if isinstance(given, str | Path):
        tensor = from_file(given, key, whose)[0]
    else:
        try:
            tensor = torch.as_tensor(given).float()
        except (TypeError, ValueError) as error:
            raise InputError(f"{whose}: expected numbers [token, d_model], one list per token ({error})") from error
    n_tokens = max(1, len(tensor)) if tensor.ndim else 1
    return check_tensor(tensor, [n_tokens, d_model], "[token, d_model]", whose)


def _not_zero(vector: Tensor, whose: str) -> Tensor:
    if not bool(vector.any()):
        raise InputError(f"{whose}: the direction is zero everywhere; it points nowhere")
    return vector


def random_direction(d_model: int, seed: int, number: int = 0) -> Tensor:
    """A direction [d_model] drawn evenly from all; `number` tells several of one seed apart."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.randn(d_model, generator=generator)


def name_of(given: Any) -> str:
    """A given tensor in a few words, for descriptions."""
    return Path(given).name if isinstance(given, str | Path) else "a given tensor"


def check_layers(layers: tuple[int, ...], n_layers: int, whose: str) -> None:
    """Refuse layers outside a model, and layers named twice.

    Raises:
        InputError: there is one.
    """
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise InputError(f"{whose}: layer {layer!r} is not one of 0 to {n_layers - 1} (they count from 0)")
    if len(set(layers)) < len(layers):
        raise InputError(f"{whose}: layers {list(layers)} name one twice; name each once")
