"""A region owns what its functions read by name: names may be rebound, numbers and tensors alike, before the replay.

Every program runs twice: inside a function, where its names are cells, and as a script, where they are globals.
"""

from __future__ import annotations

import functools
import gc
import textwrap
import threading
import types
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import distckpt as dc
import distckpt.compat
from distckpt.errors import InputChanged

from .exact import counted, leaf, plain, same_bits

# Each leaves `result` behind: tensors. `region(fn, *args)` is the call that may be a region.
PROGRAMS = {
    "a loop of lambdas over layers": """
        x = leaf(2, 4); h = x * 1
        for layer in layers:
            h = region(lambda t: torch.tanh(layer(t)), h)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "the same function in every round": """
        x = leaf(2, 4); h = x * 1
        def block(t):
            return torch.tanh(layer(t))
        for layer in layers:
            h = region(block, h)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "an input rebound to the result": """
        x = start = leaf(2, 4)
        for l in layers:
            x = region(lambda l=l: torch.tanh(l(x)))
        x.sum().backward()
        result = [start.grad, *grads()]
    """,
    "a number": """
        x = leaf(2, 4)
        s = 2.0
        y = region(lambda t: (t * s).sin(), x)
        s = 5.0
        y.sum().backward()
        result = [x.grad]
    """,
    "a tensor": """
        x, w = leaf(4), leaf(4, seed=2)
        first = w
        y = region(lambda t: (t * w).sin(), x)
        w = torch.zeros(4)
        y.sum().backward()
        result = [x.grad, first.grad]
    """,
    "a function": """
        x = leaf(4)
        act = torch.sin
        y = region(lambda t: act(t).exp().sin(), x)
        act = torch.cos
        y.sum().backward()
        result = [x.grad]
    """,
    "a module that is a name": """
        x = leaf(4)
        lib = torch
        y = region(lambda t: lib.sin(t).exp(), x)
        lib = None
        y.sum().backward()
        result = [x.grad]
    """,
    "a name that is deleted": """
        x = leaf(4)
        k = 3.0
        y = region(lambda t: (t * k).sin(), x)
        del k
        y.sum().backward()
        result = [x.grad]
    """,
    "a helper reads it": """
        def block(t):
            return torch.tanh(layer(t))
        x = leaf(2, 4); h = x * 1
        for layer in layers:
            h = region(lambda t: block(t) + t, h)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "a helper of a helper reads it": """
        def inner(t):
            return torch.tanh(layer(t))
        def outer(t):
            return inner(t) * 2
        x = leaf(2, 4); h = x * 1
        for layer in layers:
            h = region(lambda t: outer(t) + t, h)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "a partial holds the function": """
        def block(s, t):
            return torch.tanh(layer(t)) * s
        x = leaf(2, 4); h = x * 1
        for layer in layers:
            h = region(functools.partial(block, 2.0), h)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "an argument holds the function": """
        def block(t):
            return torch.tanh(layer(t))
        x = leaf(2, 4); h = x * 1
        for layer in layers:
            h = region(lambda f, t: f["list"][0](t), {"list": [block]}, h)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "a function that calls itself": """
        def again(t, n):
            return torch.tanh(layer(t)) if n == 0 else again(torch.sin(t * n), n - 1)
        x = leaf(2, 4); h = x * 1
        for layer in layers:
            h = region(again, h, 2)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "functions that call each other": """
        def a(t, n):
            return b(t.sin(), n)
        def b(t, n):
            return torch.tanh(layer(t)) if n == 0 else a(t * n, n - 1)
        x = leaf(2, 4); h = x * 1
        for layer in layers:
            h = region(a, h, 2)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "a decorated function": """
        def twice(f):
            @functools.wraps(f)
            def wrapper(*args):
                return f(f(*args))
            return wrapper
        @twice
        def block(t):
            return torch.tanh(layer(t))
        x = leaf(2, 4); h = x * 1
        for layer in layers:
            h = region(block, h)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "a comprehension reads it": """
        x = leaf(2, 4); h = x * 1
        for layer in layers:
            h = region(lambda t: sum([torch.tanh(layer(t) * i) for i in range(3)]), h)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "a region inside a region": """
        x = leaf(2, 4); h = x * 1
        for layer in layers:
            h = region(lambda t: region(lambda u: torch.tanh(layer(u)), t.sin()).cos(), h)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "a method of an object": """
        class Trainer:
            def step(self, t):
                return torch.tanh(layer(t))
        trainer = Trainer()
        x = leaf(2, 4); h = x * 1
        for layer in layers:
            h = region(trainer.step, h)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "a keyword default": """
        x = leaf(2, 4); h = x * 1
        for layer in layers:
            h = region(lambda t, *, l=layer, s=2.0: torch.tanh(l(layer(t))) * s, h)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "a class in the function reads it": """
        x = leaf(2, 4); h = x * 1
        def block(t):
            class Body:
                chosen = layer
            return torch.tanh(Body.chosen(t))
        for layer in layers:
            h = region(block, h)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "one name is assigned, another rebound": """
        x = leaf(2, 4); h = x * 1
        calls = 0
        def block(t):
            SCOPE calls
            calls += not dc.is_recomputing()
            return torch.tanh(layer(t))
        for layer in layers:
            h = region(block, h)
        h.sum().backward()
        result = [x.grad, *grads(), torch.tensor(calls)]
    """,
    "a region made by decoration": """
        x = leaf(2, 4); h = x * 1
        for layer in layers:
            @decorated
            def step(t):
                return torch.tanh(layer(t))
            h = region(lambda t: step(t).sin(), h)
        h.sum().backward()
        result = [x.grad, *grads()]
    """,
    "the last value that nobody rebinds": """
        x = leaf(2, 4)
        s, layer = 2.0, layers[0]
        def block(t):
            return torch.tanh(layer(t)) * s
        y = region(block, x)
        y.sum().backward()
        result = [x.grad, *grads()]
    """,
}


