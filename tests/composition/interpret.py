"""Run a program with one engine and keep everything that must not depend on the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import forms, ops
from . import program as p
from .engines import Engine
from .forms import Tensors

SHAPE = (4, 4)
_HOOKS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "hooks": (lambda x: x.clone(), lambda x: x),
    "identity hooks": (lambda x: x, lambda x: x),
    "fresh hooks": (lambda x: x.clone(), lambda x: torch.empty_like(x).copy_(x)),
}


@dataclass
class Outcome:
    """Labelled tensors in the order they came to be, or the error that stopped the run.

    ``changed`` tells (plain runs only) how an input of some region was changed in place after the region
    began: not at all, through a value the region owns, or one that it reads live.
    """

    values: list[tuple[str, torch.Tensor | None]] = field(default_factory=list)
    error: BaseException | None = None
    changed: str = "no"

    def keep(self, label: str, value: torch.Tensor | None) -> None:
        """Record a value as it is now."""
        self.values.append((label, None if value is None else value.detach().clone()))


class Machine:
    """The state of one run: leaves, parameters, the engine, and what was seen on the way."""

    def __init__(self, program: p.Program, engine: Engine) -> None:
        self.program = program
        self.engine = engine
        self.outcome = Outcome()
        self.hook_calls = 0
        self.counting = threading.Lock()
        self.inside = threading.local()  # gradients taken inside: a replay may run on any thread
        self.fresh: dict[int, bool] = {}
        self.entered: list[tuple[torch.Tensor, int, bool]] = []
        dtype = torch.float64 if program.double else torch.float32
        source = torch.Generator().manual_seed(program.seed)

        def leaf(*shape: int, requires_grad: bool = True) -> torch.Tensor:
            return torch.randn(*shape, generator=source, dtype=dtype).requires_grad_(requires_grad)

        self.inputs = [leaf(*SHAPE), leaf(*SHAPE, requires_grad=program.second_requires_grad)]
        self.weights = [nn.Parameter(leaf(*SHAPE).detach()) for _ in range(2)]
        self.biases = [nn.Parameter(leaf(SHAPE[0]).detach()) for _ in range(2)]
        self.norm = nn.BatchNorm1d(SHAPE[1], dtype=dtype)
        self.mix = leaf(*SHAPE, requires_grad=False)
        self.generator = torch.Generator().manual_seed(program.seed + 17)
        self.gru = self.script = None
        if p.uses(program.body, p.Library, "gru"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(program.seed)
                self.gru = nn.GRU(*SHAPE, dtype=dtype)
        if p.uses(program.body, p.Library, "script"):
            self.script = torch.jit.CompilationUnit(
                ops.SCRIPT
            ).run  # compiled anew: its first calls are special

    def leaves(self) -> list[torch.Tensor]:
        """Every tensor that gradients are wanted for."""
        recurrent = () if self.gru is None else self.gru.parameters()
        every = (*self.inputs, *self.weights, *self.biases, self.norm.weight, *recurrent)
        return [x for x in every if x.requires_grad]

    def forward(self) -> list[torch.Tensor]:
        """Run the program's body on its inputs and return all values."""
        env = list(self.inputs)
        self.steps(self.program.body, env)
        return env

    def steps(
        self,
        body: tuple[p.Step, ...],
        env: list[torch.Tensor],
        norm: nn.Module | None = None,
        weights: Tensors | None = None,
    ) -> None:
        """Run steps in order, appending to ``env``; ``norm`` and ``weights`` are those of the module around."""
        for step in body:
            self.step(step, env, norm or self.norm, weights)

    def step(self, step: p.Step, env: list[torch.Tensor], norm: nn.Module, weights: Tensors | None) -> None:
        """Run one step."""

        def at(index: int) -> torch.Tensor:
            return env[index % len(env)]

        match step:
            case p.Unary(op, src):
                env.append(ops.UNARY[op](at(src)))
            case p.Binary(op, left, right):
                env.append(ops.BINARY[op](at(left), at(right)))
            case p.Linear(src, param):
                weight, bias = (weights or self.weights)[param], self.biases[param]
                x = at(src) if torch.is_autocast_enabled("cpu") else at(src).to(weight.dtype)
                env.append(F.linear(x, weight, bias))
            case p.Draw("generator", src):
                x = at(src)
                env.append(x * torch.rand(x.shape, generator=self.generator, dtype=x.dtype))
            case p.Library(op, src):
                env.append(self.library(op, at(src).to(self.mix.dtype)))
            case p.Unsafe(op, src, param):
                env.append(ops.unsafe(at(src).to(self.mix.dtype), op, (weights or self.weights)[param]))
            case p.Caught(op, src):
                env.append(ops.caught(at(src), op))
            case p.Draw(op, src):
                env.append(ops.DRAW[op](at(src)))
            case p.View(op, src):
                env.append(ops.VIEW[op](at(src)))
            case p.InPlace(op, src, fresh):
                target = env[-1 - src % min(2, len(env))]
                # decided once: what autograd hands to a replay is no view any more
                if self.fresh.setdefault(id(step), fresh or _is_leaf(target)):
                    target = target * 1.0
                ops.IN_PLACE[op](target)
                env.append(target)
            case p.Custom(src, reads):
                env.append(ops.Twice.apply(at(src), reads))
            case p.GradHook(src):
                env.append(self.hooked(at(src)))
            case p.BatchNorm(src):
                env.append(norm(at(src).to(self.mix.dtype)))
            case p.InnerGrad():
                env.append(self.inner_grad(step, at(step.src), norm, weights))
            case p.Within(context, body):
                with self.context(context):
                    self.steps(body, env, norm, weights)
            case p.Region():
                env += forms.call(self, step, env, weights)

    def library(self, op: str, x: torch.Tensor) -> torch.Tensor:
        """Run a recurrent module or a scripted function, without autocast: not all of them know it."""
        with torch.autocast("cpu", enabled=False):
            if op == "script":
                return self.script(x)  # type: ignore[misc]
            assert self.gru is not None
            return self.gru(x)[0]

    def note(self, inputs: dict[str, list[torch.Tensor]], loose: set[str]) -> None:
        """Remember what a region takes, by way, to tell later whether it was changed; ``loose`` is read live."""
        if self.engine.module is None:
            self.entered += [(x, x._version, way in loose) for way, xs in inputs.items() for x in xs]

    def hooked(self, x: torch.Tensor) -> torch.Tensor:
        """Pass a value through a hook that halves its gradient and counts its calls."""

        def hook(grad: torch.Tensor) -> torch.Tensor:
            # a gradient taken inside a region is taken again by its replay, and its hooks run again with it
            with self.counting:
                self.hook_calls += not getattr(self.inside, "depth", 0)
            return grad * 0.5

        out = x * 1.0
        if out.requires_grad:
            out.register_hook(hook)
        return out

    def inner_grad(
        self, step: p.InnerGrad, x: torch.Tensor, norm: nn.Module, weights: Tensors | None
    ) -> torch.Tensor:
        """Return the gradient of the step's body at ``x``."""
        with torch.enable_grad():
            if step.leaf or not x.requires_grad:
                x = x.detach().requires_grad_()
            env = [x]
            self.steps(step.body, env, norm, weights)
            total = env[-1].float().sum()
            if not total.requires_grad:
                return torch.zeros_like(x)
            options = {
                "retain_graph": step.retain_graph or step.create_graph,
                "create_graph": step.create_graph,
            }
            self.inside.depth = getattr(self.inside, "depth", 0) + 1
            try:
                (grad,) = torch.autograd.grad(total, x, allow_unused=True, **options)
            finally:
                self.inside.depth -= 1
        return torch.zeros_like(x) if grad is None else grad

    def context(self, name: str) -> AbstractContextManager[Any]:
        """Return the context manager called ``name``."""
        if name == "no_grad":
            return torch.no_grad()
        if name in _HOOKS:
            return torch.autograd.graph.saved_tensors_hooks(*_HOOKS[name])
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == "autocast")


