"""Determinism: whether a replay did what its forward did, and the error that says where it did not.

Note [When a saved value is final]
    Autograd hands some tensors to the hook before the operator has filled them (RReLU's noise), so a tensor is only
    read a few saves later, or when the region ends. Nobody may change it in between: plain autograd
    would refuse that too.

Note [Versions]
    A replay is exact, so a value that it saves has the version (number of in-place changes) that the forward saw;
    another one means that a parameter or a captured tensor was changed since, and the unpack refuses it, as plain
    autograd does. Two kinds of tensor start from another version legitimately: an input, or what stands for a
    parameter, that a hook or an outer region restored and that has been checked on its own; and a buffer that the
    replay found rewound.

Note [TorchScript]
    TorchScript runs a function as it is written the first time, and an optimised graph of it later, which saves other
    tensors. A record and its replay must be the same, so both ask for the function as it is written. A graph that was
    optimised before stays in use: then both run that. What is left is a function that was optimised between record
    and replay, by calls outside of regions. An optimised graph is one autograd node. So in a thread that has run
    TorchScript a region counts those that its record made, and its replay runs to its end and must make as many.
    Other nodes are not compared: a pin or a name that ``compat`` reads live makes others in an exact replay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from distckpt import errors
from distckpt._torch import without_dispatch_modes
from distckpt.engine.diagnose import Replay, debug_report, diagnose
from distckpt.engine.inputs import tensors
from distckpt.engine.region import Doubtful, describe
from distckpt.errors import ScriptMismatch

if TYPE_CHECKING:
    from distckpt.engine.region import Region, Slot


_DELAY = 8  # no operator saves more tensors than this before its kernel runs
_WIDTHS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of ``x`` as a flat integer tensor, so that NaN equals NaN and 0.0 differs from -0.0."""
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return x.resolve_neg().contiguous().view(-1).view(_WIDTHS[x.element_size()])


def checksum(x: torch.Tensor) -> torch.Tensor:
    """A 64-bit checksum of the values of ``x``, on its device and without synchronising.

    A sum of the bit patterns, each times an odd number that depends on its place, modulo 2**64: any single
    changed element changes it, and so does a permutation, with overwhelming likelihood.
    """
    bits = _bits(x).to(torch.int64)
    weights = torch.arange(bits.numel(), device=bits.device, dtype=torch.int64).mul_(-7046029254386353131)
    return (bits * weights.bitwise_or_(1)).sum()


class Verifier:
    """What a region saved, in a form that a replay can be compared with."""

    def __init__(self, level: str | Callable[[torch.Tensor], Any]) -> None:
        self.level = level  # or a function of the user's, whose results are compared
        self._waiting: deque[torch.Tensor] = deque()
        self._prints: list[Any] = []
        self._ids: list[int] = []

    def saw(self, x: torch.Tensor) -> None:
        """A tensor was saved in the forward."""
        self._ids.append(id(x))
        self._waiting.append(x.detach())
        if len(self._waiting) > _DELAY:
            self._prints.append(self._print(self._waiting.popleft()))

    def seal(self, buffers: Any = None) -> None:
        """The forward has ended, or stands still: what was saved is final.

        Buffers that the forward changed are left out: they have no one value that was saved.
        """
        while self._waiting:
            self._prints.append(self._print(self._waiting.popleft()))
        if buffers is not None:
            ids = {id(e.tensor) for e in buffers.entries}
            self._prints = [None if i in ids else p for i, p in zip(self._ids, self._prints, strict=True)]

    def _print(self, x: torch.Tensor) -> Any:
        if x.layout is not torch.strided or x.is_meta or (x.dtype is torch.uint8 and x.dim() == 1):
            return None  # the last kind is the workspace of a fused kernel, and partly uninitialised
        with torch.no_grad(), without_dispatch_modes():
            if callable(self.level):
                return self.level(x)
            return checksum(x) if self.level == "fingerprint" else _bits(x).clone()

    def compare(self, refs: list[Any], buffers: Any, mismatch: Any) -> None:
        """Compare the values that a replay put into the living slots; one synchronisation for all of them."""
        self.seal(buffers)
        differs: dict[int, Any] = {}
        with torch.no_grad(), without_dispatch_modes():
            for i, ref in enumerate(refs):
                slot = ref()
                value = None if slot is None else slot.value
                if value is not None and type(value) is not Doubtful and self._prints[i] is not None:
                    differs[i] = self._print(value) != self._prints[i]
            wrong = [
                i for i, flag in differs.items() if (flag.any() if isinstance(flag, torch.Tensor) else flag)
            ]
        if wrong:
            mismatch.values(wrong)


def optimised_graphs(out: Any, inputs: Iterable[torch.Tensor]) -> int:
    """How many optimised graphs TorchScript ran between ``inputs`` and the tensors in ``out``."""
    seen: set[Any] = {None, *(t.grad_fn for t in inputs)}
    waiting: list[Any] = [t.grad_fn for t in tensors(out)]
    count = 0
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            count += node.name().endswith("DifferentiableGraphBackward")
            waiting += [below for below, _ in node.next_functions]
    return count


def optimised(where: str) -> ScriptMismatch:
    """The error for a replay that ran other graphs than the record."""
    return ScriptMismatch(
        "TorchScript ran another graph in the replay of a region than in its forward",
        where=where,
        why="it optimised a scripted function between the two, and the optimised graph saves other tensors",
        fix="run the scripted function twice before its first use in a region, or put "
        "torch.jit.optimized_execution(False) around the step",
    )


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

    def report(self, replay: Replay) -> NoReturn:
        """Raise the error of the first kind of difference; ``replay`` finds the operator."""
        r = self.region
        if self.count is not None:
            more = self.count > len(r.refs)
            text = _EXTRA if more else _COUNT.format(forward=len(r.refs), replay=self.count)
            self._raise(
                replay, errors.CountMismatch, text, "the recomputation ran other operators than the forward"
            )
        if self.metas:
            rows = [
                f"tensor at position {i}:\nsaved metadata: {_meta(a)}\nrecomputed metadata: {_meta(b)}\n"
                for i, a, b in self.metas
            ]
            text = _META.format(table="".join(rows))
            self._raise(
                replay,
                errors.MetadataMismatch,
                text,
                "the recomputation saw other data or ran other operators",
            )
        if self.drawn:
            text = (
                f"the replay drew another number of random values on {', '.join(self.drawn)} than the forward"
            )
            self._raise(replay, errors.DrawMismatch, text, "it took another path through the function")
        if self.script:
            raise optimised(describe(r.fn, r.options))
        text = f"recomputed values differ from the forward's at positions {self.value_positions}"
        self._raise(
            replay, errors.ValueMismatch, text, "the function depends on state that changed since the forward"
        )

    def _raise(self, replay: Replay, kind: type[errors.ReplayError], what: str, why: str) -> NoReturn:
        r = self.region
        if not r.options.strict:
            plain = errors.CheckpointError(f"{what}\n{_TIP}")
            if r.log is not None:
                raise errors.CheckpointError(debug_report(r.log)) from plain
            raise plain
        found = diagnose(self, replay)
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
    return errors.ParameterChanged(
        "a tensor needed for the gradient of a region was changed in place after it was saved",
        where=describe(region.fn, region.options),
        why=f"a {value.dtype} tensor of shape {tuple(value.shape)} is at version {value._version}; "
        f"the forward saved version {meta[3]}. Without checkpointing autograd refuses this as well",
        fix="update parameters after backward, and replace the in-place operator that follows the save",
    )
