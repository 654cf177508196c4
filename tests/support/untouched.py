"""Everything that a run could leave behind in a model and its processor."""

from __future__ import annotations

from typing import Any

import torch

from slitlamp.tracing.attention_tap import _observers
from slitlamp.vlm import VLM


def snapshot(vlm: VLM) -> dict[str, Any]:
    """Hooks, attributes, configurations, weights, processor settings: equal before and after a run."""
    modules: dict[Any, Any] = {}
    configs: dict[Any, Any] = {}
    for path, module in vlm.model.named_modules():
        hooks = {
            name: list(value.items()) for name, value in vars(module).items() if name.endswith(("hooks", "kwargs"))
        }
        modules[path] = (hooks, sorted(vars(module)), module.training, vars(module).get("forward"))
        config: Any = getattr(module, "config", None)
        if config is not None:
            configs[path] = (id(config), repr(config), config._attn_implementation)
            for name in config.sub_configs:
                configs[path, name] = (id(getattr(config, name)), getattr(config, name)._attn_implementation)
    tokenizer = vlm.tokenizer
    return {
        "modules": modules,
        "configs": configs,
        "generation": repr(vlm.model.generation_config),
        "gradients": {name: (one.requires_grad, one.grad is None) for name, one in vlm.model.named_parameters()},
        "processor": repr(vlm.processor),
        "tokenizer": (
            tokenizer.padding_side,
            tokenizer.truncation_side,
            repr(tokenizer),
            tokenizer.backend_tokenizer.to_str(),
        ),
        "observers": dict(_observers),
        "traces": list(vlm._traces),
        "interventions": list(vlm._interventions),
        "rng": torch.get_rng_state().tolist(),
    }
