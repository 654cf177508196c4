"""A decoder block computed again with other weights, by edits: the model's own weights are only read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from probes.wanda import matrices, weight_of
from slitlamp.errors import UnsupportedError
from slitlamp.tracing import Calls, Edit
from slitlamp.tracing.trace import Source

ACTIVATIONS = ("act_fn", "activation_fn")
"""What the modules of gated MLPs call their activation function."""


class MaskedBlock:
    """The edits that compute the linear maps of one block again, from what went into them.

    Args:
        source: the model.
        layer: the block.
        weights: by `Matrix.key`, [output, input], or [row, output, input] for a weight of each row's own; maps that are not
            among them stay as they are.
    """

    def __init__(self, source: Source, layer: int, weights: Mapping[str, Tensor]) -> None:
        self.source = source
        self.layer = layer
        self.by_name = {one.name: one for one in matrices(source.anatomy, [layer])}
        self.weights = {one.name: weights[one.key] for one in self.by_name.values() if one.key in weights}
        self._kept: dict[str, Tensor] = {}

    def edits(self) -> list[Edit]:
        """The edits of this block, in order.

        Raises:
            UnsupportedError: a gated MLP whose activation function is not found.
        """
        masked = set(self.weights)
        found = [Edit(site, self.layer, self._keep(site)) for site in self._inputs()]
        found += [Edit(name, self.layer, self._again(name)) for name in "qkv" if name in masked]
        if "o" in masked:
            found.append(Edit("attn_out", self.layer, self._added("o", "attn_out")))
        mlp = [name for name in self.by_name if name not in "qkvo"]  # what goes in, first, and what goes out, last
        if not mlp:
            return found
        if masked & set(mlp[:-1]):
            found.append(Edit("mlp_pre", self.layer, self._again(mlp[0])))
            if "up" in mlp:
                found.append(Edit("mlp_post", self.layer, self._gated()))
        if mlp[-1] in masked:
            found.append(Edit("mlp_post", self.layer, self._keep("mlp_post")))
            found.append(Edit("mlp_out", self.layer, self._added(mlp[-1], "mlp_out")))
        return found

    def _inputs(self) -> list[str]:
        """The sites whose values are needed again, but for those that change on the way."""
        sites = dict.fromkeys(one.site for one in self.by_name.values())
        return [site for site in sites if site != "mlp_post"]

    def _keep(self, site: str) -> Callable[[Tensor, Calls], Tensor]:
        def keep(values: Tensor, calls: Calls) -> Tensor:
            self._kept[site] = values
            return values

        return keep

    def _module(self, path: str) -> Any:
        return self.source.model.get_submodule(path)

    def _linear(self, name: str) -> Tensor:
        """What a linear map gives with its new weight: [batch, position, output]."""
        one = self.by_name[name]
        values = self._kept[one.site].flatten(2)
        bias = self._module(one.path).bias
        weight = self.weights.get(name)
        if weight is None:
            weight = weight_of(self.source.model, one)
        if weight.ndim == 2:
            return linear(values, weight, bias)
        given = values @ weight.transpose(1, 2)
        return given if bias is None else given + bias

    def _again(self, name: str) -> Callable[[Tensor, Calls], Tensor]:
        def again(values: Tensor, calls: Calls) -> Tensor:
            self._kept[name] = self._linear(name).view_as(values)
            return self._kept[name]

        return again

    def _gated(self) -> Callable[[Tensor, Calls], Tensor]:
        """What goes into the last map of a gated MLP: activation(gate) x up."""
        path = self.by_name["gate"].path.rpartition(".")[0]
        activation = next(
            (getattr(self._module(path), one) for one in ACTIVATIONS if hasattr(self._module(path), one)), None
        )
        if activation is None:
            raise UnsupportedError(
                f"{path} of this {self.source.anatomy.family.name} names its activation function by none of "
                f"{', '.join(ACTIVATIONS)}; its MLP cannot be computed again"
            )

        def gated(values: Tensor, calls: Calls) -> Tensor:
            return activation(self._kept.pop("gate")) * self._linear("up")

        return gated

    def _added(self, name: str, site: str) -> Callable[[Tensor, Calls], Tensor]:
        """What a block adds to the residual stream: the output of a linear map, through the norm behind it if there is one."""
        place, own = self.source.anatomy.place(site, self.layer).path, self.by_name[name].path
        inside = own == place or own.startswith(f"{place}.")

        def added(values: Tensor, calls: Calls) -> Tensor:
            given = self._linear(name)
            # `forward` and not a call: a call would come back to this edit
            return given if inside else self._module(place).forward(given)

        return added
