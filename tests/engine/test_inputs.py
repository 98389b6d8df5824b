"""Inputs of a region: every tensor that the call can name is owned by it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import distckpt as dc
from distckpt.errors import InputChanged

from .exact import Region, exact, leaf


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    scale: float = 2.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor


class Pair(NamedTuple):
    x: torch.Tensor
    scale: float


def work(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x).exp().sin()


# How the same tensor is handed to a region: (function, args, kwargs) from the tensor.
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
PLACES: dict[str, Callable[[torch.Tensor], Call]] = {
    "positional": lambda x: (work, (x,), {}),
    "keyword": lambda x: (work, (), {"x": x}),
    "list": lambda x: (lambda parts: work(parts[0]), ([x, 1],), {}),
    "tuple in keyword": lambda x: (lambda *, parts: work(parts[1]), (), {"parts": (1, x)}),
    "dict": lambda x: (lambda parts: work(parts["x"]), ({"x": x},), {}),
    "ordered dict": lambda x: (lambda p: work(p["x"]), (collections.OrderedDict(x=x),), {}),
    "named tuple": lambda x: (lambda pair: work(pair.x), (Pair(x, 1.0),), {}),
    "dataclass": lambda x: (lambda batch: work(batch.x), (Batch(x),), {}),
    "frozen dataclass": lambda x: (lambda batch: work(batch.x), (), {"batch": Frozen(x)}),
    "partial argument": lambda x: (functools.partial(work, x), (), {}),
    "partial keyword": lambda x: (functools.partial(work, x=x), (), {}),
    "partial as argument": lambda x: (lambda f: f(), (functools.partial(work, x),), {}),
    "deep": lambda x: (lambda a: work(a[0]["b"][0].x), ([{"b": (Batch(x),)}],), {}),
}
anywhere = pytest.mark.parametrize("place", PLACES)


@anywhere
def test_a_tensor_anywhere_in_the_call_gets_its_exact_gradient(place: str) -> None:
    def program(region: Region) -> Any:
        x = leaf(3, 4)
        fn, args, kwargs = PLACES[place](x)
        out = region(fn, *args, **kwargs)
        out.sum().backward()
        return out, x.grad

    counts = exact(program)
    assert (counts.regions, counts.replays) == (1, 1)


@anywhere
def test_an_in_place_change_of_an_input_anywhere_in_the_call_is_refused(place: str) -> None:
    x = leaf(3, 4)
    y = x * 1.0
    fn, args, kwargs = PLACES[place](y)
    out = dc.checkpoint(fn, *args, **kwargs)
    with torch.no_grad():
        y.mul_(2.0)
    with pytest.raises(InputChanged) as caught:
        out.sum().backward()
    assert caught.value.code == "DC111"
    assert "clone" in str(caught.value)


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("positional", "args[0]"),
        ("keyword", "kwargs[0]"),
        ("list", "args[0][0]"),
        ("partial argument", "function[1]"),
    ],
)
def test_the_refusal_names_the_place_of_the_changed_input(place: str, named: str) -> None:
    y = leaf(3) * 1.0
    fn, args, kwargs = PLACES[place](y)
    out = dc.checkpoint(fn, *args, **kwargs)
    y.detach().zero_()
    with pytest.raises(InputChanged) as caught:
        out.sum().backward()
    assert named in str(caught.value)


@anywhere
def test_outer_saved_tensor_hooks_see_an_input_anywhere_in_the_call(place: str) -> None:
    x = leaf(3, 4)
    seen: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        seen.append(t.data_ptr())
        return t

    y = x * 1.0
    fn, args, kwargs = PLACES[place](y)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = dc.checkpoint(fn, *args, **kwargs)
    assert seen == [y.data_ptr()]
    out.sum().backward()
    assert x.grad is not None


@anywhere
def test_an_input_offloaded_by_outer_hooks_leaves_the_device_copy(place: str) -> None:
    """With save_on_cpu-like hooks nothing of the region keeps the original tensor alive."""
    x = leaf(3, 4)
    y = x * 1.0
    want = torch.autograd.grad(work(y).sum(), x, retain_graph=True)[0]
    dead = weakref.ref(y)
    fn, args, kwargs = PLACES[place](y)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        out = dc.checkpoint(fn, *args, **kwargs)
    del fn, args, kwargs, y
    assert dead() is None
    out.sum().backward()
    assert torch.equal(x.grad, want)


def test_what_hooks_hand_out_where_the_input_was_is_not_taken_for_the_input() -> None:
    """Its memory is used again by the next tensor of that size, which is at a version of its own."""

    def unpack(t: torch.Tensor) -> torch.Tensor:
        return torch.zeros(t.shape).copy_(t)

    for size in (4, 64, 1024):
        x = leaf(size)
        for _ in range(4):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), unpack):
                out = dc.checkpoint(torch.sin, x * 2.0).sum()
            first, second = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
            assert torch.equal(first, second)


@anywhere
def test_an_input_is_gone_when_the_gradient_reaches_what_made_it(place: str) -> None:
    x = leaf(3, 4)
    y = x * 1.0
    ref = weakref.ref(y)
    fn, args, kwargs = PLACES[place](y)
    out = dc.checkpoint(fn, *args, **kwargs).sum()
    alive: list[bool] = []
    y.grad_fn.register_prehook(lambda grads: alive.append(ref() is not None))
    del fn, args, kwargs, y
    assert ref() is not None  # the region owns it until its replay
    out.backward()
    assert alive == [False]


@anywhere
def test_an_input_is_released_when_the_graph_is_dropped_without_backward(place: str) -> None:
    y = leaf(3, 4) * 1.0
    ref = weakref.ref(y)
    fn, args, kwargs = PLACES[place](y)
    out = dc.checkpoint(fn, *args, **kwargs)
    del fn, args, kwargs, y, out
    assert ref() is None


@anywhere
def test_an_input_of_an_inner_region_is_managed_by_the_outer_one(place: str) -> None:
    """What the inner region takes is a saved tensor of the outer region: recomputed, not kept."""
    kept: list[weakref.ref[torch.Tensor]] = []

    def outer(x: torch.Tensor) -> torch.Tensor:
        y = x * 3.0
        if not dc.is_recomputing():
            kept.append(weakref.ref(y))
        fn, args, kwargs = PLACES[place](y)
        return dc.checkpoint(fn, *args, **kwargs)

    x = leaf(3, 4)
    out = dc.checkpoint(outer, x)
    assert kept[0]() is None
    out.sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(work(x * 3.0).sum(), x)[0])


def test_a_list_that_the_region_appends_to_starts_each_replay_as_it_was() -> None:
    def grow(parts: list[torch.Tensor]) -> torch.Tensor:
        parts.append(parts[-1].sin())
        return torch.stack(parts).exp().sin()

    def program(region: Region) -> Any:
        x = leaf(4)
        parts = [x * 1.0]
        out = region(grow, parts)
        out.sum().backward()
        return out, x.grad, torch.tensor(len(parts))

    exact(program)


def test_a_dict_that_the_caller_clears_after_the_call_does_not_change_the_replay() -> None:
    def program(region: Region) -> Any:
        x = leaf(4)
        options = {"x": x, "scale": 2.0}
        out = region(lambda o: work(o["x"] * o["scale"]), options)
        options.clear()
        out.sum().backward()
        return out, x.grad

    exact(program)


def test_a_tensor_in_an_object_that_is_no_container_is_still_version_checked_where_it_is_saved() -> None:
    for hold in (lambda y: types.SimpleNamespace(x=y), lambda y: types.SimpleNamespace(x=[y])):
        y = leaf(4) * 1.0
        out = dc.checkpoint(lambda o: work(o.x[0] if isinstance(o.x, list) else o.x), hold(y))
        y.detach().zero_()
        with pytest.raises(dc.CheckpointError):
            out.sum().backward()


def test_the_same_tensor_twice_in_a_call_gets_the_sum_of_both_gradients() -> None:
    def program(region: Region) -> Any:
        x = leaf(4)
        out = region(lambda a, b, *, c: (a * b * c["c"]).sin(), x, x, c={"c": x})
        out.sum().backward()
        return out, x.grad

    exact(program)


def test_a_view_and_its_base_as_inputs_keep_their_gradients_apart() -> None:
    def program(region: Region) -> Any:
        x = leaf(4, 4)
        base = x * 1.0
        out = region(lambda a, b: a.sin() @ b.t().exp(), base, base[1:3])
        out.sum().backward()
        return out, x.grad

    exact(program)


def test_an_output_is_not_changed_by_what_happens_to_inputs_after_backward() -> None:
    x = leaf(4)
    out = dc.checkpoint(work, x)
    out.sum().backward()
    with torch.no_grad():
        x.zero_()
    assert not torch.equal(out, torch.zeros(4))


def test_a_tensor_subclass_input_arrives_as_itself_in_the_replay() -> None:
    class Tagged(torch.Tensor):
        pass

    kinds: list[type] = []

    def probe(t: torch.Tensor) -> torch.Tensor:
        kinds.append(type(t))
        return t.sin().exp()

    x = leaf(3)
    dc.checkpoint(probe, x.as_subclass(Tagged)).sum().backward()
    assert kinds == [Tagged, Tagged]
    assert x.grad is not None


def test_a_parameter_input_arrives_as_the_parameter_in_the_replay() -> None:
    seen: list[int] = []
    weight = torch.nn.Parameter(torch.ones(3))

    def probe(w: torch.Tensor) -> torch.Tensor:
        seen.append(id(w))
        return w.sin().exp()

    dc.checkpoint(probe, weight).sum().backward()
    assert seen == [id(weight)] * 2


@pytest.mark.parametrize("where", ["outer region", "hooks"])
def test_one_object_passed_several_times_comes_back_as_one_object(where: str) -> None:
    seen: list[tuple[bool, bool]] = []

    def fn(a: Any, b: Any, c: Any, d: Any, *, e: Any) -> Any:
        seen.append((a is b is e, c is d))
        c.append(a.sin())
        return (a * b).sin() * d[-1] * e

    def program(region: Region) -> Any:
        x = leaf(4)
        if where == "hooks":
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
                y, parts = x * 1.0, [x]
                out = region(fn, y, y, parts, parts, e=y)
        else:

            def outer(t: torch.Tensor) -> torch.Tensor:
                y, parts = t * 1.0, [t]
                return region(fn, y, y, parts, parts, e=y).sin()

            out = region(outer, x)
        out.sum().backward()
        return out, x.grad

    exact(program)
    assert len(seen) >= 3
    assert set(seen) == {(True, True)}


def test_self_attention_below_an_outer_region_takes_the_path_of_its_record() -> None:
    def program(region: Region) -> Any:
        torch.manual_seed(0)
        attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        x = leaf(2, 3, 8)

        def inner(t: torch.Tensor) -> torch.Tensor:
            y = t.sin()
            return region(attention, y, y, y)[0].sin()

        out = region(inner, x)
        out.sum().backward()
        return out, x.grad, *(p.grad for p in attention.parameters())

    exact(program)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("rebound", [False, True])
def test_a_list_that_holds_itself_is_no_endless_walk(hooked: bool, rebound: bool) -> None:
    def program(region: Region) -> Any:
        x = leaf(4)
        parts: list[Any] = [x]
        parts.append(parts)
        scale = 2.0

        def fn(p: list[Any]) -> torch.Tensor:
            return (p[1][0] * scale).sin().exp()

        with torch.autograd.graph.save_on_cpu() if hooked else contextlib.nullcontext():
            out = region(fn, parts)
        if rebound:
            scale = 3.0
        (grad,) = torch.autograd.grad(out.sum(), x)
        return out, grad

    exact(program)
