"""Ranks: consistency, FSDP units, pipeline stages, random streams over many processes. Short: re-exports only."""

from distckpt.ranks.coordinator import Coordinator as Coordinator
from distckpt.ranks.fsdp import guard_units as guard_units
from distckpt.ranks.plan import RegionPlan as RegionPlan
from distckpt.ranks.world import World as World
