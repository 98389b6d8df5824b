"""Compare an engine's run of a program with plain autograd's, to the bit."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import torch

from . import program as p
from .adapt import for_torch, without_hooks, without_writes
from .draw import HOOKS
from .engines import PLAIN, PLAIN_AS_WRITTEN, TORCH, TORCH_AS_WRITTEN, Engine
from .interpret import Outcome, run

SIMPLE = "to TorchScript's simple executor, which rounds otherwise than its optimizer"

# a function that was optimised between record and replay: another graph, other saved tensors, other operators
OPTIMISED = ("DC128", "DC101", "DC102", "DC120")


@dataclass(frozen=True)
class Verdict:
    """``equal``, ``refused`` (a legal error), ``no reference`` (plain raises) or ``left out``; and why."""

    kind: str
    why: str = ""


class Disagreement(AssertionError):
    """An engine's run differs from plain autograd's."""


def same_bits(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    """Say whether two tensors have the same dtype, shape and bytes (so NaN equals NaN, and 0 is not -0)."""
    if left is None or right is None:
        return left is right
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return left.contiguous().view(-1).view(torch.uint8).equal(right.contiguous().view(-1).view(torch.uint8))


def _close(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return torch.allclose(left.double(), right.double(), rtol=1e-2, atol=1e-3, equal_nan=True)


def difference(expected: Outcome, got: Outcome, *, exact: bool = True) -> str | None:
    """Describe the first difference of two runs, or return None."""
    same = same_bits if exact else _close
    for (label, left), (other, right) in zip(expected.values, got.values, strict=False):
        if label != other:
            return f"{label} came as {other}"
        if not same(left, right):
            return f"{label} differs: expected {left}, got {right}"
    if len(expected.values) != len(got.values):
        return f"{len(expected.values)} values expected, {len(got.values)} came"
    return None


def left_out(program: p.Program) -> str | None:
    """Say why a program has no reference to compare with, or return None."""
    steps = list(p.walk(program.body))
    contexts = {step.context for step, _ in steps if isinstance(step, p.Within)}
    draws = {step.op for step, _ in steps if isinstance(step, p.Draw)}
    if "rrelu" in draws and contexts & {"hooks", "fresh hooks"}:
        # autograd hands rrelu's noise to the hooks before the kernel has filled it, so a copy of it is
        # garbage
        return "rrelu under saved-tensor hooks that copy"
    for step, around in p.walk(program.body):
        # by a region around it, or by hooks that copy
        new = isinstance(step, p.Region) and (bool(around) or contexts & {"hooks", "fresh hooks"})
        if new and any(how == "closure" for _, how in step.inputs) and p.uses(step.body, p.Binary, "same"):
            # what a list that a name holds contains is no input of a region, so an argument that is the same tensor
            # may come back as another object
            return "asks whether an argument is an element of a list that a name holds"
    return None


def _has(program: p.Program, context: str) -> bool:
    return any(isinstance(step, p.Within) and step.context == context for step, _ in p.walk(program.body))


def _keeps_and_changes(program: p.Program) -> bool:
    """Say whether there are in-place ops, which may hit a result that was pinned or that a selective region keeps."""
    steps = [step for step, _ in p.walk(program.body)]
    selective = any(isinstance(step, p.Region) and step.options.selective for step in steps)
    pins = any(isinstance(step, p.Unary) and step.op == "pin" for step in steps)
    return (selective or pins) and any(isinstance(step, p.InPlace | p.Unsafe | p.Library) for step in steps)


def _scripts_outside(program: p.Program) -> bool:
    """Say whether a scripted function is called outside of regions as well, where TorchScript optimises it."""
    return any(
        isinstance(step, p.Library) and step.op == "script" and not around
        for step, around in p.walk(program.body)
    )


def judge(program: p.Program, engine: Engine) -> Verdict:
    """Run a program both ways; return how they agree, or raise Disagreement."""
    if not engine.ours:
        program = for_torch(program)
    reason = left_out(program)
    if reason is not None:
        return Verdict("left out", reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # under hooks that do nothing autograd does not see changes in place, so the reference is a run without hooks
        expected = run(without_hooks(program, *HOOKS) if _has(program, "identity hooks") else program, PLAIN)
        if expected.error is not None:
            return Verdict("no reference", f"{type(expected.error).__name__}: {expected.error}"[:160])
        if not engine.ours:
            return _judge_beside_torch(program, engine, expected)
        if expected.changed == "live":
            return Verdict("left out", "a value that a region reads live is changed in place")
        got = run(program, engine)
        if any(step.options.reentrant for step, _ in p.walk(program.body) if isinstance(step, p.Region)):
            return _judge_reentrant(program, expected, got)
        return _judge_ours(program, engine, expected, got)


def _judge_ours(program: p.Program, engine: Engine, expected: Outcome, got: Outcome) -> Verdict:
    if got.error is not None:
        told = "mutated" in str(got.error) or "changed in place" in str(got.error)
        if expected.changed == "owned" or (told and _keeps_and_changes(program)):
            return Verdict("refused", f"{type(got.error).__name__}")
        if any(code in str(got.error) for code in OPTIMISED) and _scripts_outside(program):
            return Verdict("refused", "TorchScript optimised a function between record and replay")
        if run(without_hooks(program, *HOOKS), PLAIN).error is not None:
            # a user's hooks that copy make a change in place legal, but a region's tensors do not pass them
            return Verdict("refused", f"{type(got.error).__name__}, legal with copying hooks only")
        raise Disagreement(f"plain autograd runs, {engine.name} raises: {got.error!r}") from got.error
    found = difference(expected, got)
    if found is None:
        return Verdict("equal")
    if _equals_simple_executor(program, got):
        return Verdict("equal", SIMPLE)
    hookless = run(without_hooks(program, *HOOKS), PLAIN)
    if difference(expected, hookless) is not None and difference(expected, got, exact=False) is None:
        return Verdict("no reference", "copies that hooks make have other strides, and round otherwise")
    raise Disagreement(f"{engine.name}: {found}")


def _equals_simple_executor(program: p.Program, got: Outcome) -> bool:
    if not p.uses(program.body, p.Library, "script"):
        return False
    return difference(run(program, PLAIN_AS_WRITTEN), got) is None


def _judge_beside_torch(program: p.Program, engine: Engine, expected: Outcome) -> Verdict:
    """Judge torch's surface: equal to plain autograd wherever torch's engine is, elsewhere as torch's or an error."""
    got = _beside(program) if engine == TORCH else run(program, engine)
    found = f"raises {got.error!r}" if got.error is not None else difference(expected, got)
    if found is None:
        return Verdict("equal")
    if got.error is None and _equals_simple_executor(program, got):
        return Verdict("equal", SIMPLE)
    theirs = _beside(program)
    if expected.changed == "owned" and ("DC111" in found or "DC112" in found):
        # torch's engine does not look at what a nested region owns, and replays it with the changed value
        return Verdict("refused", "a region's input was changed in place")
    if "DC112" in found and run(without_hooks(program, *HOOKS), PLAIN).error is not None:
        return Verdict("refused", "legal with copying hooks only")
    if "DC114" in found and _keeps_and_changes(program):
        return Verdict("refused", "a pinned value was changed in place")
    if "DC128" in found and _scripts_outside(program):
        return Verdict("refused", "TorchScript optimised a function between record and replay")
    if theirs.error is None and difference(expected, theirs) is None:
        raise Disagreement(
            f"torch's engine equals plain autograd, {engine.name} does not: {found}"
        ) from got.error
    if got.error is not None:
        return Verdict(
            "refused", f"{type(got.error).__name__}, torch's is {'wrong' if theirs.error is None else 'too'}"
        )
    if theirs.error is not None:
        raise Disagreement(
            f"torch's engine raises {theirs.error!r}, {engine.name}: {found}"
        ) from theirs.error
    apart = difference(theirs, got)
    if apart is not None and expected.changed != "no":
        # every replay writes again, and torch's engine replays more often; without these writes all must be well
        fresh = without_writes(program)
        _judge_beside_torch(fresh, engine, run(fresh, PLAIN))
        return Verdict("no reference", "each replay writes into a region's input again, torch's too")
    if apart is not None:
        raise Disagreement(f"torch's engine differs from plain autograd, {engine.name} from both: {apart}")
    return Verdict("equal", "to torch's engine, which is not to plain autograd")