def run(program: p.Program, engine: Engine) -> Outcome:
    """Run a program forward and backward; errors are kept in the outcome."""
    torch.manual_seed(program.seed)
    machine = Machine(program, engine)
    try:
        _run(machine)
    except Exception as error:
        machine.outcome.error = error
    machine.outcome.changed = _changed(machine)
    return machine.outcome


def _is_leaf(x: torch.Tensor) -> bool:
    base = x if x._base is None else x._base
    return base.requires_grad and base.is_leaf


def _changed(machine: Machine) -> str:
    changed = [loose for x, version, loose in machine.entered if x._version != version]
    return "no" if not changed else "live" if any(changed) else "owned"


def _run(machine: Machine) -> None:
    program, outcome = machine.program, machine.outcome
    runs: list[tuple[list[torch.Tensor], torch.Tensor]] = []
    for _ in range(program.passes):
        env = machine.forward()
        for i, x in enumerate(env):
            outcome.keep(f"value {i}", x)
        loss = sum(((x * machine.mix).double().sum() for x in env[2:]), torch.zeros((), dtype=torch.float64))
        runs.append((env, loss))
    outcome.keep("draw between forward and backward", torch.rand(2))
    runs = runs if program.backward_in_order else runs[::-1]
    if program.finish in ("threads", "no threads"):
        _each(machine, [loss for _, loss in runs if loss.requires_grad])
    else:
        for env, loss in runs:
            if loss.requires_grad:
                _finish(machine, env, loss)
    for i, x in enumerate(machine.leaves()):
        outcome.keep(f"grad of leaf {i}", x.grad)
    outcome.keep("batches seen by batch norm", machine.norm.num_batches_tracked)
    outcome.keep("running mean", machine.norm.running_mean)
    outcome.keep("calls of gradient hooks", torch.tensor(machine.hook_calls))
    outcome.keep("final generator state", torch.get_rng_state())
    outcome.keep("final state of the program's generator", machine.generator.get_state())


