"""Errors: the base class of every coded distckpt error, and the ones of the device floor (DC2xx)."""

from __future__ import annotations

from typing import Any


class DistckptError(RuntimeError):
    """A coded error that says what happened, where, why, and how to fix it.

    `code` is stable and documented; subclasses set it. The message starts with ``[code] what`` and has one
    further line for each part that is given. The parts stay readable as attributes.
    """

    code: str = "DC000"

    def __init__(
        self, what: str, where: str | None = None, why: str | None = None, fix: str | None = None
    ) -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        lines = [f"[{self.code}] {what}"]
        for label, text in (("where", where), ("why", why), ("fix", fix)):
            if text:
                lines.append(f"  {label + ':':<6} {text}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        # RuntimeError would rebuild from the formatted message and format it a second time.
        return _rebuild, (type(self), self.what, self.where, self.why, self.fix)


def _rebuild(
    kind: type[DistckptError], what: str, where: str | None, why: str | None, fix: str | None
) -> DistckptError:
    error = kind.__new__(kind)
    DistckptError.__init__(error, what, where, why, fix)
    return error


class UnknownDeviceTypeError(DistckptError):
    """No backend is known for a device type."""

    code = "DC201"


class DuplicateBackendError(DistckptError):
    """Two backends claim the same device type."""

    code = "DC202"


class DeviceError(DistckptError):
    """A device of the wrong type, without an index, or with an index that does not exist."""

    code = "DC203"


class RngStateError(DistckptError):
    """A random state that this backend did not make; the generator was left as it was."""

    code = "DC204"


class GraphCaptureError(DistckptError):
    """A random state was needed while a device graph is captured, and this torch cannot give it."""

    code = "DC205"


class BackendLoadError(DistckptError):
    """A backend exists for the device type but could not be loaded or used here."""

    code = "DC206"


class NoRngError(DistckptError):
    """The device type offers no way to read and put back its random state."""

    code = "DC207"


class UnsupportedTorch(DistckptError):
    """The installed torch lacks private names that distckpt needs."""

    code = "DC208"
