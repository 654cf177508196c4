"""What you measure: one file per analysis."""

from probes.activation_patching import ActivationPatching
from probes.attention_knockout import AttentionKnockout
from probes.attention_rollout import AttentionRollout
from probes.cls_outliers import ClsOutliers
from probes.head_divergence import HeadDivergence
from probes.implicit_alignment import ImplicitAlignment
from probes.linear_probe import LinearProbe
from probes.logit_lens import LogitLens
from probes.representation_similarity import RepresentationSimilarity
from probes.steering_vectors import SteeringVectors
from probes.subnetworks import Subnetworks
from probes.token_ablation import TokenAblation
from probes.token_ledger import TokenLedger
from probes.truthful_direction import TruthfulDirection

__all__ = [
    "ActivationPatching",
    "AttentionKnockout",
    "AttentionRollout",
    "ClsOutliers",
    "HeadDivergence",
    "ImplicitAlignment",
    "LinearProbe",
    "LogitLens",
    "RepresentationSimilarity",
    "SteeringVectors",
    "Subnetworks",
    "TokenAblation",
    "TokenLedger",
    "TruthfulDirection",
]
