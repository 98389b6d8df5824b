"""The seam for inputs that are kept in another form: ``partition=`` with a stand-in for many ranks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import distckpt as dc
from distckpt.engine.inputs import Packed, own
from distckpt.errors import BadOption

from .exact import Region, exact, leaf


class Bytes:
    """Keeps every input as a list of numbers; counts what goes in and what comes out."""

    def __init__(self) -> None:
        self.kept = self.made = 0

    def own(self, fn: Any, args: Any, kwargs: Any) -> Any:
        return own(fn, self._keep), [own(a, self._keep) for a in args], own(kwargs, self._keep) or None

    def _keep(self, t: torch.Tensor) -> Packed:
        self.kept += 1
        values, dtype, grad = t.detach().double().tolist(), t.dtype, t.requires_grad

        def rebuild(parts: list[Any]) -> torch.Tensor:
            self.made += 1
            return torch.tensor(values, dtype=dtype).requires_grad_(grad)

        return Packed([], rebuild)


def fn(scale: torch.Tensor, a: Any, *, key: Any) -> torch.Tensor:
    return torch.nn.functional.dropout((scale * a[0] * a[1]["t"]).sin(), 0.5) * key


def test_every_input_goes_through_the_partition_and_back_for_each_replay() -> None:
    partition = Bytes()

    def program(region: Region) -> Any:
        xs = [leaf(30, seed=i) for i in range(4)]
        y = region(functools.partial(fn, xs[0]), (xs[1], {"t": xs[2]}), key=xs[3]).sum()
        first = torch.autograd.grad(y, xs, retain_graph=True)
        return [y, *first, *torch.autograd.grad(y, xs)]

    assert exact(program, partition=partition).replays == 2
    assert (partition.kept, partition.made) == (4, 8)


def test_an_input_that_requires_no_gradient_requires_none_in_the_replay() -> None:
    seen = []

    def program(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append((a.requires_grad, b.requires_grad, b.dtype))
        return (a * b).sin()

    dc.checkpoint(program, leaf(3), torch.arange(3), partition=Bytes()).sum().backward()
    assert seen == [(True, False, torch.int64)] * 2


def test_modules_take_the_option() -> None:
    partition = Bytes()
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    x = leaf(2, 3)
    plain = torch.autograd.grad(model(x).sum(), x)
    with dc.apply(model, "*", partition=partition):
        assert torch.equal(torch.autograd.grad(model(x).sum(), x)[0], plain[0])
    assert (partition.kept, partition.made) == (2, 2)


@pytest.mark.parametrize("surface", ["call", "decorator", "apply"])
def test_what_is_no_partition_is_refused(surface: str) -> None:
    model = torch.nn.Linear(3, 3)
    wrong: Any = "tp"
    with pytest.raises(BadOption, match=r"partition is what coord\.partition"):
        if surface == "call":
            dc.checkpoint(model, leaf(2, 3), partition=wrong)
        elif surface == "decorator":
            dc.checkpoint(partition=wrong)
        else:
            dc.apply(model, "", partition=wrong)
    assert "forward" not in model.__dict__


def test_a_reentrant_region_refuses_the_option() -> None:
    with pytest.raises(BadOption, match="cannot honour partition"):
        dc.checkpoint(torch.sin, leaf(3), use_reentrant=True, partition=Bytes())


@pytest.mark.filterwarnings("ignore")  # of Dynamo, whose warnings differ from version to version
def test_under_compile_a_partitioned_region_breaks_the_graph_and_runs_eagerly() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return dc.checkpoint(torch.sin, x * 2, partition=partition) + 1

    torch.compiler.reset()
    partition, x = Bytes(), leaf(3)
    (found,) = torch.autograd.grad(torch.compile(step, backend="eager")(x).sum(), x)
    assert torch.equal(found, 2 * (x * 2).cos())
    assert (partition.kept, partition.made) == (1, 1)


def test_a_whole_compiled_graph_refuses_a_partitioned_region_rather_than_keep_its_inputs_whole() -> None:
    from torch._dynamo.exc import Unsupported

    torch.compiler.reset()
    partition = Bytes()
    compiled = torch.compile(
        lambda x: dc.checkpoint(torch.sin, x, partition=partition), backend="eager", fullgraph=True
    )
    with pytest.raises(Unsupported):
        compiled(leaf(3))
    assert partition.kept == 0
