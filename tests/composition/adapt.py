"""Rewrite a program into one that torch.utils.checkpoint is known to run right.

The ``dc`` surface takes programs as drawn. torch's own engine, and the ``compat`` surface where it keeps
torch's behaviour, have known wrong results and errors; each rewrite below names one.
"""

from __future__ import annotations

from dataclasses import replace

from . import program as p


def for_torch(program: p.Program) -> p.Program:
    """Return the program without what torch's engine gets wrong or refuses."""
    autocast = any(
        isinstance(step, p.Within) and "autocast" in step.context for step, _ in p.walk(program.body)
    )
    # a selective region can be run backward once, and its cache does not know autocast's cache of cast
    # weights
    once = program.finish in ("backward", "inputs", "drop")
    body = _body(program.body, once and not autocast, in_selective=False)
    if not once or p.uses(program.body, p.InnerGrad):
        # a debug region can be replayed once, and each replay draws from a generator that is not stashed: torch's
        # engine replays more often than ours
        body = _replayed_often(body)
    return replace(program, body=body)


def _replayed_often(body: tuple[p.Step, ...]) -> tuple[p.Step, ...]:
    steps: list[p.Step] = []
    for step in body:
        if isinstance(step, p.Region):
            step = replace(step, options=replace(step.options, debug=False))
        if isinstance(step, p.Draw) and step.op == "generator":
            step = replace(step, op="noise")
        if isinstance(step, p.InnerGrad | p.Within | p.Region):
            step = replace(step, body=_replayed_often(step.body))
        steps.append(step)
    return tuple(steps)


def _body(body: tuple[p.Step, ...], selective: bool, in_selective: bool) -> tuple[p.Step, ...]:
    return tuple(_step(step, selective, in_selective) for step in body)


def _step(step: p.Step, selective: bool, in_selective: bool) -> p.Step:
    match step:
        case p.Custom():
            # a saved tensor can be unpacked once per backward
            return replace(step, reads=1)
        case p.BatchNorm(src):
            # statistics are updated in the replay again
            return p.Unary("tanh", src)
        case p.Draw("rrelu", src):
            # as the last op under early stop its noise is read before it is drawn
            return p.Draw("dropout", src)
        case p.InPlace(_, src, _) if in_selective:
            # a cached result must not change
            return p.Unary("halve", src)
        case p.Unsafe(_, src, param) if in_selective:
            return p.Linear(src, param)
        case p.Library("gru", src) if in_selective:
            # it changes its products, and torch's engine does not see that
            return p.Linear(src, 0)
        case p.InnerGrad(src) if in_selective:
            # a gradient taken inside uses up the one backward
            return p.Unary("sin", src)
        case p.InnerGrad() | p.Within():
            return replace(step, body=_body(step.body, selective, in_selective))
        case p.Region() if step.options.selective and selective and not in_selective:
            kept = step.options.selective
            if kept in ("list: draws", "policy: alternate") and p.draws_random(step.body):
                # a kept draw leaves the generator where it was, and the draws after it differ
                kept = "list: mm"
            inner = _body(step.body, selective, in_selective=True)
            return replace(step, body=inner, options=replace(step.options, selective=kept))
        case p.Region():
            # regions inside a selective region replay under its cache, which was filled without them
            inner = _body(step.body, selective and not in_selective, in_selective)
            return replace(step, body=inner, options=replace(step.options, selective=None))
    return step


def without_hooks(program: p.Program, *kinds: str) -> p.Program:
    """Return the program without the user's saved-tensor hooks of some kinds."""
    return replace(program, body=_without_hooks(program.body, kinds))


def _without_hooks(body: tuple[p.Step, ...], kinds: tuple[str, ...]) -> tuple[p.Step, ...]:
    steps: list[p.Step] = []
    for step in body:
        if isinstance(step, p.InnerGrad | p.Within | p.Region):
            step = replace(step, body=_without_hooks(step.body, kinds))
        if isinstance(step, p.Within) and step.context in kinds:
            steps += step.body
        else:
            steps.append(step)
    return tuple(steps)


def without_writes(program: p.Program) -> p.Program:
    """Return the program with every in-place operator on a copy of its own."""
    return replace(program, body=_without_writes(program.body))


def _without_writes(body: tuple[p.Step, ...]) -> tuple[p.Step, ...]:
    steps: list[p.Step] = []
    for step in body:
        if isinstance(step, p.InnerGrad | p.Within | p.Region):
            step = replace(step, body=_without_writes(step.body))
        steps.append(replace(step, fresh=True) if isinstance(step, p.InPlace) else step)
    return tuple(steps)