def run(program: str, as_script: bool, region: Any) -> list[Any]:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(4)]

    def grads() -> list[Any]:
        return [p.grad for layer in layers for p in layer.parameters()]

    given = {"torch": torch, "dc": dc, "functools": functools, "leaf": leaf}
    given |= {"layers": layers, "grads": grads, "region": region}
    given["decorated"] = (lambda fn: fn) if region is plain else dc.checkpoint()
    source = textwrap.dedent(PROGRAMS[program]).replace("SCOPE", "global" if as_script else "nonlocal")
    if as_script:
        space: dict[str, Any] = {"__name__": "__main__", **given}
        exec(source, space)
        return space["result"]
    space = {}
    exec(f"def program({', '.join(given)}):\n{textwrap.indent(source, '    ')}\n    return result", space)
    return space["program"](**given)


@pytest.mark.parametrize("as_script", [False, True], ids=["in a function", "as a script"])
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("options", [{}, {"early_stop": False}, {"determinism_check": "bitwise"}], ids=str)
def test_a_name_rebound_after_the_region_does_not_reach_its_replay(
    program: str, as_script: bool, options: dict[str, Any]
) -> None:
    want = run(program, as_script, plain)
    found, counts = counted(lambda: run(program, as_script, functools.partial(dc.checkpoint, **options)))
    assert counts.replays >= 1
    assert list(map(same_bits, want, found)) == [True] * len(want)


@pytest.mark.parametrize("as_script", [False, True], ids=["in a function", "as a script"])
def test_compat_reads_a_name_at_the_replay_as_torch_does(as_script: bool) -> None:
    checkpoint = functools.partial(distckpt.compat.checkpoint, use_reentrant=False)
    theirs = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)  # type: ignore[attr-defined]
    found, want = run("a number", as_script, checkpoint), run("a number", as_script, theirs)
    assert same_bits(found[0], want[0])
    assert not same_bits(found[0], run("a number", as_script, plain)[0])


