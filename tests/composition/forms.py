"""The ways a region is written down: what its function reads, how its inputs are passed, who calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import program as p

if TYPE_CHECKING:
    from .interpret import Machine

Tensors = Sequence[torch.Tensor]
MODULES = ("module", "apply", "functional")  # forms where a region's body is in a module
read_by_name: torch.Tensor | None = None  # the global name that regions read, each in globals of its own


@dataclass(frozen=True)
class Box:
    """A dataclass that carries tensors into a region."""

    tensors: tuple[torch.Tensor, ...]
    label: str


class Body(nn.Module):
    """A region's body in module form, holding the program's parameters and its own batch norm."""

    def __init__(self, machine: Machine, run: Callable[..., Any]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(machine.weights)
        self.norm = machine.norm
        self._run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body with the parameters that this module has now."""
        return self._run(*args, **kwargs, weights=list(self.weights))


class Around(nn.Module):
    """A module with a region inside, for ``functional_call``."""

    def __init__(self, body: Body, region: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self._region = region

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body as a region."""
        return self._region(self.body, args, kwargs)


def call(
    machine: Machine, step: p.Region, env: list[torch.Tensor], weights: Tensors | None
) -> list[torch.Tensor]:
    """Call a region as ``step`` says and return the tensors that it gives back."""
    if step.form == "loop":
        return _loop(machine, step, env, weights)
    by_way: dict[str, list[torch.Tensor]] = {}
    for src, how in step.inputs:
        by_way.setdefault(how, []).append(env[src % len(env)])
    # what only a function in a module's attribute names is read live
    loose = {"closure", "cell"} if step.form in MODULES else {"closure"}
    machine.note(by_way, loose)
    closed = by_way.get("closure", [])
    cell = by_way.get("cell", [None])[0]
    # closed over by name, because that is where a region looks for modules that its function may change
    norm = machine.norm
    around = weights

    def run(*args: Any, weights: Tensors | None = None, **kwargs: Any) -> Any:
        inner = [x for x in args if isinstance(x, torch.Tensor)]
        inner += [x for key, x in kwargs.items() if key.startswith("tensor")]
        for entry in args:
            if isinstance(entry, list):
                inner += [part["x"] for part in entry]
        inner += kwargs["box"].tensors if "box" in kwargs else ()
        inner += closed
        inner += [x for x in (cell, read_by_name) if x is not None]
        machine.steps(step.body, inner, norm, weights or around)
        return pack(step.output, inner)

    fn: Any = run
    if step.form in MODULES:
        fn = Body(machine, run)
    elif "global" in by_way:
        names = {**globals(), "read_by_name": by_way["global"][0]}
        fn = FunctionType(run.__code__, names, "run", run.__defaults__, run.__closure__)
        fn.__kwdefaults__ = run.__kwdefaults__
    args: tuple[Any, ...] = (*by_way.get("arg", ()), 3, "text", None)
    if isinstance(fn, Body):
        args = (*by_way.get("global", ()), *args)
    if "list" in by_way:
        args += ([{"x": x, "n": 1} for x in by_way["list"]],)
    kwargs: dict[str, Any] = {f"tensor{i}": x for i, x in enumerate(by_way.get("kwarg", ()))}
    if "box" in by_way:
        kwargs["box"] = Box(tuple(by_way["box"]), "box")
    if not step.options.reentrant:
        kwargs["flag"] = True
    if p.uses(step.body, p.Draw, "generator"):
        kwargs["generator"] = machine.generator
    if step.form == "functional":
        result = _functional(machine, fn, step.options, (*by_way.get("partial", ()), *args), kwargs)
    else:
        bound = partial(fn, *by_way["partial"]) if "partial" in by_way else fn
        result = machine.engine.region(bound, step.form, step.options, args, kwargs)
    if step.rebound and isinstance(fn, FunctionType):  # what a module's attributes hold is read at the replay
        closed, cell = [], None
        if "global" in by_way:
            fn.__globals__["read_by_name"] = None
    return unpack(result)


def _functional(
    machine: Machine, body: Body, options: p.Options, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    def region(fn: Body, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return machine.engine.region(fn, "module", options, args, kwargs)

    swapped = {f"body.weights.{i}": x * 1.25 for i, x in enumerate(machine.weights)}
    return torch.func.functional_call(Around(body, region), swapped, args, kwargs)


def _loop(
    machine: Machine, step: p.Region, env: list[torch.Tensor], weights: Tensors | None
) -> list[torch.Tensor]:
    kwargs = {"generator": machine.generator} if p.uses(step.body, p.Draw, "generator") else {}
    norm = machine.norm
    x, scale = env[step.inputs[0][0] % len(env)], 1.0

    def region(fn: Callable[..., Any]) -> Any:
        return unpack(machine.engine.region(fn, "function", step.options, (), kwargs))

    def body(x: torch.Tensor) -> Any:
        inner = [x]
        machine.steps(step.body, inner, norm, weights)
        return pack(step.output, inner)

    for scale in (1.5, 0.5):
        machine.note({"cell": [x]}, set())
        x = region(lambda **kwargs: body(x * scale))[-1]  # noqa: B023 - what people write
    out = x
    if step.rebound:
        x, scale = x.detach(), 3.0
    return [out]


def pack(output: str, env: list[torch.Tensor]) -> Any:
    """Give a region's results the structure it is meant to have."""
    if output == "tensor":
        return env[-1]
    if output == "tuple":
        return env[-1], env[-2 % len(env)]
    if output == "input":
        return env[0], env[-1]
    return {"last": env[-1], "more": [env[len(env) // 2], None], "count": len(env)}


def unpack(result: Any) -> list[torch.Tensor]:
    """Take the tensors back out of a region's result."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, dict):
        return [result["last"], result["more"][0]]
    return list(result)
