"""Errors of the engine, with stable codes. ``docs/errors.md`` has a section for each."""

from __future__ import annotations

from distckpt_backends.errors import DistckptError

from distckpt._torch import OriginalCheckpointError


class CheckpointError(OriginalCheckpointError):
    """A replay did not match its forward. The base of every mismatch error, and torch's name for it.

    A subclass of torch's, so that an ``except`` clause that holds the original still catches it.
    """


class ReplayError(DistckptError, CheckpointError):
    """Base of the coded replay errors of ``dc.*``."""


class CountMismatch(ReplayError):
    """The replay saved another number of tensors than the forward."""

    code = "DC101"


class MetadataMismatch(ReplayError):
    """A recomputed tensor has another shape, dtype or device than in the forward."""

    code = "DC102"


class ValueMismatch(ReplayError):
    """A recomputed tensor has other values than in the forward (``fingerprint`` or ``bitwise`` check)."""

    code = "DC103"


class DrawMismatch(ReplayError):
    """The replay drew another number of random numbers than the forward."""

    code = "DC104"


class UnstashedDraw(DistckptError):
    """The forward drew random numbers on a device whose generator the region does not stash."""

    code = "DC105"


class LateDevice(DistckptError):
    """A device was initialised for the first time inside a region."""

    code = "DC106"


class MixedDeviceTypes(DistckptError):
    """A region's inputs live on two device types besides the CPU."""

    code = "DC107"


class OptionCollision(DistckptError):
    """An option of ``dc.checkpoint`` is also a parameter of the wrapped function."""

    code = "DC108"


class BadOption(DistckptError, ValueError):
    """An option has a value that the engine does not know or cannot honour."""

    code = "DC109"


class BufferChanged(DistckptError):
    """The forward changed a large buffer that the region had not kept a copy of."""

    code = "DC110"


class InputChanged(ReplayError):
    """An input of the region was changed in place between forward and replay."""

    code = "DC111"


class ParameterChanged(ReplayError):
    """A parameter was changed in place between forward and replay."""

    code = "DC112"


class SuppressedException(DistckptError):
    """The forward context of ``context_fn`` swallowed an exception of the region."""

    code = "DC113"


class PinMismatch(ReplayError):
    """The replay pinned other values than the forward, or a pinned value was changed in place."""

    code = "DC114"


class SessionError(DistckptError):
    """A session was used after its release, or released twice."""

    code = "DC115"


class StreamError(DistckptError, ValueError):
    """A random stream was registered twice, or is not one."""

    code = "DC116"


class ParameterRead(ReplayError):
    """A replay computed a value from a parameter that was changed between forward and replay."""

    code = "DC124"


class ScriptMismatch(ReplayError):
    """TorchScript ran another graph in the replay than in the forward."""

    code = "DC128"


class NotAFunction(DistckptError, TypeError):
    """What was to run as a region cannot be called: None, a tensor, a list of layers."""

    code = "DC136"


class NeedsArguments(DistckptError, TypeError):
    """A function was given alone, which runs it, and it needs arguments."""

    code = "DC137"


class LazyFunction(DistckptError, TypeError):
    """A generator function or a coroutine function, which would run after its region has ended."""

    code = "DC138"


class BatchedReplay(ReplayError):
    """A replay under ``vmap`` failed: its forward ran under another one, or it draws random numbers."""

    code = "DC129"


class ScannedRegion(DistckptError, ValueError):
    """A region in a layer that torch_xla's scan traces asks for what only a replay could do."""

    code = "DC470"


class ScannedDropout(DistckptError, ValueError):
    """A region in a layer that torch_xla's scan traces uses the fused dropout operator."""

    code = "DC471"


class UnitInsideRegion(DistckptError):
    """A region runs a module that gathers and frees its own parameters, which its replay would upset."""

    code = "DC472"


class LoopDraws(DistckptError):
    """A region runs torch_xla's scan, and random numbers were drawn that its replay would draw differently."""

    code = "DC473"