def test_a_tensor_rebound_by_name_is_owned_until_the_graph_is_gone() -> None:
    x, w = leaf(4), torch.ones(4)
    ref = weakref.ref(w)
    out = dc.checkpoint(lambda t: (t + w).sin(), x)
    w = None
    assert ref() is not None
    out.sum().backward()
    del out
    assert ref() is None


@pytest.mark.parametrize("place", ["cell", "default", "keyword default", "cell of a cell", "partial"])
def test_an_in_place_change_of_a_captured_tensor_that_was_only_read_is_refused(place: str) -> None:
    w = torch.ones(4)
    reads = lambda t: (t + w).sin()  # noqa: E731
    fn = {
        "cell": reads,
        "default": lambda t, w=w: (t + w).sin(),
        "keyword default": lambda t, *, w=w: (t + w).sin(),
        "cell of a cell": lambda t: reads(t) * 2,
        "partial": functools.partial(lambda w, t: (t + w).sin(), w),
    }[place]
    out = dc.checkpoint(fn, leaf(4))
    w.add_(1.0)
    with pytest.raises(InputChanged) as caught:
        out.sum().backward()
    assert caught.value.code == "DC111"


def test_the_refusal_names_the_captured_tensor() -> None:
    weights = torch.ones(4)
    out = dc.checkpoint(lambda t: (t + weights).sin(), leaf(4))
    weights.zero_()
    with pytest.raises(InputChanged, match="weights"):
        out.sum().backward()


