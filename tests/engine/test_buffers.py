"""Buffers that a forward changes change once, and a replay reads what its forward read."""

from __future__ import annotations

import contextlib
import functools
import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distckpt as dc
from distckpt.errors import BufferChanged, ParameterChanged

from .exact import Region, exact, leaf

bound_globally = nn.BatchNorm1d(4)


class Counter(nn.Module):
    """Counts its calls in a buffer, in place, and uses the count."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return (x * self.steps.clone()).sin()


class Replaced(Counter):
    """The same with a new tensor each time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps = self.steps + 1
        return (x * self.steps.clone()).sin()


class Large(Counter):
    """A buffer too large to be copied on suspicion."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(5000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return (x * self.steps[0].clone()).sin()


class Outer:
    """Not a module, but it holds one."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def state(module: nn.Module) -> list[torch.Tensor]:
    return [b.clone() for b in module.buffers()]


# A call of a module in every spelling that a region can be given.
SPELLINGS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "module": lambda m: m,
    "bound method": lambda m: m.forward,
    "bound __call__": lambda m: m.__call__,
    "lambda": lambda m: lambda x: m(x),
    "closure over a list": lambda m: (lambda layers: lambda x: layers[0](x))([m]),
    "closure over a method": lambda m: (lambda f: lambda x: f(x))(m.forward),
    "partial": lambda m: functools.partial(lambda layer, x: layer(x), m),
    "partial keyword": lambda m: functools.partial(lambda x, layer: layer(x), layer=m),
    "partial of module": lambda m: functools.partial(m),
    "sequential": lambda m: nn.Sequential(nn.Identity(), m),
    "nested closure": lambda m: (lambda g: lambda x: g(x))(lambda x: m(x)),
    "object that holds it": lambda m: Outer(m),
    "method of an object that holds it": lambda m: Outer(m).__call__,
    "default argument": lambda m: lambda x, layer=m: layer(x),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "batch norm with cumulative average": lambda: nn.BatchNorm1d(4, momentum=None),
    "counter": Counter,
    "replaced": Replaced,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", MODULES)
def test_a_buffer_changes_once_and_the_gradient_is_exact(kind: str, spelling: str) -> None:
    def program(region: Region) -> Any:
        module = MODULES[kind]()
        x = leaf(8, 4)
        for _ in range(2):
            region(SPELLINGS[spelling](module), x).sin().sum().backward()
        return x.grad, *state(module), *(p.grad for p in module.parameters())

    exact(program)


def test_a_module_passed_as_an_argument_changes_its_buffers_once() -> None:
    def program(region: Region) -> Any:
        module = Counter()
        x = leaf(4)
        region(lambda m, t: m(t), module, x).sum().backward()
        region(lambda t, *, m: m(t), x, m=module).sum().backward()
        return x.grad, *state(module)

    exact(program)


def test_a_module_read_as_a_global_changes_its_buffers_once() -> None:
    def program(region: Region) -> Any:
        bound_globally.reset_running_stats()
        x = leaf(8, 4)
        region(lambda t: bound_globally(t).sin(), x).sum().backward()
        return x.grad, *state(bound_globally)

    exact(program)


held_globally = Outer(Counter())


def helper(x: torch.Tensor) -> torch.Tensor:
    return bound_globally(x)


@pytest.mark.parametrize(
    ("call", "module"),
    [
        (lambda t: (lambda u: bound_globally(u))(t), bound_globally),
        (lambda t: helper(t), bound_globally),
        (lambda t: held_globally.layer(t), held_globally.layer),
    ],
    ids=["inner function", "helper of the same file", "object that holds it"],
)
def test_a_global_module_reached_indirectly_changes_its_buffers_once(call: Any, module: nn.Module) -> None:
    def program(region: Region) -> Any:
        for b in module.buffers():
            b.detach().zero_()
        x = leaf(8, 4)
        region(lambda t: call(t).sin(), x).sum().backward()
        return x.grad, *state(module)

    exact(program)


