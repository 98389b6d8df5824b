"""``dc.devices``: the single-device-type rule; names only."""

from distckpt.engine.rng import rule as rule
