"""Errors of the pipeline room (DC43x)."""

from __future__ import annotations

from distckpt_backends.errors import DistckptError


class UnknownSchedule(DistckptError, TypeError):
    """What is to be attached is no schedule we know, and no pipeline stages either."""

    code = "DC430"


class AlreadyAttached(DistckptError, ValueError):
    """A stage is attached already."""

    code = "DC431"


class StageNotInPlan(DistckptError, LookupError):
    """The plan leaves out a stage of the pipeline, or names one that it does not have."""

    code = "DC432"


class BadAhead(DistckptError, ValueError):
    """``ahead`` is no amount of memory and not one micro-batch, or early replay is off."""

    code = "DC433"
