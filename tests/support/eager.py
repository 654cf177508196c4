"""What a Hugging Face model computes by its own eager attention: the reference for what is recorded."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from slitlamp.models import Batch
from slitlamp.vlm import VLM


class Eager:
    """One forward pass of a copy of the model by eager attention.

    Attributes:
        logits: [batch, position, d_vocab].
        hidden: hidden states [batch, position, d_model] by Hugging Face's own flag: the input of every block, then the
            output of the last one after the final norm.
        attentions: weights [batch, head, query, key] of every block, by Hugging Face's own flag.
        vision_hidden: the outputs of the vision tower's blocks.
        vision_attentions: weights of the vision tower's blocks, for towers whose attention returns them.
        model: the copy.
        final_norm: its norm after the last block.
    """

    def __init__(self, vlm: VLM, batch: Batch) -> None:
        model: Any = copy.deepcopy(vlm.model)
        model.set_attn_implementation("eager")
        self.model = model
        self.vision_hidden: dict[int, Tensor] = {}
        self.vision_attentions: dict[int, Tensor] = {}
        for layer, path in enumerate(vlm.anatomy.vision_blocks):
            model.get_submodule(path).register_forward_hook(self._keep(self.vision_hidden, layer, 0))
            attention = model.get_submodule(vlm.anatomy.vision_attention_of(layer))
            attention.register_forward_hook(self._keep(self.vision_attentions, layer, 1))
        with torch.no_grad():
            # no positions are given: the model counts them in its own way
            out = model(**batch.inputs(), output_hidden_states=True, output_attentions=True, use_cache=False)
        text = getattr(out, "language_model_outputs", None) or out
        self.logits: Tensor = out.logits
        self.hidden: tuple[Tensor, ...] = text.hidden_states
        self.attentions: tuple[Tensor, ...] = text.attentions
        self.final_norm = model.get_submodule(vlm.anatomy.modules["final_norm"])

    @staticmethod
    def _keep(into: dict[int, Tensor], layer: int, number: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            several = output if isinstance(output, tuple) else (output,)
            if len(several) > number and several[number] is not None:
                into[layer] = several[number]

        return hook
