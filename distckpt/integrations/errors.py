"""Errors of the integrations (DC6xx). DC601 and DC604 belong to a floor below."""

from __future__ import annotations

from distckpt_backends.errors import DistckptError

from distckpt.modules.errors import Rebound as Rebound
from distckpt.modules.errors import UnknownModel as UnknownModel


class OldFormat(DistckptError, TypeError):
    """A transformers model switches checkpointing the old way, which takes no function."""

    code = "DC602"


class BothSwitches(DistckptError, ValueError):
    """distckpt and another activation checkpointing were both asked for on the same layers."""

    code = "DC603"
