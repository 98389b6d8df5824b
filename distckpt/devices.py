"""``dc.devices``: the single-device-type rule."""

from distckpt.engine.rng import rule as rule
