"""Ranks: agreement, FSDP units, pipeline stages, and random streams over many processes."""

from distckpt.ranks.coordinator import Coordinator as Coordinator