def test_a_name_that_the_function_assigns_stays_live() -> None:
    calls, scale = 0, 2.0

    def fn(t: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return (t * scale).sin()

    x = leaf(4)
    out = dc.checkpoint(fn, x)
    scale = 3.0
    out.sum().backward()
    assert calls == 2
    assert same_bits(x.grad, torch.autograd.grad((x * 2.0).sin().sum(), x)[0])


def test_a_name_that_a_function_in_a_cell_assigns_stays_live_for_all_of_them() -> None:
    calls: int = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    seen: list[tuple[int, int]] = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        seen.append((count(), calls))
        return t.sin().exp()

    dc.checkpoint(fn, leaf(4)).sum().backward()
    assert seen == [(1, 1), (2, 2)]


def test_what_nobody_rebinds_is_replayed_by_the_very_function() -> None:
    callers: list[Any] = []
    layer = nn.Linear(4, 4)

    def fn(t: torch.Tensor) -> torch.Tensor:
        callers.append(fn)
        return layer(t).sin()

    dc.checkpoint(fn, leaf(4)).sum().backward()
    assert callers == [fn, fn]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_parameter_passed_or_captured_is_the_same_object_in_the_replay(hooked: bool, nested: bool) -> None:
    weight, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    frozen = nn.Parameter(torch.ones(4), requires_grad=False)
    seen: list[list[int]] = []

    def fn(t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        seen.append([id(w), id(other), id(frozen)])
        return (t * w * other + frozen).sin()

    x = leaf(4)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t)
    with hooks if hooked else torch.enable_grad():
        if nested:
            out = dc.checkpoint(lambda t: dc.checkpoint(fn, t.sin(), weight).cos(), x)
        else:
            out = dc.checkpoint(fn, x, weight)
    out.sum().backward()
    assert len(seen) == (3 if nested else 2)
    assert all(ids == [id(weight), id(other), id(frozen)] for ids in seen)


@pytest.mark.parametrize("place", ["positional", "keyword", "list", "captured", "twice"])
def test_an_inference_tensor_is_the_same_object_in_the_replay(place: str) -> None:
    with torch.inference_mode():
        table = torch.ones(4) * 3
    x = leaf(4)
    if place == "positional":
        out = dc.checkpoint(lambda t, w: (t + w).sin(), x, table)
    elif place == "keyword":
        out = dc.checkpoint(lambda t, w: (t + w).sin(), x, w=table)
    elif place == "list":
        out = dc.checkpoint(lambda t, w: (t + w[0]).sin(), x, [table])
    elif place == "twice":
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            out = dc.checkpoint(lambda t, a, b: (t + a).sin() + b, x, table, table)
    else:
        out = dc.checkpoint(lambda t: (t + table).sin(), x)
    out.sum().backward()
    assert same_bits(x.grad, torch.autograd.grad((x + 3.0).sin().sum(), x)[0])


def test_a_region_with_a_function_that_calls_itself_dies_by_reference_count() -> None:
    from distckpt.engine.record import observe

    regions: list[weakref.ref[Any]] = []

    def again(t: torch.Tensor, n: int) -> torch.Tensor:
        return t.sin() if n == 0 else again(t.exp(), n - 1)

    gc.disable()
    observe(lambda region, call: regions.append(weakref.ref(region)))
    try:
        out = dc.checkpoint(again, leaf(4), 2)
        out.sum().backward()
        del out
        assert [region() for region in regions] == [None]
    finally:
        observe(None)
        gc.enable()


def test_replays_on_several_threads_each_have_the_names_of_their_record() -> None:
    scope: dict[str, Any] = {"dc": dc, "__name__": "__main__"}
    exec("def fn(t):\n    return (t * s).sin()", scope)
    xs, outs = [], []
    for scope["s"] in (1.0, 2.0, 3.0, 4.0):
        xs.append(leaf(4))
        outs.append(dc.checkpoint(scope["fn"], xs[-1]).sum())
    threads = [threading.Thread(target=out.backward) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for s, x in zip((1.0, 2.0, 3.0, 4.0), xs, strict=True):
        assert same_bits(x.grad, torch.autograd.grad((x * s).sin().sum(), x)[0])
    assert scope["s"] == 4.0


def test_a_function_attribute_is_shared_with_the_function_built_anew() -> None:
    scale = 2.0

    def fn(t: torch.Tensor) -> torch.Tensor:
        return (t * scale).sin()

    fn.calls = 0  # type: ignore[attr-defined]

    def call(t: torch.Tensor) -> torch.Tensor:
        fn.calls += 1  # type: ignore[attr-defined]
        return fn(t)

    out = dc.checkpoint(call, leaf(4))
    scale = 3.0
    out.sum().backward()
    assert fn.calls == 2  # type: ignore[attr-defined]


def test_names_that_torchs_own_functions_read_are_torchs_matter() -> None:
    from distckpt.engine import closure
    from distckpt.engine.inputs import Scan

    kept = closure.capture(nn.functional.softmax, Scan())
    assert kept is None or not kept[0].names.globals


def test_a_captured_tensor_under_offloading_hooks_that_is_rebound_is_exact() -> None:
    x, w = leaf(4), leaf(4, seed=2) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        out = dc.checkpoint(lambda t: (t * w).sin() + w, x)
    w = torch.zeros(4)
    out.sum().backward()
    y = leaf(4, seed=2) * 1.0
    assert same_bits(x.grad, torch.autograd.grad((x * y).sin().sum(), x)[0])


@pytest.mark.parametrize("guarded", [True, False])
def test_a_write_into_a_captured_tensor_is_refused_and_into_an_attribute_is_exact(guarded: bool) -> None:
    total = torch.zeros(4)
    metrics = types.SimpleNamespace(total=torch.zeros(4))

    def captured(t: torch.Tensor) -> torch.Tensor:
        if not guarded or not dc.is_recomputing():
            total.add_(t.detach())
        return t.sin().exp()

    def attribute(t: torch.Tensor) -> torch.Tensor:
        if not dc.is_recomputing():
            metrics.total.add_(t.detach())
        return t.sin().exp()

    x = leaf(4)
    with pytest.raises(InputChanged):
        dc.checkpoint(captured, x).sum().backward()
    dc.checkpoint(attribute, x).sum().backward()
    assert torch.equal(metrics.total, x.detach())
