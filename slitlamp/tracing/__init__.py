"""Recording and editing what a VLM computes."""

from slitlamp.tracing.attention_edit import AttentionEdit
from slitlamp.tracing.call import Calls
from slitlamp.tracing.probe import CausalTarget, GatheringProbe, Part, Probe, ProbeResult, View
from slitlamp.tracing.session import AnyEdit, Edit, session
from slitlamp.tracing.site_checks import check_sites
from slitlamp.tracing.sites import Site, canonical_name
from slitlamp.tracing.trace import SiteRecord, Step, Trace
from slitlamp.tracing.weights_edit import WeightsEdit

__all__ = [
    "AnyEdit",
    "AttentionEdit",
    "Calls",
    "CausalTarget",
    "Edit",
    "GatheringProbe",
    "Part",
    "Probe",
    "ProbeResult",
    "Site",
    "SiteRecord",
    "Step",
    "Trace",
    "View",
    "WeightsEdit",
    "canonical_name",
    "check_sites",
    "session",
]
