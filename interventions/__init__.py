"""What you change: one file per method."""

from interventions.head_reinforcement import HeadReinforcement
from interventions.skip_perceptual import SkipPerceptual
from interventions.subnet_mask import SubnetMask

__all__ = ["HeadReinforcement", "SkipPerceptual", "SubnetMask"]
