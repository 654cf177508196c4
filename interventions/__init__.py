"""What you change: one file per method."""

from interventions.activation_addition import ActivationAddition
from interventions.causal_contrast import CausalContrast
from interventions.cls_pruning import ClsPruning
from interventions.cut_attention import CutAttention
from interventions.fastv_pruning import FastVPruning
from interventions.focal_pruning import FocalPruning
from interventions.focus_cut import FocusCut
from interventions.head_ablation import HeadAblation
from interventions.head_reinforcement import HeadReinforcement
from interventions.image_attention_boost import ImageAttentionBoost
from interventions.image_attention_mask import ImageAttentionMask
from interventions.image_contrast import ImageContrast
from interventions.image_free_guidance import ImageFreeGuidance
from interventions.image_token_ablation import ImageTokenAblation
from interventions.inactive_heads import InactiveHeads
from interventions.informed_token_boost import InformedTokenBoost
from interventions.layer_drop import LayerDrop
from interventions.m3id import M3ID
from interventions.masked_image_fusion import MaskedImageFusion
from interventions.outlier_contrast import OutlierContrast
from interventions.posthoc_debias import PosthocDebias
from interventions.projection_ablation import ProjectionAblation
from interventions.sink_redistribution import SinkRedistribution
from interventions.skip_perceptual import SkipPerceptual
from interventions.subnet_mask import SubnetMask
from interventions.token_merging import TokenMerging
from interventions.truthful_pre_intervention import TruthfulPreIntervention

__all__ = [
    "M3ID",
    "ActivationAddition",
    "CausalContrast",
    "ClsPruning",
    "CutAttention",
    "FastVPruning",
    "FocalPruning",
    "FocusCut",
    "HeadAblation",
    "HeadReinforcement",
    "ImageAttentionBoost",
    "ImageAttentionMask",
    "ImageContrast",
    "ImageFreeGuidance",
    "ImageTokenAblation",
    "InactiveHeads",
    "InformedTokenBoost",
    "LayerDrop",
    "MaskedImageFusion",
    "OutlierContrast",
    "PosthocDebias",
    "ProjectionAblation",
    "SinkRedistribution",
    "SkipPerceptual",
    "SubnetMask",
    "TokenMerging",
    "TruthfulPreIntervention",
]
