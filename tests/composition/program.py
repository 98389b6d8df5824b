"""Small programs that a random draw can write down: the syntax, and nothing that runs.

A program works on numbered values. Every step reads some of them and appends its result; a number is taken
modulo the count of values there are, so that every drawn program is well formed and shrinks freely.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Unary:
    """One op on one value."""

    op: str
    src: int


@dataclass(frozen=True)
class Binary:
    """One op on two values."""

    op: str
    left: int
    right: int


@dataclass(frozen=True)
class Linear:
    """A linear layer with the program's parameter number ``param``."""

    src: int
    param: int


@dataclass(frozen=True)
class Draw:
    """An op that draws random numbers: from the CPU's generator, also seeded or put back, or from one of its own."""

    op: str
    src: int


@dataclass(frozen=True)
class Library:
    """A recurrent module, or code that TorchScript compiled and sees for the first time in this program."""

    op: str
    src: int


@dataclass(frozen=True)
class Unsafe:
    """A result changed in place through a view that autograd does not know to be one; parameter ``param``."""

    op: str
    src: int
    param: int


@dataclass(frozen=True)
class Caught:
    """An op that raises, after some that do not, in a body that catches the error and goes on."""

    op: str
    src: int


@dataclass(frozen=True)
class View:
    """An op whose result shares its input's storage, or is built from such views."""

    op: str
    src: int


@dataclass(frozen=True)
class InPlace:
    """An op in place: on a copy of a value where ``fresh``, else on one of the last two values itself."""

    op: str
    src: int
    fresh: bool


@dataclass(frozen=True)
class Custom:
    """A custom autograd function whose backward reads ``ctx.saved_tensors`` ``reads`` times."""

    src: int
    reads: int


