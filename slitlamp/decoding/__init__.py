"""Generation, and what changes it."""

from slitlamp.decoding.backtracking import BacktrackingDecoding
from slitlamp.decoding.generation import Generation
from slitlamp.decoding.intervention import Intervention, RunContext
from slitlamp.decoding.two_branch import ContrastDecoding
from slitlamp.decoding.views import image_free

__all__ = ["BacktrackingDecoding", "ContrastDecoding", "Generation", "Intervention", "RunContext", "image_free"]
