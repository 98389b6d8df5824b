"""Errors of ``coord.fully_shard`` (DC42x)."""

from __future__ import annotations

from distckpt_backends.errors import DistckptError

from distckpt.modules.errors import NoMatch


class UnknownUnit(NoMatch):
    """A unit glob names no module that FSDP2 can make a unit."""

    code = "DC420"


class UnknownOption(DistckptError, TypeError):
    """A keyword that neither this torch's ``fully_shard`` nor ``dc.apply`` takes."""

    code = "DC421"


class AlreadySharded(DistckptError, ValueError):
    """A module that is to become a unit, or one around it, is distributed already."""

    code = "DC422"


class SharedAcrossUnits(DistckptError, ValueError):
    """One parameter would belong to two units."""

    code = "DC423"


class UnitsInsideRegion(DistckptError, NotImplementedError):
    """A region has units inside it, which this torch would gather twice."""

    code = "DC424"


class CannotShard(DistckptError, ValueError):
    """FSDP2 does not take a unit with these options."""

    code = "DC425"


class GatherOutsideBackward(DistckptError):
    """A replay outside a backward called a unit, which would have to gather."""

    code = "DC426"
