"""Any Hugging Face VLM: its anatomy, and images and prompts as tensors."""

from slitlamp.models.anatomy import Anatomy, read_anatomy
from slitlamp.models.batch import Batch
from slitlamp.models.encode import encode
from slitlamp.models.families import FAMILIES, Family, family_of
from slitlamp.models.patches import BASE_VIEW, TILE_VIEW, Patches

__all__ = [
    "BASE_VIEW",
    "FAMILIES",
    "TILE_VIEW",
    "Anatomy",
    "Batch",
    "Family",
    "Patches",
    "encode",
    "family_of",
    "read_anatomy",
]
