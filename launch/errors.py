"""Bad input to a launch script: one line that says what to do, and exit code 2."""

from __future__ import annotations

from distckpt_backends.errors import DistckptError


class LaunchError(DistckptError):
    """Base of what a user of `launch/` can get wrong."""

    code = "DC500"

    def line(self) -> str:
        """The whole error on one line, for a terminal."""
        return f"[{self.code}] {self.what}: {self.fix}"


class BadOption(LaunchError):
    """An option has a value that the job cannot run with."""

    code = "DC501"


class BadData(LaunchError):
    """The training data is missing, unreadable or too short."""

    code = "DC502"


class BadCheckpoint(LaunchError):
    """There is no checkpoint to resume from, it is damaged, or it was made by a different job."""

    code = "DC503"


class UnsafeCheckpoint(LaunchError):
    """A checkpoint holds something else than data, so it is not read."""

    code = "DC504"


class WouldOverwrite(LaunchError):
    """A run would write over later steps of another one."""

    code = "DC505"


class NotSaved(LaunchError):
    """A checkpoint could not be written."""

    code = "DC506"
