"""Random state of a device whose stream records a graph.

Inside a capture the counter that moves is the graph's own, and the host-side seed and offset may not be read.
torch 2.13 and later give and take it through `get_state` and `set_state`; older versions refuse both. Nothing
here depends on the version: what torch refuses is kept as unreadable, and becomes an error only when a region
has to know.
"""

from __future__ import annotations

from typing import Any

import torch

from .errors import GraphCaptureError
from .state import same_bytes


class CapturedState:
    """A state that was stashed during capture; it is only good inside the same capture."""

    __slots__ = ("_bytes",)

    def __init__(self, state: torch.Tensor | None) -> None:
        self._bytes = state

    @classmethod
    def read(cls, generator: Any) -> CapturedState:
        """Stash `generator` during capture; unreadable where this torch refuses."""
        try:
            return cls(generator.get_state())
        except RuntimeError:
            return cls(None)

    @property
    def readable(self) -> bool:
        """False when torch refused to give the state."""
        return self._bytes is not None

    def same(self, other: CapturedState) -> bool:
        """True when both were read and are equal."""
        return self._bytes is not None and other._bytes is not None and same_bytes(self._bytes, other._bytes)

    def write(self, generator: Any, device: torch.device) -> None:
        """Put the state back. Raises GraphCaptureError (DC205) where this torch refuses."""
        if self._bytes is None:
            raise unreadable_capture(device)
        try:
            generator.set_state(self._bytes)
        except RuntimeError as error:
            raise GraphCaptureError(
                f"the random state of {device} cannot be put back while a graph is captured",
                why=f"torch {torch.__version__} refused: {error}",
                fix="do not reseed inside the capture; or move the region's randomness out of the graph",
            ) from error


def unreadable_capture(device: torch.device) -> GraphCaptureError:
    """The error for a region that must know its random state in a capture where torch does not tell."""
    return GraphCaptureError(
        f"the random state of {device} cannot be read while a graph is captured",
        why=f"torch {torch.__version__} gives generator states during capture only from version 2.13 on",
        fix="use torch 2.13 or later; or preserve_rng_state=False if the region draws nothing on this device",
    )


def crossed_capture(device: torch.device, capturing: bool) -> GraphCaptureError:
    """The error for a state that was stashed on the other side of a capture's border."""
    recorded, replayed = ("before", "inside") if capturing else ("inside", "outside")
    return GraphCaptureError(
        f"a random state of {device} was stashed {recorded} a graph capture and is wanted back {replayed} it",
        why="inside a capture the generator counts from the graph's start, so the two are not comparable",
        fix="run a region's forward and its backward both inside, or both outside, of the capture",
    )
