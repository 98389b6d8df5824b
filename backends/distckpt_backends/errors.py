"""Errors: the base class of every coded distckpt error, and the ones of the device floor (DC2xx)."""

from __future__ import annotations

from typing import Any


class DistckptError(RuntimeError):
    """A coded error that says what happened, where, why, and how to fix it.

    `code` is stable and documented; a subclass names its own in its ``class`` statement. The message starts with
    ``[code] what`` and has one further line for each part that is given. The parts stay readable as attributes.
    """

    code: str = "DC000"

    def __init_subclass__(cls, code: str | None = None, **others: Any) -> None:
        super().__init_subclass__(**others)
        if code is not None:
            cls.code = code

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
    # the built-in class that lays it out: OSError's where a TimeoutError is among its bases
    error: DistckptError = (OSError if issubclass(kind, OSError) else RuntimeError).__new__(kind)
    DistckptError.__init__(error, what, where, why, fix)
    return error


class UnknownDeviceTypeError(DistckptError, code="DC201"):
    """No backend is known for a device type."""


class DuplicateBackendError(DistckptError, code="DC202"):
    """Two backends claim the same device type."""


class DeviceError(DistckptError, code="DC203"):
    """A device of the wrong type, without an index, or with an index that does not exist."""


class RngStateError(DistckptError, code="DC204"):
    """A random state that this backend did not make; the generator was left as it was."""


class GraphCaptureError(DistckptError, code="DC205"):
    """A random state was needed while a device graph is captured, and this torch cannot give it."""


class BackendLoadError(DistckptError, code="DC206"):
    """A backend exists for the device type but could not be loaded or used here."""


class NoRngError(DistckptError, code="DC207"):
    """The device type offers no way to read and put back its random state."""


class UnsupportedTorch(DistckptError, code="DC208"):
    """The installed torch lacks private names that distckpt needs."""