@dataclass(frozen=True)
class GradHook:
    """A tensor hook that scales the gradient; the number of its calls is part of the outcome."""

    src: int


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation in training mode: changes its running statistics once per forward."""

    src: int


@dataclass(frozen=True)
class InnerGrad:
    """A gradient taken right here, of ``body`` with respect to a value; the gradient is the new value.

    ``leaf`` takes it with respect to a fresh leaf, else with respect to the value itself.
    """

    src: int
    body: tuple[Step, ...]
    create_graph: bool
    retain_graph: bool
    leaf: bool


@dataclass(frozen=True)
class Within:
    """Steps under a context: autocast, no autocast, no_grad or a user's saved-tensor hooks.

    The hooks copy and hand out the copy (``hooks``) or a new copy each time (``fresh hooks``), or hand the tensor
    through (``identity hooks``).
    """

    context: str
    body: tuple[Step, ...]


@dataclass(frozen=True)
class Options:
    """How a region is asked for. ``selective`` is None, a list name or a policy name."""

    early_stop: bool = True
    preserve_rng: bool = True
    determinism: str = "default"
    selective: str | None = None
    reentrant: bool = False
    debug: bool = False


@dataclass(frozen=True)
class Region:
    """One checkpointed call.

    ``inputs`` pairs a value with the way it is passed: arg, kwarg, list, partial, box (a dataclass), closure (a list
    that the function closes over), cell or global (a name that it reads). ``rebound`` gives those names another value
    right after the call. ``form`` is function, module, decorator, apply, loop (two lambdas over a loop's variables,
    the second on the result of the first) or functional (its parameters are swapped by ``functional_call`` around
    it); ``output`` is tensor, tuple, dict or input (an input is among the outputs).
    """

    body: tuple[Step, ...]
    inputs: tuple[tuple[int, str], ...]
    output: str
    form: str
    options: Options
    rebound: bool = False


Step = (
    Unary
    | Binary
    | Linear
    | Draw
    | Library
    | Unsafe
    | Caught
    | View
    | InPlace
    | Custom
    | GradHook
    | BatchNorm
    | InnerGrad
    | Within
    | Region
)


@dataclass(frozen=True)
class Program:
    """Steps over two inputs, how often they run before backward, and how gradients are taken (``finish``)."""

    body: tuple[Step, ...]
    finish: str
    subset: int
    passes: int
    backward_in_order: bool
    second_requires_grad: bool
    double: bool
    seed: int


def walk(
    steps: tuple[Step, ...], regions: tuple[Region, ...] = ()
) -> Iterator[tuple[Step, tuple[Region, ...]]]:
    """Yield every step with the regions around it, outermost first."""
    for step in steps:
        yield step, regions
        if isinstance(step, Region):
            yield from walk(step.body, (*regions, step))
        elif isinstance(step, InnerGrad | Within):
            yield from walk(step.body, regions)


def uses(body: tuple[Step, ...], kind: type, *ops: str) -> bool:
    """Say whether a body has a step of a kind, or one of its ``ops``, anywhere."""
    return any(isinstance(step, kind) and (not ops or step.op in ops) for step, _ in walk(body))


def draws_random(body: tuple[Step, ...]) -> bool:
    """Say whether a body draws random numbers anywhere."""
    return any(
        isinstance(step, Draw) or (isinstance(step, InPlace) and step.op == "dropout_")
        for step, _ in walk(body)
    )


def features(program: Program) -> set[str]:
    """Name what a program exercises; a word with ``in region`` counts only inside one."""
    found = {f"finish: {program.finish}"}
    if program.passes > 1:
        found.add("two forwards before backward")
    found.add("float64" if program.double else "float32")
    for step, regions in walk(program.body):
        if isinstance(step, Region):
            found |= _region_features(step, regions)
        elif regions:
            found |= _step_features(step)
            if isinstance(step, Draw | InPlace | InnerGrad) and any(r.options.selective for r in regions):
                found.add(f"{_step_name(step)} in selective region")
        elif isinstance(step, Within):
            found.add(f"{step.context} around")
    return found


def _step_name(step: Step) -> str:
    return {"Draw": "random draw", "InPlace": "in-place", "InnerGrad": "inner gradient"}[type(step).__name__]


def _step_features(step: Step) -> set[str]:
    if isinstance(step, Draw):
        return {f"draw in region: {step.op}", "random draw in region"}
    if isinstance(step, InPlace):
        return {"in-place in region", f"in-place in region: {'copy' if step.fresh else 'value'}"}
    if isinstance(step, Library | Unsafe | Caught):
        return {f"{type(step).__name__.lower()} in region: {step.op}"}
    if isinstance(step, Custom):
        return {f"saved tensors read {'once' if step.reads == 1 else 'twice'} in region"}
    if isinstance(step, InnerGrad):
        names = {"gradient inside region"}
        names |= {"gradient inside region, create_graph"} if step.create_graph else set()
        return names | ({"gradient inside region, retain_graph"} if step.retain_graph else set())
    if isinstance(step, Within):
        return {f"{step.context} in region"}
    plain = {View: "view", Linear: "parameter", GradHook: "gradient hook", BatchNorm: "batch norm"}
    return {f"{plain[type(step)]} in region"} if type(step) in plain else set()


def _region_features(step: Region, regions: tuple[Region, ...]) -> set[str]:
    options = step.options
    found = {"region", f"form: {step.form}", f"output: {step.output}", f"check: {options.determinism}"}
    found |= {f"input by {how}" for _, how in step.inputs}
    found |= {f"nested, depth {len(regions) + 1}"} if regions else set()
    ways = [how for _, how in step.inputs]
    found |= (
        {"names rebound after region"}
        if step.rebound and {"cell", "global", "closure"} & set(ways)
        else set()
    )
    found |= {"one value passed twice"} if len({src for src, _ in step.inputs}) < len(ways) else set()
    found.add(f"early stop {'on' if options.early_stop else 'off'}")
    found |= {f"selective: {options.selective}"} if options.selective else set()
    found |= {"reentrant"} if options.reentrant else {"non-reentrant"}
    found |= {"rng not preserved"} if not options.preserve_rng else set()
    found |= {"debug"} if options.debug else set()
    if options.reentrant and any(not region.options.reentrant for region in regions):
        found.add("reentrant inside non-reentrant")
    return found
