"""What state a model must be in to be traced, and running the compiled parts of one as plain modules meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from slitlamp.errors import InputError, UnsupportedError


def check_model(model: nn.Module) -> None:
    """Refuse a model whose recordings would be wrong.

    Raises:
        InputError: the model, or a part of it, is in training mode.
        UnsupportedError: what `torch.compile(model)` returns in place of the model.
    """
    if model.training:
        raise InputError("the model is in training mode (dropout would change every answer); call model.eval() first")
    if any(_drops(module) for module in model.modules()):
        training = [path for path, module in model.named_modules() if _drops(module)]
        more = f" and {len(training) - 3} modules more" if len(training) > 3 else ""
        raise InputError(
            f"part of the model is in training mode ({', '.join(training[:3])}{more}; dropout would change every answer); "
            "call model.eval() first"
        )
    if _is_wrapper(model):
        raise UnsupportedError(
            "this is what torch.compile(model) returns, a wrapper whose generate runs past it; give slitlamp the model "
            "inside (model._orig_mod), or compile in place with model.compile()"
        )


def _drops(module: nn.Module) -> bool:
    """Whether a module in training mode computes something else than in evaluation.

    Modules that people put in place of others, and quantised layers, are made in training mode, which often means nothing
    to them.
    """
    if not module.training:
        return False
    if isinstance(module, PreTrainedModel | _BatchNorm) or (isinstance(module, _DropoutNd) and module.p > 0):
        return True
    return any("dropout" in name and isinstance(value, float) and value > 0 for name, value in vars(module).items())


def _is_wrapper(module: nn.Module) -> bool:
    frame = sys.modules.get("torch._dynamo.eval_frame")  # absent unless something was compiled
    return frame is not None and isinstance(module, frame.OptimizedModule)


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of a model is compiled: by `module.compile()`, `torch.compile(module)` in its place, or a compiled
    `forward`.
    """
    if "torch._dynamo.eval_frame" not in sys.modules:
        return False
    return any(
        getattr(module, "_compiled_call_impl", None) is not None
        or _is_wrapper(module)
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


_lock = threading.Lock()
_running = 0
_stance: Any = None


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run the compiled parts of a model as plain modules, for they pass over hooks that were added after compilation.

    Nothing is compiled or thrown away: after it the model runs compiled as before. The setting is that of the process
    (`torch.compiler.set_stance`); models without compiled parts are not touched.
    """
    global _running, _stance
    if not is_compiled(model):
        yield
        return
    import torch

    with _lock:
        if _running == 0:
            _stance = torch.compiler.set_stance("force_eager")
            _stance.__enter__()
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if _running == 0:
                _stance.__exit__(None, None, None)
                _stance = None
