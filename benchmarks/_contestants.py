"""Five ways to record the same quantities of every layer, and the plain run that they are compared with.

The quantities: the residual stream after the block, averaged over the image tokens (of the prompt) and at the last
position; the heads' outputs `z` at the last position; the attention of the last position over the image tokens.
While decoding, those of the last position are recorded at every step.

Every contestant is used as its documentation shows, on a copy of the model, and gives the same tensors
(tests/benchmarks). Where one can leave out work that another cannot, it does.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slitlamp import VLM, sites
from slitlamp.models import Batch

Recorded = dict[str, Tensor]
"""`image_mean` and `last` [step, layer, batch, d_model], `z` [step, layer, batch, head, d_head], `attention`
[step, layer, batch, head, image token]; of `image_mean` the one step of the prompt."""


class Contestant:
    """One way to run and to record. `prefill` and `generate` are timed; `tensors` is not."""

    name: ClassVar[str]
    title: ClassVar[str]
    decodes: ClassVar[bool] = True
    matrices: ClassVar[int] = 0
    """How many T x T matrices per head it holds at once, beside those kept of every layer."""
    keeps: ClassVar[bool] = False
    """Whether it keeps the T x T matrices of every layer until the end of the pass."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm

    def prefill(self, batch: Batch) -> Any:
        raise NotImplementedError

    def generate(self, batch: Batch, **options: Any) -> Any:
        raise NotImplementedError

    def tensors(self, result: Any) -> Recorded:
        raise NotImplementedError

    def bytes_needed(self, length: int) -> int:
        """Bytes that its T x T matrices take, by arithmetic."""
        one = self.vlm.anatomy
        layers = self.matrices + (one.n_layers if self.keeps else 0)
        return layers * one.n_heads * length**2 * torch.finfo(self.vlm.dtype).bits // 8


class Plain(Contestant):
    name, title = "plain", "plain forward (SDPA)"

    def prefill(self, batch: Batch) -> Any:
        return self.vlm.model(**batch.inputs(), use_cache=False, logits_to_keep=1)

    def generate(self, batch: Batch, **options: Any) -> Any:
        return self.vlm.model.generate(**batch.inputs(), do_sample=False, **options)

    def tensors(self, result: Any) -> Recorded:
        return {}


class Slitlamp(Contestant):
    name, title = "slitlamp", "slitlamp"
    sites = (
        sites.resid_post(positions="image", reduce="mean", label="image_mean"),
        sites.resid_post(positions="last", label="last"),
        sites.z(positions="last"),
        sites.attention(queries="last", keys="image"),
    )

    def prefill(self, batch: Batch) -> Any:
        with self.vlm.trace(*self.sites) as trace:
            self.vlm.forward(batch, logits_to_keep=1)
        return trace

    def generate(self, batch: Batch, **options: Any) -> Any:
        with self.vlm.trace(*self.sites) as trace:
            self.vlm.generate(batch, **options)
        return trace

    def tensors(self, result: Any) -> Recorded:
        def joined(label: str) -> list[list[Tensor]]:
            return [[*step[label].values()] for step in result.steps if label in step]

        recorded = {label: _stack(joined(label)) for label in ("image_mean", "last", "z", "attention")}
        recorded["last"], recorded["z"] = recorded["last"][:, :, :, 0], recorded["z"][:, :, :, 0]
        recorded["attention"] = recorded["attention"][:, :, :, :, 0]
        return recorded


