"""``dc.devices``: the single-device-type rule."""

from distckpt.engine.devices import rule as rule
