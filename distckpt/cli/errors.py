"""Errors of the command line (DC701 to DC706): one line each, and exit code 2, or a failure in a report."""

from __future__ import annotations

from distckpt_backends.errors import DistckptError


class CliError(DistckptError):
    """Base of what a user of the command can get wrong."""

    def line(self) -> str:
        """The whole error on one line, for a terminal."""
        return f"[{self.code}] {self.what}: {self.fix}"


class BadUsage(CliError):
    """A command, a flag or a value that the command line does not have."""

    code = "DC701"


class NoScript(CliError):
    """The script or module that is to run does not exist, or cannot be read."""

    code = "DC702"


class BadEnvironment(CliError):
    """The variables that a launcher sets are incomplete or contradict each other."""

    code = "DC703"


class ReplayDiffers(CliError):
    """A replay of the self-test was not equal to its forward, bit by bit, or raised."""

    code = "DC704"


class Conflict(CliError):
    """Another library, or one of its switches, takes the place of our regions or makes them wrong."""

    code = "DC705"


class RankMissing(CliError):
    """A rank did not say in time what it found."""

    code = "DC706"