class Eager(Contestant):
    """Hugging Face's own outputs. They lack `z`, and the last block's stream before the final norm: two kinds of hooks."""

    name, title = "hf-eager", "HF eager, output_attentions"
    keeps, matrices = True, 2

    def __init__(self, vlm: VLM) -> None:
        super().__init__(vlm)
        self.model = copy.deepcopy(vlm.model)
        self.model.set_attn_implementation("eager")
        self.z: list[Tensor] = []
        self.final: list[Tensor] = []
        layers = self.model.model.language_model.layers
        for layer in layers:
            layer.self_attn.o_proj.register_forward_pre_hook(self._see_z)
        layers[-1].register_forward_hook(self._see_final)
        self.n_layers, self.n_heads = len(layers), vlm.anatomy.n_heads

    def _see_z(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.z.append(args[0][:, -1].unflatten(-1, (self.n_heads, -1)).clone())

    def _see_final(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.final.append(output)

    def prefill(self, batch: Batch) -> Any:
        self.z, self.final = [], []
        output = self.model(
            **batch.inputs(), use_cache=False, logits_to_keep=1, output_attentions=True, output_hidden_states=True
        )
        return self._reduced(batch, [output.hidden_states], [output.attentions])

    def generate(self, batch: Batch, **options: Any) -> Any:
        self.z, self.final = [], []
        output = self.model.generate(
            **batch.inputs(),
            do_sample=False,
            output_attentions=True,
            output_hidden_states=True,
            return_dict_in_generate=True,
            **options,
        )
        return self._reduced(batch, output.hidden_states, output.attentions)

    def _reduced(self, batch: Batch, hidden: Any, attentions: Any) -> Any:
        image = batch.image_mask[0].nonzero()[:, 0]
        streams = [[*states[1:-1], final] for states, final in zip(hidden, self.final, strict=True)]
        steps = range(len(streams))
        return {
            "image_mean": [[state[:, image].mean(dim=1) for state in streams[0]]],
            "last": [[state[:, -1].clone() for state in states] for states in streams],
            "z": [self.z[step * self.n_layers : (step + 1) * self.n_layers] for step in steps],
            "attention": [[rows[:, :, -1, image] for rows in weights] for weights in attentions],
        }

    def tensors(self, result: Any) -> Recorded:
        return {name: _stack(values) for name, values in result.items()}


class _NNsight(Contestant):
    def __init__(self, vlm: VLM) -> None:
        super().__init__(vlm)
        from nnsight.modeling.transformers import TransformersModel

        model = copy.deepcopy(vlm.model)
        model.set_attn_implementation("eager")  # nnsight shows what the model computes; SDPA computes no weights
        self.model = TransformersModel(model, task="image-text-to-text", processor=vlm.processor)
        self.layers = self.model.model.language_model.layers
        self.n_heads = vlm.anatomy.n_heads

    def tensors(self, result: Any) -> Recorded:
        recorded = {name: _stack(values) for name, values in result.items()}
        recorded["z"] = recorded["z"].unflatten(-1, (self.n_heads, -1))
        return recorded


class NNsightTrace(_NNsight):
    """nnsight with the reductions written out by hand, inside its trace: the best that its users can do."""

    name, title = "nnsight-trace", "nnsight trace, reduced by hand"
    matrices = 3

    def prefill(self, batch: Batch) -> Any:
        image = batch.image_mask[0].nonzero()[:, 0]
        with self.model.trace(batch.inputs(), use_cache=False, logits_to_keep=1):
            mean, last, z, attention = [].save(), [].save(), [].save(), [].save()
            for layer in self.layers:
                z.append(layer.self_attn.o_proj.input[:, -1].clone())
                attention.append(layer.self_attn.output[1][:, :, -1, image])
                mean.append(layer.output[:, image].mean(dim=1))
                last.append(layer.output[:, -1].clone())
        return {"image_mean": [mean], "last": [last], "z": [z], "attention": [attention]}

    def generate(self, batch: Batch, **options: Any) -> Any:
        image = batch.image_mask[0].nonzero()[:, 0]
        n_steps = options["max_new_tokens"]
        with self.model.generate(batch.inputs(), do_sample=False, **options) as tracer:
            mean, last, z, attention = [].save(), [].save(), [].save(), [].save()
            for step in tracer.iter[:n_steps]:
                for layer in self.layers:
                    z.append(layer.self_attn.o_proj.input[:, -1].clone())
                    attention.append(layer.self_attn.output[1][:, :, -1, image])
                    if step == 0:
                        mean.append(layer.output[:, image].mean(dim=1))
                    last.append(layer.output[:, -1].clone())
        n = len(self.layers)

        def by_step(values: list[Tensor]) -> list[list[Tensor]]:
            return [values[start : start + n] for start in range(0, len(values), n)]

        return {"image_mean": [mean], "last": by_step(last), "z": by_step(z), "attention": by_step(attention)}


class NNsightCache(_NNsight):
    """nnsight's cache of whole outputs, reduced afterwards."""

    name, title = "nnsight-cache", "nnsight cache"
    keeps, matrices = True, 2

    def _caches(self, tracer: Any) -> tuple[Any, Any]:
        outputs = tracer.cache(modules=[*self.layers, *(layer.self_attn for layer in self.layers)])
        inputs = tracer.cache(
            modules=[layer.self_attn.o_proj for layer in self.layers], include_output=False, include_inputs=True
        )
        return outputs, inputs

    def prefill(self, batch: Batch) -> Any:
        with self.model.trace(batch.inputs(), use_cache=False, logits_to_keep=1) as tracer:
            outputs, inputs = self._caches(tracer)
        return self._reduced(batch, outputs, inputs)

    def generate(self, batch: Batch, **options: Any) -> Any:
        with self.model.generate(batch.inputs(), do_sample=False, **options) as tracer:
            outputs, inputs = self._caches(tracer)
        return self._reduced(batch, outputs, inputs)

    def _reduced(self, batch: Batch, outputs: Any, inputs: Any) -> Any:
        image = batch.image_mask[0].nonzero()[:, 0]

        def visits(value: Any, kind: type) -> list[Any]:  # a module seen once gives its value, not a list of one
            return value if isinstance(value, list) else [value]

        streams = [visits(outputs[layer.path].output, Tensor) for layer in self.layers]
        weights = [visits(outputs[layer.self_attn.path].output, tuple) for layer in self.layers]
        heads = [visits(inputs[layer.self_attn.o_proj.path].input, Tensor) for layer in self.layers]
        steps = range(len(streams[0]))
        return {
            "image_mean": [[states[0][:, image].mean(dim=1) for states in streams]],
            "last": [[states[step][:, -1].clone() for states in streams] for step in steps],
            "z": [[states[step][:, -1].clone() for states in heads] for step in steps],
            "attention": [[rows[step][1][:, :, -1, image] for rows in weights] for step in steps],
        }


class Bridge(Contestant):
    """TransformerLens's bridge, with a filter of the names that are needed. It has no cache while generating."""

    name, title = "transformer-bridge", "TransformerBridge cache"
    decodes = False
    keeps, matrices = True, 2

    def __init__(self, vlm: VLM) -> None:
        super().__init__(vlm)
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.model_bridge.sources.transformers import helpers

        helpers._ensure_torchvision = lambda: False  # else it runs pip where a processor does not load
        tokenizer = copy.deepcopy(vlm.tokenizer)
        tokenizer.bos_token = None  # else it looks for the tokenizer's files; the ids come encoded
        self.bridge = TransformerBridge.boot_transformers(
            "llava", hf_model=copy.deepcopy(vlm.model), tokenizer=tokenizer, device=str(vlm.device)
        )

    def prefill(self, batch: Batch) -> Any:
        image = batch.image_mask[0].nonzero()[:, 0]
        layers = range(self.vlm.anatomy.n_layers)
        names = ("hook_out", "attn.hook_z", "attn.hook_pattern")
        inputs = dict(batch.inputs())
        _, cache = self.bridge.run_with_cache(
            inputs.pop("input_ids"),
            names_filter=[f"blocks.{layer}.{name}" for layer in layers for name in names],
            use_cache=False,
            **inputs,
        )
        stream, z, pattern = ([cache[f"blocks.{layer}.{name}"] for layer in layers] for name in names)
        return {
            "image_mean": [[state[:, image].mean(dim=1) for state in stream]],
            "last": [[state[:, -1].clone() for state in stream]],
            "z": [[one[:, -1].clone() for one in z]],
            "attention": [[rows[:, :, -1, image] for rows in pattern]],
        }

    def tensors(self, result: Any) -> Recorded:
        return {name: _stack(values) for name, values in result.items()}


def _stack(values: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(layers) for layers in values])


CONTESTANTS: dict[str, type[Contestant]] = {
    one.name: one for one in (Plain, Slitlamp, Eager, NNsightTrace, NNsightCache, Bridge)
}
