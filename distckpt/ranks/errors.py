"""Errors of the ranks floor (DC4xx), by room. ``docs/errors.md`` has a section for each."""

from __future__ import annotations

from distckpt_backends.errors import DistckptError

# world: who started this process, and who else is there


class WorldMismatch(DistckptError):
    """The launcher and the running process group (or XLA runtime) name another rank or world size."""

    code = "DC401"


class WorldChanged(DistckptError, ValueError):
    """The world has another size than a plan, a state or the coordinator was fixed to."""

    code = "DC402"


# meeting: how ranks exchange one message each


class NoStore(DistckptError):
    """There is more than one rank and no store to meet through, or the store does not answer."""

    code = "DC403"


class RanksMissing(DistckptError, TimeoutError):
    """Ranks that did not come to a meeting within the timeout: dead, late, or somewhere else in the program."""

    code = "DC404"


# agreement: what the ranks say about themselves


class RanksDisagree(DistckptError):
    """Ranks differ in versions, backends, random streams, world size or options."""

    code = "DC405"


class MixedRankDevices(DistckptError):
    """Ranks train on different device types under the rule ``"error"``."""

    code = "DC406"


class PlansDiffer(DistckptError):
    """Ranks of one stage have other regions, or were given another plan."""

    code = "DC407"


class StageMissing(DistckptError, LookupError):
    """A pipeline stage that the plan has nothing about, or that no rank has."""

    code = "DC408"


class PlanNotMet(DistckptError, ValueError):
    """The regions on the model are not those of the plan."""

    code = "DC409"


class BadPlan(DistckptError, ValueError):
    """A text that is no region plan, or of another format version."""

    code = "DC410"


# alarm: a replay that failed somewhere else


class RemoteReplayFailed(DistckptError):
    """A replay failed on another rank."""

    code = "DC411"


# watch: collectives inside replays


class CollectivesDiffer(DistckptError):
    """Ranks are about to enter, or have entered, different collectives inside replays."""

    code = "DC412"


# what happens on one rank, told to all


class RankFailed(DistckptError):
    """A rank met an error that is none of distckpt's while all ranks wait for it."""

    code = "DC413"


class ModelsDiffer(DistckptError):
    """Ranks of one stage have models that differ in their modules or parameters."""

    code = "DC414"


def by_code(code: str) -> type[DistckptError]:
    """The error class that a code stands for; the base class when this process has not loaded it."""
    classes = [DistckptError]
    for kind in classes:
        if kind.__dict__.get("code") == code:
            return kind
        classes.extend(kind.__subclasses__())
    return DistckptError
