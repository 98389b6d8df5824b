"""Mismatch: what a replay did otherwise than its forward, and the error that says so.

Note [Versions]
    A replay is exact, so a value that it saves has the version (number of in-place changes) that the forward saw;
    another one means that a parameter or a captured tensor was changed since, and the unpack refuses it, as plain
    autograd does. Two kinds of tensor start from another version legitimately: an input, or what stands for a
    parameter, that a hook or an outer region restored and that has been checked on its own; and a buffer that the
    replay found rewound.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from distckpt import errors
from distckpt._torch import without_dispatch_modes
from distckpt.engine.inputs import tensors
from distckpt.engine.scripted import optimised, optimised_graphs

if TYPE_CHECKING:
    from distckpt.engine.region import Region
    from distckpt.engine.slot import Slot

_COUNT = (
    "torch.utils.checkpoint: A different number of tensors was saved during the original forward and recomputation.\n"
    "Number of tensors saved during forward: {forward}\nNumber of tensors saved during recomputation: {replay}."
)
_EXTRA = (
    "torch.utils.checkpoint: trying to save more tensors during recomputation than during the original "
    "forward pass."
)
_META = (
    "torch.utils.checkpoint: Recomputed values for the following tensors have different metadata than during the "
    "forward pass.\n{table}"
)
_TIP = (
    "\nTip: To see a more detailed error message, either pass `debug=True` to the checkpoint call or wrap it in "
    "`with set_checkpoint_debug_enabled(True):`. Under torch.compile with dynamic shapes a recomputation can pick "
    "another compiled graph than the forward; see https://github.com/pytorch/pytorch/issues/166926."
)


def _meta(meta: Any) -> str:
    return str({"shape": meta[0], "dtype": meta[1], "device": meta[2]})


class Mismatch:
    """Collects the differences of one replay; ``found`` says whether there is one."""

    # Class defaults: nearly every replay finds nothing, and then these are never written.
    found = False
    count: int | None = None
    metas: list[tuple[int, Any, Any]] | None = None
    drawn: list[str] | None = None
    value_positions: list[int] | None = None
    script = False
    restored: Any = None  # tensors that stand where parameters stand

    def __init__(self, region: Region, call: Any) -> None:
        self.region = region
        self.call = call

    def compare(self, i: int, slot: Slot, x: torch.Tensor, now: tuple[Any, ...]) -> torch.Tensor:
        """Position ``i`` was saved with other metadata, or only with another version. Returns the value to keep."""
        then = slot.meta
        if then[:3] != now[:3]:
            self.metas = [*(self.metas or ()), (i, then, now)]
            self.found = True
        elif not self.region.options.strict or _alias(x, tensors((self.call, self.restored))):
            slot.meta = now
        elif self.region.buffers is not None and _alias(x, self.region.buffers.tensors()):
            with without_dispatch_modes():
                x = x.clone()  # the buffer itself gets its present value back when the replay ends
            slot.meta = (*now[:3], x._version)
        return x

    def extra(self, i: int) -> None:
        """The replay went on to save number ``i``, beyond the last one of the forward."""
        self.count = i + 1
        self.found = True

    def fewer(self, i: int) -> None:
        """The replay ended after ``i`` saves."""
        self.count = i
        self.found = True

    def drew(self, astray: list[str]) -> None:
        """These streams did not end where the forward ended."""
        if astray:
            self.drawn = astray
            self.found = True

    def made(self, out: Any) -> None:
        """In a thread that runs TorchScript: the replay ended with ``out``."""
        if optimised_graphs(out, tensors(self.call)) != self.region.scripted:
            self.script = True
            self.found = True

    def values(self, positions: list[int]) -> None:
        """Some values differ."""
        self.value_positions = positions
        self.found = True

    def report(self) -> NoReturn:
        """Raise the error of the first kind of difference."""
        r = self.region
        if self.count is not None:
            more = self.count > len(r.refs)
            text = _EXTRA if more else _COUNT.format(forward=len(r.refs), replay=self.count)
            self._raise(errors.CountMismatch, text, "the recomputation ran other operators than the forward")
        if self.metas:
            rows = [
                f"tensor at position {i}:\nsaved metadata: {_meta(a)}\nrecomputed metadata: {_meta(b)}\n"
                for i, a, b in self.metas
            ]
            text = _META.format(table="".join(rows))
            self._raise(
                errors.MetadataMismatch, text, "the recomputation saw other data or ran other operators"
            )
        if self.drawn:
            text = (
                f"the replay drew another number of random values on {', '.join(self.drawn)} than the forward"
            )
            self._raise(errors.DrawMismatch, text, "it took another path through the function")
        if self.script:
            from distckpt.engine.region import describe

            raise optimised(describe(r.fn, r.options))
        text = f"recomputed values differ from the forward's at positions {self.value_positions}"
        self._raise(
            errors.ValueMismatch, text, "the function depends on state that changed since the forward"
        )

    def _raise(self, kind: type[errors.ReplayError], what: str, why: str) -> NoReturn:
        from distckpt.engine.diagnose import debug_report, diagnose
        from distckpt.engine.region import describe

        r = self.region
        if not r.options.strict:
            plain = errors.CheckpointError(f"{what}\n{_TIP}")
            if r.log is not None:
                raise errors.CheckpointError(debug_report(r.log)) from plain
            raise plain
        found = diagnose(self)
        raise kind(
            what + found.text,
            where=describe(r.fn, r.options) + (f", at {found.where}" if found.where else ""),
            why=why,
            fix="make the function depend on its inputs only; dc.pin() values that must not be decided twice, and ask "
            "dc.is_recomputing() before changing state",
        )


def _alias(x: torch.Tensor, others: Iterable[torch.Tensor]) -> bool:
    root, storage = _root(x), _storage(x)
    return any(_root(t) is root or (storage is not None and _storage(t) == storage) for t in others)


def _root(x: torch.Tensor) -> torch.Tensor:
    return x if x._base is None else x._base


def _storage(x: torch.Tensor) -> int | None:
    try:
        return x.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse, or a subclass without one
        return None


def mutated(region: Region, value: torch.Tensor, meta: Any) -> errors.ReplayError:
    """The error for a value that was changed in place after it was saved."""
    from distckpt.engine.region import describe

    return errors.ParameterChanged(
        "a tensor needed for the gradient of a region was changed in place after it was saved",
        where=describe(region.fn, region.options),
        why=f"a {value.dtype} tensor of shape {tuple(value.shape)} is at version {value._version}; "
        f"the forward saved version {meta[3]}. Without checkpointing autograd refuses this as well",
        fix="update parameters after backward, and replace the in-place operator that follows the save",
    )