def _beside(program: p.Program) -> Outcome:
    if program.finish == "threads":
        # torch's replays on two threads draw each other's numbers
        program = replace(program, finish="no threads")
    if not p.uses(program.body, p.Library, "script"):
        return run(program, TORCH)
    # A scripted function turns the exception that ends torch's replay early into an error, and torch's replay runs
    # another graph than its forward.
    with TORCH.module.set_checkpoint_early_stop(False):
        return run(program, TORCH_AS_WRITTEN)


def _judge_reentrant(program: p.Program, expected: Outcome, got: Outcome) -> Verdict:
    """Judge the reentrant mode, which adds up gradients in an order of its own, also in torch."""
    if got.error is None and difference(expected, got) is None:
        return Verdict("equal")
    if got.error is None and _equals_simple_executor(program, got):
        return Verdict("equal", SIMPLE)
    theirs = _beside(program)
    if theirs.error is not None:
        return Verdict("no reference", f"torch's reentrant engine raises {theirs.error}"[:160])
    if got.error is not None:
        raise Disagreement(f"torch's reentrant engine runs, ours raises: {got.error!r}") from got.error
    # gradients and their hooks as torch's, all else as without regions (torch's own changes buffers twice)
    values = [
        after if after[0].startswith(("grad of", "calls of")) else before
        for before, after in zip(expected.values, theirs.values, strict=True)
    ]
    found = difference(Outcome(values), got)
    if found is not None:
        raise Disagreement(f"reentrant, against torch's: {found}")
    return Verdict("equal", "to torch's reentrant engine")
