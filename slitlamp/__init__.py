"""slitlamp: see what a vision-language model does inside while it answers.

    import slitlamp as sl
    vlm = sl.VLM.organism()

The names below are imported when they are first used, so that `import slitlamp` costs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slitlamp._lazy import lazy_names
from slitlamp._own_packages import check_own

if TYPE_CHECKING:
    from slitlamp.causal import causal_check
    from slitlamp.experiments import Experiment, Run, labelled_batches, load_dataset, load_run
    from slitlamp.tracing import sites
    from slitlamp.tracing.store.reading import open_store
    from slitlamp.tracing.store.writer import StoreOptions
    from slitlamp.vlm import VLM

__version__ = "0.1.0"

__all__ = [
    "VLM",
    "Experiment",
    "Run",
    "StoreOptions",
    "__version__",
    "causal_check",
    "labelled_batches",
    "load_dataset",
    "load_run",
    "open_store",
    "sites",
]

# Public name -> module, or module and attribute.
_LAZY = {
    "VLM": ("slitlamp.vlm", "VLM"),
    "sites": ("slitlamp.tracing.sites", None),
    "Experiment": ("slitlamp.experiments", "Experiment"),
    "Run": ("slitlamp.experiments", "Run"),
    "causal_check": ("slitlamp.causal", "causal_check"),
    "labelled_batches": ("slitlamp.experiments", "labelled_batches"),
    "load_dataset": ("slitlamp.experiments", "load_dataset"),
    "load_run": ("slitlamp.experiments", "load_run"),
    "open_store": ("slitlamp.tracing.store.reading", "open_store"),
    "StoreOptions": ("slitlamp.tracing.store.writer", "StoreOptions"),
}

for _name in ("probes", "interventions"):
    check_own(_name)
del _name


__getattr__, __dir__ = lazy_names(__name__, __all__, _LAZY)
