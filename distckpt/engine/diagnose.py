"""What went differently: the debug log of a region, and the search for the first diverging operator.

Note [Diagnosis]
    Nothing is paid before a replay has failed. Then only that region runs again, twice, with its operators logged:
    once as a forward and once as a replay. Where the two differ is the culprit. Where they agree, the state
    that the function depends on has changed since the forward, and the operator that ran at the failing
    position is named. With collectives under way no other rank would take part in these runs, so on several
    ranks only ``debug=True`` (which logs both real runs) names the operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from distckpt._torch import pop_saved_tensors_hooks, push_saved_tensors_hooks, set_grad_enabled
from distckpt.engine.inputs import Packed
from distckpt.engine.oplog import Entry, OpLog
from distckpt.engine.state import here

if TYPE_CHECKING:
    from distckpt.engine.mismatch import Mismatch
    from distckpt.engine.region import Region


class Log:
    """Operators of the record and of the last replay of one region (``debug=True``)."""

    def __init__(self) -> None:
        self.forward = OpLog()
        self.replay = OpLog()


class Found(NamedTuple):
    """Text to append to an error, and the place in the user's code."""

    text: str
    where: str | None


def _several_ranks() -> bool:
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def diagnose(mismatch: Mismatch) -> Found:
    """Name the first diverging operator of the failed replay."""
    r = mismatch.region
    position = _position(mismatch)
    saves: list[int] = []
    if r.log is not None:
        forward, replay = r.log.forward.entries, r.log.replay.entries
    elif _several_ranks():
        return Found("\nOn several ranks pass debug=True to have the first diverging operator named.", None)
    else:
        try:
            forward, _ = _run_again(r, as_replay=False)
            replay, saves = _run_again(r, as_replay=True)
        except Exception as error:
            return Found(f"\nRunning the region again to find the operator failed: {error}", None)
    for i, (a, b) in enumerate(zip(forward, replay, strict=False)):
        if a.op != b.op:
            text = f"\nFirst difference, operator {i}:\n  forward: {a.op}\n    at {a.place}\n"
            text += f"  replay:  {b.op}\n    at {b.place}"
            return Found(text, b.place)
    if len(forward) != len(replay):
        i = min(len(forward), len(replay))
        longer, name = (forward, "forward") if len(forward) > i else (replay, "replay")
        return Found(
            f"\nOnly the {name} ran operator {i}:\n  {longer[i].op}\n    at {longer[i].place}",
            longer[i].place,
        )
    entry = _entry_at(replay, saves, position)
    if entry is None:
        return Found("", None)
    text = f"\nSaved tensor {position} belongs to this operator of the replay:\n  {entry.op}\n    at {entry.place}"
    return Found(text, entry.place)


def _position(mismatch: Mismatch) -> int | None:
    if mismatch.metas:
        return mismatch.metas[0][0]
    if mismatch.value_positions:
        return mismatch.value_positions[0]
    return None if mismatch.count is None else mismatch.count - 1


def _entry_at(entries: list[Entry], saves: list[int], position: int | None) -> Entry | None:
    if position is None or not entries or not 0 <= position < len(saves):
        return None
    return entries[min(saves[position], len(entries) - 1)]


def _run_again(r: Region, as_replay: bool) -> tuple[list[Entry], list[int]]:
    from distckpt.engine.replay import replay

    fn = r.fn.parts[0] if isinstance(r.fn, Packed) else r.fn
    owner = getattr(fn, "__self__", fn)
    names = {id(m): n for n, m in owner.named_modules()} if isinstance(owner, torch.nn.Module) else {}
    log = OpLog(names)
    saves: list[int] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        saves.append(len(log.entries))
        return x.detach()

    def run(
        r: Region, fn: Any, args: list[Any], kwargs: dict[str, Any], generators: Any, mismatch: Any
    ) -> bool:
        frame, replaying = here.frame, here.replaying
        assert frame is not None  # this replay's own
        if as_replay:
            here.replaying += 1
        else:
            here.frame, here.replaying = frame.outer, 0
        grad = torch.is_grad_enabled()
        set_grad_enabled(True)
        push_saved_tensors_hooks(pack, lambda x: x)
        try:
            with log.recording():
                r.context.copy().run(fn, *args, **kwargs)
        finally:
            pop_saved_tensors_hooks()
            set_grad_enabled(grad)
            here.frame, here.replaying = frame, replaying
        return False

    replay(r, run)
    return log.entries, saves


_REPORT = """\
An error happened while unpacking tensors; dumping logs of latest computation
because you passed `debug=True` to `torch.utils.checkpoint.checkpoint()`.

1. Stack traces of the operators that ran in the original forward

{forward_traces}
2. Stack traces of the operators that ran during recomputation

{replay_traces}
3. Log of operators in the original forward and recomputation

Operations executed during the original forward:

{forward}

Operations executed during recomputation:

{replay}

 ERROR: Detected non-determinism while running activation checkpointing

 You are seeing this error because you passed `debug=True` to checkpoint and
 the tensors saved during the original forward differ from those saved during
 recomputation. Compare the two operator lists above from the top: the first
 line that differs is where the runs part, and its stack trace says which line
 of your code ran it.
"""


def debug_report(log: Log) -> str:
    """Both operator logs of a region in words, with a stack trace for each operator."""

    def traces(label: str, entries: list[Entry]) -> str:
        total = len(entries)
        return "".join(
            f"{e.op}   ({i + 1} of {total} in {label})\n\n"
            + "".join(f"{f}:{n}:{w}\n" for f, n, w in e.frames)
            + "\n\n"
            for i, e in enumerate(entries)
        )

    forward, replay = log.forward.entries, log.replay.entries
    return _REPORT.format(
        forward_traces=traces("original", forward),
        replay_traces=traces("recompute", replay),
        forward="\n".join(e.op for e in forward),
        replay="\n".join(e.op for e in replay),
    )
