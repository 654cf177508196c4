"""What you change: one file per method."""

from interventions.head_reinforcement import HeadReinforcement
from interventions.image_contrast import ImageContrast
from interventions.image_free_guidance import ImageFreeGuidance
from interventions.m3id import M3ID
from interventions.outlier_contrast import OutlierContrast
from interventions.skip_perceptual import SkipPerceptual
from interventions.subnet_mask import SubnetMask

__all__ = [
    "M3ID",
    "HeadReinforcement",
    "ImageContrast",
    "ImageFreeGuidance",
    "OutlierContrast",
    "SkipPerceptual",
    "SubnetMask",
]
