"""Errors of selective regions."""

from __future__ import annotations

from distckpt.engine.errors import BadOption, ReplayError


class SelectiveMismatch(ReplayError):
    """A selective replay ran an operator that its forward did not run."""

    code = "DC120"


class SavedOutputChanged(ReplayError):
    """An output kept by a selective region was changed in place."""

    code = "DC121"


class OffloadRefused(BadOption):
    """A policy asked for CPU offload, which this version cannot do."""

    code = "DC122"


class NoPolicy(BadOption):
    """A policy answered something that is neither a ``CheckpointPolicy`` nor a bool."""

    code = "DC123"
