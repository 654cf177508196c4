"""What TransformerLens's methods of a cache need to know of the model: sizes, the final norm, and weights by its names.

The final norm's weights are folded into the unembedding, as TransformerLens does in its compatibility mode: `ln_final` then
only normalises, and `W_U` and `b_U` hold the rest. This makes both its logit lens (norm, then `W_U`) and its direct logit
attribution (parts of the stream over the norm's scale, then `W_U`) add up to the model's logits.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slitlamp.errors import InputError, UnsupportedError
from slitlamp.models.anatomy import Anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class NormParts:
    """A norm taken apart: x -> (x - mean, if centred) / sqrt(variance + eps) * weight + bias.

    Attributes:
        centred: whether the mean is taken off first (LayerNorm) or not (RMSNorm).
        eps: what is added to the variance (to the mean square, if not centred).
        weight, bias: float32 [d_model], as they act: for Gemma's norms, `weight` is 1 + their parameter.
    """

    centred: bool
    eps: float
    weight: Tensor
    bias: Tensor

    @staticmethod
    def of(norm: nn.Module, width: int) -> NormParts:
        """Read a norm off from what it does, whatever it calls its parameters.

        Raises:
            UnsupportedError: a module that is no such norm, or one whose weights are not in memory.
        """
        own = [*norm.parameters(), *norm.buffers()]
        if any(one.is_meta for one in own):
            raise UnsupportedError("the weights of the final norm are not in memory (offloaded, or on the meta device)")
        if width % 2:
            raise UnsupportedError(f"a norm over an odd width ({width}) cannot be taken apart")
        module = copy.deepcopy(norm).float()
        device = own[0].device if own else torch.device("cpu")
        eps = next((float(getattr(norm, name)) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), 0.0)
        ones = torch.ones(width, device=device)
        signs = torch.where(torch.arange(width, device=device) % 2 == 0, ones, -ones)  # mean 0, mean square 1
        with torch.no_grad():
            there, back = module(signs[None, None])[0, 0], module(-signs[None, None])[0, 0]
            bias = (there + back) / 2
            weight = (there - back) / 2 * signs * (1 + eps) ** 0.5
            centred = bool((module((signs + 3)[None, None])[0, 0] - there).abs().max() < 1e-3 * there.abs().max())
            parts = NormParts(centred, eps, weight, bias)
            probe = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(device) * 2 + 0.5
            wanted = module(probe[None, None])[0, 0]
            if not torch.allclose(parts.normalise(probe) * weight + bias, wanted, rtol=1e-4, atol=1e-4):
                raise UnsupportedError(
                    f"{type(norm).__name__} is neither an RMSNorm nor a LayerNorm over its last axis"
                )
        return parts

    def scale(self, values: Tensor) -> Tensor:
        """What the norm divides by: [..., d_model] to [..., 1], in float32 (float64 stays)."""
        wide = values if values.dtype == torch.float64 else values.float()
        if self.centred:
            wide = wide - wide.mean(dim=-1, keepdim=True)
        return (wide.square().mean(dim=-1, keepdim=True) + self.eps).sqrt()

    def normalise(self, values: Tensor) -> Tensor:
        """The norm without weight and bias."""
        wide = values if values.dtype == torch.float64 else values.float()
        if self.centred:
            wide = wide - wide.mean(dim=-1, keepdim=True)
        return wide / self.scale(values)


class _Normalise(nn.Module):
    """A norm without weight and bias, as a module, which TransformerLens asks for."""

    def __init__(self, parts: NormParts) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, values: Tensor) -> Tensor:
        return self.parts.normalise(values)


@dataclass(frozen=True, eq=False)
class _Attention:
    """`blocks[layer].attn` by TransformerLens's names."""

    lens: LensModel
    layer: int

    @property
    def W_O(self) -> Tensor:
        """The output projection, [head, d_head, d_model].

        Raises:
            UnsupportedError: what the heads add to the residual stream is not linear in them.
        """
        anatomy = self.lens.anatomy
        added = anatomy.place("attn_out", self.layer)
        if added.path != anatomy.attention(self.layer) or added.gate is not None:
            raise UnsupportedError(
                f"layer {self.layer} of this {anatomy.family.name} puts its attention through "
                f"{'a gate' if added.gate is not None else 'a norm'} before adding it to the residual stream, so that "
                "heads have no contribution of their own; decompose by attn_out and mlp_out instead"
            )
        return self.lens.linear(anatomy.out_proj(self.layer)).weight.T.unflatten(0, (anatomy.n_heads, -1))

    @property
    def b_O(self) -> Tensor | None:
        """The bias of the output projection, [d_model]."""
        return self.lens.linear(self.lens.anatomy.out_proj(self.layer)).bias


@dataclass(frozen=True, eq=False)
class _MLP:
    """`blocks[layer].mlp` by TransformerLens's names."""

    lens: LensModel
    layer: int

    def _down(self) -> nn.Linear:
        anatomy = self.lens.anatomy
        down, added = anatomy.place("mlp_post", self.layer), anatomy.place("mlp_out", self.layer)
        inside = down.path == added.path or down.path.startswith(f"{added.path}.")
        if not inside or added.gate is not None:
            raise UnsupportedError(
                f"layer {self.layer} of this {anatomy.family.name} puts its MLP through a norm or a gate before adding it to "
                "the residual stream, so that neurons have no contribution of their own; decompose by mlp_out instead"
            )
        return self.lens.linear(down.path)

    @property
    def W_out(self) -> Tensor:
        """The projection out of the hidden layer, [d_mlp, d_model].

        Raises:
            UnsupportedError: what the neurons add to the residual stream is not linear in them.
        """
        return self._down().weight.T

    @property
    def b_out(self) -> Tensor | None:
        """The bias of that projection, [d_model]."""
        return self._down().bias


