"""Errors of random streams and partitioned inputs over ranks (DC45x and DC46x)."""

from __future__ import annotations

from distckpt_backends.errors import DistckptError

from distckpt.engine.errors import ReplayError


class UnknownStream(DistckptError, LookupError):
    """A named random stream was entered that nobody seeded."""

    code = "DC450"


class StreamInUse(DistckptError):
    """Streams were entered, left, seeded or loaded in an order in which they would get mixed up."""

    code = "DC451"


class BadStreams(DistckptError, ValueError):
    """Streams cannot be seeded as asked: mesh, seed or table is wrong."""

    code = "DC452"


class StreamsDisagree(DistckptError):
    """Streams are not equal, or not different, over the ranks as their names promise."""

    code = "DC453"


class UnsavableStream(DistckptError):
    """The state of a registered source is no plain data."""

    code = "DC454"


class WrongState(DistckptError, ValueError):
    """Saved random states do not fit this rank, or this job; nothing was loaded."""

    code = "DC455"


class BadPartition(DistckptError, ValueError):
    """A partition cannot be made as asked, or met inputs that it cannot divide."""

    code = "DC460"


class InputsDiffer(DistckptError):
    """Inputs that should be the same on every rank of a partition are not."""

    code = "DC461"


class GatherMismatch(ReplayError):
    """The ranks of a partition gathered inputs of different regions."""

    code = "DC462"
