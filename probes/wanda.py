"""Activated subnetworks: Wanda's score (Sun et al., ICLR 2024, arXiv 2306.11695) of the linear maps of the decoder's blocks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models import Anatomy

FORMAT = "slitlamp masks 1"
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Matrix:
    """A linear map of a decoder block.

    Attributes:
        layer: 0-based.
        name: its type: q, k, v, o, and gate, up, down or the names of the MLP's own modules (fc1, fc2).
        path: of its module.
        site: the site that records its input.
        third: for a fused projection of queries, keys and values, which third of the rows (0, 1, 2).
    """

    layer: int
    name: str
    path: str
    site: str
    third: int | None = None

    @property
    def key(self) -> str:
        """By which a file of masks names it."""
        return f"{self.layer}.{self.name}"


def matrices(anatomy: Anatomy, layers: Iterable[int] | None = None) -> list[Matrix]:
    """The linear maps of the decoder's blocks, block by block; a layer of experts has only those of its attention.

    Raises:
        InputError: a layer that the model does not have.
    """
    chosen = range(anatomy.n_layers) if layers is None else sorted(layers)
    found: list[Matrix] = []
    for layer in chosen:
        if not 0 <= layer < anatomy.n_layers:
            raise InputError(f"layer {layer!r} is not one of 0 to {anatomy.n_layers - 1}")
        having = {name: places[layer] for name, places in anatomy.places.items() if layer in places}
        found += [Matrix(layer, name, having[name].path, "ln1", having[name].third) for name in "qkv" if name in having]
        found.append(Matrix(layer, "o", having["z"].path, "z"))
        if "mlp_pre" in having:
            site = "ln2" if "ln2" in having else "ln1"  # attention and MLP side by side read the same norm
            parent, _, leaf = having["mlp_pre"].path.rpartition(".")
            names = [(leaf, "gate"), ("up_proj", "up")] if leaf == "gate_proj" else [(leaf, leaf)]
            found += [Matrix(layer, name, f"{parent}.{module}", site) for module, name in names]
            leaf = having["mlp_post"].path.rpartition(".")[2]
            found.append(Matrix(layer, leaf.removesuffix("_proj"), having["mlp_post"].path, "mlp_post"))
    return found


def weight_of(model: nn.Module, matrix: Matrix) -> Tensor:
    """The weight [output, input] of a linear map, as the model holds it.

    Raises:
        UnsupportedError: it is quantised, offloaded, spread over devices, or no plain matrix.
    """
    weight: Any = getattr(model.get_submodule(matrix.path), "weight", None)
    # a quantised or distributed weight is a subclass of Tensor, or holds integers or float8
    if type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in PLAIN or weight.ndim != 2:
        found = f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else "no weight"
        raise UnsupportedError(
            f"{matrix.path} holds {found}: subnetworks need the weights themselves, so load the model unquantised"
        )
    if weight.device.type == "meta":
        raise UnsupportedError(
            f"the weight of {matrix.path} is offloaded: subnetworks need all weights in memory; give the model more of it"
        )
    weight = weight.detach()
    return weight if matrix.third is None else weight.chunk(3, dim=0)[matrix.third]


def wanda_score(weight: Tensor, norms: Tensor) -> Tensor:
    """S_ij = |W_ij| ||X_j||: the weight [output, input] and the norms [input] of its inputs over tokens, in float32."""
    return weight.abs().float() * norms.to(weight.device, torch.float32)


def keep_masks(score: Tensor, sparsities: Sequence[float]) -> list[Tensor]:
    """For each sparsity s, the mask [output, input] that drops the floor(s x input) lowest scores of every output row.

    Of equal scores the first is dropped first, as in Wanda's released code (a stable sort).
    """
    width = score.shape[1]
    dropped = [n_dropped(width, one) for one in sparsities]
    limits = _ranked(score, [max(n - 1, 0) for n in dropped])
    masks = []
    for n, limit in zip(dropped, limits, strict=True):
        mask = score > limit[:, None] if n else torch.ones_like(score, dtype=torch.bool)
        tied = (mask.sum(dim=1) != width - n).nonzero()[:, 0]
        if len(tied):
            order = score[tied].argsort(dim=1, stable=True)
            mask[tied] = torch.ones_like(mask[tied]).scatter(1, order[:, :n], False)
        masks.append(mask)
    return masks


def n_dropped(width: int, sparsity: float) -> int:
    """How many of a row's weights are dropped; a product like 0.3 x 10 is 3, however it is rounded in binary."""
    return math.floor(width * sparsity + 1e-9)


def _ranked(score: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Per row, the values at some ranks from the lowest."""
    if score.device.type == "cpu":  # several times as fast as kthvalue
        parted = np.partition(score.numpy(), sorted(set(ranks)), axis=1)
        return [torch.from_numpy(parted[:, rank].copy()) for rank in ranks]
    return [score.kthvalue(rank + 1, dim=1).values for rank in ranks]


def keep_top(score: Tensor, counts: Tensor) -> Tensor:
    """The mask [output, input] that keeps in every row as many of the highest scores as `counts` [output] says."""
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    return rank < counts.to(score.device)[:, None]


def iou(one: Tensor, other: Tensor) -> float:
    """|K1 & K2| / |K1 | K2| of two masks of one matrix; NaN where both are empty."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else math.nan


def random_iou(sparsity: float) -> float:
    """The expected IoU of two random masks: p / (2 - p) at the keep rate p = 1 - sparsity."""
    kept = 1 - sparsity
    return kept / (2 - kept)


def save_masks(path: str | Path, masks: Mapping[str, Tensor], **facts: str) -> Path:
    """Write masks by `Matrix.key`, eight weights to a byte, as safetensors.

    Args:
        path: of the file; one that is there is replaced.
        masks: bool [output, input].
        facts: what else the file should say.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = {key: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1))) for key, mask in masks.items()}
    shapes = json.dumps({key: list(mask.shape) for key, mask in masks.items()})
    save_file(packed, path, metadata={"format": FORMAT, "shapes": shapes, **facts})
    return path


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """The masks of a file, bool [output, input] by `Matrix.key`.

    Raises:
        InputError: no such file, or not one of masks.
    """
    if not Path(path).is_file():
        raise InputError(f"no file of masks at {path}; Subnetworks.save_masks writes one")
    with safe_open(path, framework="np") as file:
        facts = file.metadata() or {}
        if facts.get("format") != FORMAT:
            raise InputError(f"{path} is not a file of masks (its format: {facts.get('format')!r})")
        shapes = json.loads(facts["shapes"])
        return {key: _unpacked(file.get_tensor(key), tuple(shape)) for key, shape in shapes.items()}


def sparsity_of_masks(path: str | Path) -> float | None:
    """The sparsity that a file of masks says it was made at; None where it does not say."""
    with safe_open(path, framework="np") as file:
        said = (file.metadata() or {}).get("sparsity")
    return None if said is None else float(said)


def _unpacked(packed: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed, count=math.prod(shape)).astype(bool).reshape(shape))
