"""What you change: one file per method."""

from interventions.activation_addition import ActivationAddition
from interventions.cut_attention import CutAttention
from interventions.head_ablation import HeadAblation
from interventions.head_reinforcement import HeadReinforcement
from interventions.image_attention_boost import ImageAttentionBoost
from interventions.image_contrast import ImageContrast
from interventions.image_free_guidance import ImageFreeGuidance
from interventions.informed_token_boost import InformedTokenBoost
from interventions.m3id import M3ID
from interventions.outlier_contrast import OutlierContrast
from interventions.projection_ablation import ProjectionAblation
from interventions.skip_perceptual import SkipPerceptual
from interventions.subnet_mask import SubnetMask
from interventions.truthful_pre_intervention import TruthfulPreIntervention

__all__ = [
    "M3ID",
    "ActivationAddition",
    "CutAttention",
    "HeadAblation",
    "HeadReinforcement",
    "ImageAttentionBoost",
    "ImageContrast",
    "ImageFreeGuidance",
    "InformedTokenBoost",
    "OutlierContrast",
    "ProjectionAblation",
    "SkipPerceptual",
    "SubnetMask",
    "TruthfulPreIntervention",
]
