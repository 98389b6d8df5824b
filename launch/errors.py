"""Bad input to a launch script: one line that says what to do, and exit code 2."""

from __future__ import annotations

from distckpt_backends.errors import DistckptError


class LaunchError(DistckptError, code="DC500"):
    """Base of what a user of `launch/` can get wrong."""

    def line(self) -> str:
        """The whole error on one line, for a terminal."""
        return f"[{self.code}] {self.what}: {self.fix}"


class BadOption(LaunchError, code="DC501"):
    """An option has a value that the job cannot run with."""


class BadData(LaunchError, code="DC502"):
    """The training data is missing, unreadable or too short."""


class BadCheckpoint(LaunchError, code="DC503"):
    """There is no checkpoint to resume from, it is damaged, or it was made by a different job."""


class UnsafeCheckpoint(LaunchError, code="DC504"):
    """A checkpoint holds something else than data, so it is not read."""


class WouldOverwrite(LaunchError, code="DC505"):
    """A run would write over later steps of another one."""


class NotSaved(LaunchError, code="DC506"):
    """A checkpoint could not be written."""