def test_several_calls_of_one_module_before_backward_replay_with_their_own_counts() -> None:
    def program(region: Region) -> Any:
        module = Counter()
        x = leaf(4)
        total = sum(region(module, x) for _ in range(3))
        total.sum().backward()
        return total, x.grad, *state(module)

    exact(program)


def test_several_calls_in_one_region_count_each() -> None:
    def program(region: Region) -> Any:
        module = Counter()
        x = leaf(4)
        out = region(lambda t: module(module(t)), x)
        out.sum().backward()
        return out, x.grad, *state(module)

    exact(program)


def test_several_backwards_of_one_region_leave_the_buffer_alone() -> None:
    def program(region: Region) -> Any:
        module = Counter()
        x = leaf(4)
        out = region(module, x).sum()
        grads = [torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(3)]
        return (*grads, *state(module))

    exact(program)


def test_nested_regions_over_one_module_count_once_each() -> None:
    def program(region: Region) -> Any:
        module = nn.Sequential(Counter(), nn.BatchNorm1d(4), Counter())
        x = leaf(8, 4)
        out = region(lambda t: region(module, t).exp().sin(), x)
        out.sum().backward()
        return out, x.grad, *state(module)

    exact(program)


class Saved(Counter):
    """Autograd saves the buffer itself, after the change or before it."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.late:
            return (x * self.steps).sin() + self.steps.add_(1.0)
        self.steps += 1
        return (x * self.steps).sin()


def test_a_saved_buffer_has_the_value_of_its_own_forward() -> None:
    def program(region: Region) -> Any:
        module = Saved(late=False)
        x = leaf(4)
        region(module, x).sum().backward()
        region(module, x).sum().backward()
        return x.grad, *state(module)

    exact(program)


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_saved_buffer_that_changes_again_has_the_value_of_its_own_forward(
    late: bool, early_stop: bool
) -> None:
    """Plain autograd refuses this program; a region may, or it is right."""
    module = Saved(late)
    x = leaf(4)
    outs = [dc.checkpoint(module, x, early_stop=early_stop) for _ in range(3)]
    for i, out in enumerate(outs):
        try:
            (grad,) = torch.autograd.grad(out.sum(), x)
        except ParameterChanged:
            continue
        count = float(i if late else i + 1)
        assert torch.equal(grad, torch.autograd.grad((x * count).sin().sum(), x)[0])


def test_a_buffer_that_changes_after_the_forward_keeps_its_new_value() -> None:
    def program(region: Region) -> Any:
        module = Counter()
        x = leaf(4)
        out = region(module, x)
        module.steps.fill_(100.0)
        out.sum().backward()
        return out, x.grad, *state(module)

    exact(program)


def test_a_buffer_that_another_region_needs_keeps_its_version() -> None:
    """The replay writes old values into the live buffer; autograd must not see that as an in-place change."""

    def program(region: Region) -> Any:
        module = Counter()
        x = leaf(4)
        y = region(module, x)
        z = x * module.steps  # saved by autograd outside the region
        (y + z).sum().backward()
        return x.grad, *state(module)

    exact(program)


def test_a_large_buffer_that_changes_is_refused_once_and_exact_from_then_on() -> None:
    module = Large()
    x = leaf(4)
    with pytest.raises(BufferChanged) as caught:
        dc.checkpoint(module, x)
    assert caught.value.code == "DC110"
    assert "again" in str(caught.value)

    def program(region: Region) -> Any:
        module.steps.zero_()
        x = leaf(4)
        region(module, x).sum().backward()
        return x.grad, module.steps.clone()

    exact(program)


def test_eval_mode_changes_nothing_and_keeps_no_copy() -> None:
    module = nn.BatchNorm1d(4).eval()

    def program(region: Region) -> Any:
        x = leaf(8, 4)
        region(module, x).sum().backward()
        return x.grad, *state(module)

    exact(program)


def test_a_buffer_added_between_two_calls_is_seen() -> None:
    def program(region: Region) -> Any:
        module = nn.Sequential(Counter())
        x = leaf(4)
        region(module, x).sum().backward()
        module.append(Counter())
        region(module, x).sum().backward()
        return x.grad, *state(module)

    exact(program)


def test_the_buffer_has_todays_value_after_a_replay_that_failed() -> None:
    class Failing(Counter):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            if dc.is_recomputing():
                raise KeyError("only in the replay")
            return x.sin()

    module = Failing()
    out = dc.checkpoint(module, leaf(4))
    with pytest.raises(KeyError):
        out.sum().backward()
    assert module.steps.item() == 1.0


def test_a_region_can_ask_whether_it_recomputes_before_changing_other_state() -> None:
    tokens = 0

    def fn(t: torch.Tensor) -> torch.Tensor:
        nonlocal tokens
        if not dc.is_recomputing():
            tokens += t.numel()
        return t.sin().exp()

    x = leaf(4)
    out = dc.checkpoint(lambda t: dc.checkpoint(fn, t).sin(), x).sum()
    out.backward(retain_graph=True)
    out.backward()
    assert tokens == 4


def test_a_module_two_objects_deep_changes_its_buffers_once() -> None:
    def program(region: Region) -> Any:
        trainer = types.SimpleNamespace(ctx=types.SimpleNamespace(model=nn.BatchNorm1d(4)))
        x = leaf(8, 4)
        region(lambda t: trainer.ctx.model(t).sin(), x).sum().backward()
        region(lambda t, owner: owner.ctx.model(t).sin(), x, trainer).sum().backward()
        return x.grad, *state(trainer.ctx.model)

    exact(program)


def normalised(t: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(t, mean, var, training=True).sin()


STATISTICS: dict[str, Callable[..., torch.Tensor]] = {
    "positional": lambda region, x, m, v: region(normalised, x, m, v),
    "keyword": lambda region, x, m, v: region(normalised, x, mean=m, var=v),
    "in a tuple": lambda region, x, m, v: region(lambda t, s: normalised(t, *s), x, (m, v)),
    "in a partial": lambda region, x, m, v: region(functools.partial(normalised, mean=m, var=v), x),
    "in a closure": lambda region, x, m, v: region(lambda t: normalised(t, m, v), x),
    "the operator itself": lambda region, x, m, v: region(F.batch_norm, x, m, v, None, None, True),
}


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("place", STATISTICS)
def test_statistics_that_a_function_normalises_with_itself_change_once(place: str, hooked: bool) -> None:
    def program(region: Region) -> Any:
        mean, var = torch.zeros(4), torch.ones(4)
        x = leaf(8, 4)
        with torch.autograd.graph.save_on_cpu() if hooked else contextlib.nullcontext():
            outs = [STATISTICS[place](region, x, mean, var) for _ in range(2)]
        grads = [torch.autograd.grad(out.exp().sum(), x, retain_graph=True)[0] for out in outs * 2]
        return [*outs, *grads, mean, var]

    exact(program)


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_a_saved_buffer_that_the_region_then_replaces_keeps_its_value(writes: bool, steps: int) -> None:
    class Decayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.full((4,), 2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if writes:
                self.scale.add_(0.25)
            y = (x * self.scale).sin()
            self.scale = self.scale * 0.5
            return y

    def program(region: Region) -> list[torch.Tensor | None]:
        block, x = Decayed(), leaf(4)
        outs = [region(block, x) for _ in range(steps)]
        sum(outs).sum().backward()  # type: ignore[union-attr]
        return [x.grad, block.scale]

    exact(program)


def test_a_model_whose_modules_know_their_parent_is_freed() -> None:
    class Child(nn.Linear):
        parent: list[nn.Module]

    model = nn.Sequential(Child(4, 4))
    model[0].parent = [model]  # type: ignore[union-attr, assignment]
    alive = weakref.ref(model)
    dc.checkpoint(model, leaf(2, 4)).sum().backward()
    del model
    gc.collect()
    assert alive() is None
