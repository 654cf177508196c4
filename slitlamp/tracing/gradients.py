"""Gradients of a scalar with respect to what a trace records."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slitlamp.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scalar = Callable[[Any], Tensor]
"""Output of the Hugging Face model -> what is differentiated; tensors of several numbers are summed, so that one number per
row gives each row's own gradient."""


class Gradients:
    """Collects the tensors that pass the sites of a trace, and hands out the gradients with respect to them.

    No gradient is accumulated in the model's parameters.

    Args:
        scalar: what is differentiated.
    """

    def __init__(self, scalar: Scalar) -> None:
        self.scalar = scalar
        self._watched: list[tuple[str, Tensor, Callable[[Tensor], None]]] = []

    def watch(self, where: str, values: Tensor, take: Callable[[Tensor], None]) -> None:
        """Once the model has run, give `take` the gradient with respect to `values`.

        Args:
            where: the site, for messages.
            values: as the model goes on with them.
            take: gets a tensor of the shape of `values`, 0 where the scalar does not depend on them.

        Raises:
            UnsupportedError: values that autograd does not follow.
        """
        if not values.requires_grad:
            raise UnsupportedError(
                f"{where} carries no gradient in this model: an operation before it is not differentiable, or cuts the "
                "gradient off"
            )
        self._watched.append((where, values, take))

    def compute(self, output: Any, *, keep_graph: bool = False) -> None:
        """Differentiate.

        Args:
            output: of the Hugging Face model.
            keep_graph: whether the graph is needed again.

        Raises:
            InputError: the function did not give a tensor that depends on the model.
        """
        value = self.scalar(output)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise InputError(
                "gradient_of must give a tensor made from the model's output, such as "
                f"lambda output: output.logits[:, -1, token]; it gave {type(value).__name__} "
                + ("without a gradient" if isinstance(value, Tensor) else "")
            )
        tensors = [values for _, values, _ in self._watched]
        found = torch.autograd.grad(value.sum(), tensors, allow_unused=True, retain_graph=keep_graph)
        with torch.no_grad():
            for (_, values, take), gradient in zip(self._watched, found, strict=True):
                take(torch.zeros_like(values) if gradient is None else gradient)
        self._watched.clear()


def followed_inputs(model: PreTrainedModel, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a model with pixels that autograd follows, for models whose weights are frozen."""
    pixels = {
        name: value.detach().requires_grad_()
        for name, value in kwargs.items()
        if name.startswith("pixel_values") and isinstance(value, Tensor) and value.is_floating_point()
    }
    return {**kwargs, **pixels}


def followed_embeddings(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """A forward hook: embeddings that autograd follows."""
    return None if output.requires_grad else output.detach().requires_grad_()