def _each(machine: Machine, losses: list[torch.Tensor]) -> None:
    """Each backward on a thread of its own, all at once, or here in turn; no gradient is added to another's."""

    def grads(loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad(loss, machine.leaves(), allow_unused=True)

    with ThreadPoolExecutor(2) as pool:
        found = pool.map(grads, losses) if machine.program.finish == "threads" else map(grads, losses)
        for i, some in enumerate(found):
            for j, x in enumerate(some):
                machine.outcome.keep(f"grad {j} of backward {i}", x)


def _finish(machine: Machine, env: list[torch.Tensor], loss: torch.Tensor) -> None:
    program, outcome, leaves = machine.program, machine.outcome, machine.leaves()
    some = [x for i, x in enumerate(leaves) if program.subset >> i & 1] or leaves[:1]

    def grad(output: torch.Tensor, wanted: list[torch.Tensor], **options: Any) -> list[torch.Tensor | None]:
        found = list(torch.autograd.grad(output, wanted, allow_unused=True, **options))
        for i, x in enumerate(found):
            outcome.keep(f"partial grad {i}", x)
        return found

    match program.finish:
        case "backward":
            loss.backward()
        case "backward twice":
            loss.backward(retain_graph=True)
            loss.backward()
        case "session":
            with machine.engine.session():
                loss.backward(retain_graph=True)
                loss.backward()
        case "subset then backward":
            grad(loss, some, retain_graph=True)
            loss.backward()
        case "each leaf":
            for x in leaves:
                grad(loss, [x], retain_graph=True)
        case "inputs":
            loss.backward(inputs=some)
        case "outputs one by one":
            for x in env[2:]:
                if x.requires_grad:
                    grad(x.double().sum(), leaves, retain_graph=True)
        case "double backward":
            first = grad(loss, leaves, create_graph=True)
            second = sum(((x * x).sum() for x in first if x is not None), torch.zeros(()))
            if second.requires_grad:
                grad(second, leaves)
