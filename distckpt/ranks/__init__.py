"""Ranks: agreement, FSDP units, pipeline stages, and random streams over many processes."""

from distckpt.ranks.coordinator import Coordinator as Coordinator
from distckpt.ranks.fsdp import guard_units as guard_units
from distckpt.ranks.plan import RegionPlan as RegionPlan
from distckpt.ranks.world import World as World
