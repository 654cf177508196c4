"""What you measure: one file per analysis."""

from probes.head_divergence import HeadDivergence

__all__ = ["HeadDivergence"]