class LensModel:
    """The `model` of a `transformer_lens.ActivationCache` made from a trace.

    It holds no copy of the model but its unembedding, [d_model, d_vocab] in float32, made when it is first asked for.

    Attributes:
        cfg: a `TransformerLensConfig` with the language model's sizes and norm; nothing else in it is filled in.
        blocks: `blocks[layer].attn.W_O`, `.b_O` and `blocks[layer].mlp.W_out`, `.b_out`.
        ln_final: the final norm without its weights, which are in `W_U` and `b_U`.
        adapter: what is done to logits after the unembedding (soft-capping).
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, tokenizer: Any) -> None:
        from transformer_lens.config import TransformerLensConfig

        self.hf_model = model
        self.anatomy = anatomy
        self.tokenizer = tokenizer
        self._norm = NormParts.of(model.get_submodule(anatomy.modules["final_norm"]), anatomy.d_model)
        self.ln_final = _Normalise(self._norm).eval()
        text = model.config.get_text_config(decoder=True)
        self.cfg = TransformerLensConfig(
            d_model=anatomy.d_model,
            d_head=anatomy.d_head,
            n_layers=anatomy.n_layers,
            n_ctx=int(getattr(text, "max_position_embeddings", 0) or 0),
            n_heads=anatomy.n_heads,
            n_key_value_heads=anatomy.n_kv_heads,
            d_mlp=anatomy.d_mlp,
            d_vocab=anatomy.d_vocab,
            device=str(model.device),
            dtype=model.dtype,
            eps=self._norm.eps,
            normalization_type="LNPre" if self._norm.centred else "RMSPre",
            uses_rms_norm=not self._norm.centred,
            final_rms=not self._norm.centred,
        )
        self.blocks = [
            SimpleNamespace(attn=_Attention(self, layer), mlp=_MLP(self, layer)) for layer in range(anatomy.n_layers)
        ]
        self.adapter = SimpleNamespace(apply_output_logits_transform=self._cap)

    def linear(self, path: str) -> nn.Linear:
        """A linear layer of the model.

        Raises:
            UnsupportedError: another kind of module, or weights that cannot be read.
        """
        module = self.hf_model.get_submodule(path)
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or weight is None or weight.is_meta or not weight.is_floating_point():
            raise UnsupportedError(
                f"the weights of {path} ({type(module).__name__}) cannot be read as a matrix: they are quantised, offloaded "
                "or of several experts"
            )
        return module

    def norm_scale(self, path: str, values: Tensor) -> Tensor:
        """What the norm at a path divides these inputs by, [..., 1]."""
        return NormParts.of(self.hf_model.get_submodule(path), self.anatomy.d_model).scale(values)

    @cached_property
    def W_U(self) -> Tensor:
        """The unembedding with the final norm's weight in it, float32 [d_model, d_vocab]."""
        weight = self.linear(self.anatomy.modules["head"]).weight.detach().float()
        return (weight * self._norm.weight.to(weight.device)).T

    @cached_property
    def b_U(self) -> Tensor:
        """The bias of the unembedding with the final norm's bias in it, float32 [d_vocab]."""
        head = self.linear(self.anatomy.modules["head"])
        weight = head.weight.detach().float()
        bias = weight @ self._norm.bias.to(weight.device)
        return bias if head.bias is None else bias + head.bias.detach().float()

    def unembed(self, normalised: Tensor) -> Tensor:
        """Logits, before any soft-capping, of vectors that `ln_final` has normalised."""
        return normalised @ self.W_U + self.b_U

    def _cap(self, logits: Tensor) -> Tensor:
        cap = self.anatomy.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token.

        Raises:
            InputError: a text of several tokens, or none.
        """
        found = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            raise InputError(
                f"{string!r} is {len(found)} tokens, not one: {self.tokenizer.convert_ids_to_tokens(found)}"
            )
        return int(found[0])

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """The columns of `W_U` of some tokens: [d_model] for one, else [..., d_model]."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        if isinstance(tokens, Tensor) and tokens.numel() == 1:
            tokens = int(tokens)
        return self.W_U[:, tokens] if isinstance(tokens, int) else self.W_U.T[tokens]

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Tensor:
        """The sum of the biases that the blocks before a layer add to the residual stream, [d_model]."""
        total = torch.zeros(self.anatomy.d_model, device=self.hf_model.device)
        for number, block in enumerate(self.blocks[: layer + 1 if mlp_input else layer]):
            of_mlp = block.mlp.b_out if include_mlp_biases and number < layer else None
            for bias in (block.attn.b_O, of_mlp):
                if bias is not None:
                    total = total + bias.detach().to(total.device)
        return total

    def layer_types(self) -> list[str]:
        """The parts of every block, as TransformerLens names them."""
        return ["attn+mlp"] * self.anatomy.n_layers

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: this is the model of a recording.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("this cache was made from a trace; to record another run, use vlm.trace(...)")
