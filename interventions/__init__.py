"""What you change: one file per method."""

from interventions.head_reinforcement import HeadReinforcement

__all__ = ["HeadReinforcement"]
