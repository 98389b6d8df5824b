"""The parts that need no ranks: limits, orders, and the two halves of a backward."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.pipelining import _backward

from distckpt._torch_dist import sharded_units
from distckpt.ranks.pipeline import unsafe
from distckpt.ranks.pipeline.schedule import Ahead, Order, gpipe, memory_budget, one_forward_one_backward
from distckpt.ranks.pipeline.stage import SplitBackward
from tests.ranks.jobs.pipeline import Part


@pytest.mark.parametrize(
    ("ahead", "amount"),
    [
        (1000, 1000),
        ("1.5 GiB", 3 * 2**29),
        ("800MB", 800_000_000),
        ("64 KiB", 2**16),
        ("7 B", 7),
        ("1 micro-batch", Ahead.ALL),
        (None, Ahead.NEWEST),
    ],
)
def test_an_amount_is_bytes_a_size_one_micro_batch_or_what_costs_no_memory(ahead: Any, amount: Any) -> None:
    assert memory_budget(True, ahead) == amount


def test_without_early_replay_nothing_is_ahead() -> None:
    assert memory_budget(False, None) == 0


def spelled(order: list[tuple[str, int]]) -> str:
    return " ".join(f"{what}{i}" for what, i in order)


def test_the_orders_of_schedules_without_a_table() -> None:
    assert spelled(gpipe(2, 3)) == "F0 F1 F2 B0 B1 B2"
    assert spelled(one_forward_one_backward(1, 3)) == "F0 B0 F1 B1 F2 B2"
    assert spelled(one_forward_one_backward(3, 4)) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert spelled(one_forward_one_backward(3, 2)) == "F0 F1 B0 B1"


def test_a_computation_out_of_order_ends_predictions_until_the_next_step() -> None:
    order = Order([("F", 0, 0), ("B", 0, 0), ("F", 0, 1), ("B", 0, 1)])
    order.arrive(("F", 0, 0))
    assert order.consumes_now(0, 0)
    assert order.next_gradient() == (0, 0)
    order.arrive(("F", 0, 1))
    assert order.next() is None
    order.arrive(("B", 0, 0))
    assert order.next_gradient() is None
    order.restart()
    assert order.next() == ("F", 0, 0)


def test_the_first_stage_uses_values_in_its_weight_half() -> None:
    order = Order([("I", 0, 0), ("W", 0, 0), ("I", 0, 1), ("F", 1, 1), ("I", 1, 0), ("F", 0, 2)])
    assert order.uses_values(0, 0)
    order.arrive(("I", 0, 0))
    order.arrive(("W", 0, 0))
    assert order.next_gradient() == (0, 1)
    assert not order.uses_values(0, 1)
    order.arrive(("I", 0, 1))
    order.arrive(("F", 1, 1))
    assert order.uses_values(1, 0)


def test_an_output_may_be_given_by_its_edge() -> None:
    model = Part()
    x = torch.randn(4, 16, requires_grad=True)
    out = model(x)
    by_tensor, by_edge = (
        SplitBackward([end], [x], model.parameters()) for end in (out, get_gradient_edge(out))
    )
    nodes = list(_below(out))
    assert [by_edge(node) for node in nodes] == [by_tensor(node) for node in nodes]
    assert {by_edge(node) for node in nodes} == {True, False}


def _below(out: torch.Tensor) -> list[Any]:
    found, todo = [], [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.append(node)
            todo += [edge[0] for edge in node.next_functions]
    return found


class Branches(nn.Module):
    """Weights of every kind: in a norm, computed from another weight, on a side branch, and unused."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Part()
        self.gate = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.side = nn.Parameter(torch.ones(16))
        self.unused = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) * self.gate(x).sigmoid() + self.side.exp()


@pytest.mark.parametrize("make", [Part, Branches])
def test_the_nodes_that_run_twice_are_those_torch_starts_from(make: Any) -> None:
    model = make()
    x = torch.randn(4, 16, requires_grad=True)
    out = model(x)
    again = SplitBackward([out], [x], model.parameters())
    nodes = set(_below(out))
    ours = {node for node in nodes if again(node)}
    _, groups = _backward.stage_backward_input([out], [torch.ones_like(out)], [x], model.parameters())
    assert ours == {node for group in groups for node in group["intermediates"]}
    assert ours != nodes


def test_a_weight_in_two_places_makes_every_node_between_them_run_again() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(4, 4, requires_grad=True)
    middle = (x @ weight).tanh()
    assert SplitBackward([middle @ weight], [x], [weight])(middle.grad_fn)
    assert not SplitBackward([middle], [x], [weight])(middle.grad_fn)


def region(fn: Any = None, tie: Any = None) -> Any:
    return SimpleNamespace(fn=fn, tie=tie)


def test_a_region_on_a_deferred_device_is_not_replayed_without_its_gradient() -> None:
    tie = SimpleNamespace(backend=SimpleNamespace(device_type="xla"))
    assert "xla would merge" in str(unsafe(region(tie=tie), {}))
    assert unsafe(region(), {}) is None


def test_a_function_is_not_replayed_early_where_units_are_sharded() -> None:
    part = Part()
    units: Any = {part.blocks[1]: ("blocks.1", True)}
    assert "a function that may call sharded units" in str(unsafe(region(lambda x: x), units))
    assert unsafe(region(part.blocks[0].forward), units) is None
    assert unsafe(region(part.blocks[1].forward), units) is None
    assert "calls the sharded unit 'blocks.1'" in str(unsafe(region(part.blocks[1]), units))
    assert "calls the sharded unit 'blocks.1'" in str(unsafe(region(part.forward), units))


def test_the_innermost_unit_around_a_region_must_be_gathered() -> None:
    part = Part()
    for inner in (True, False):
        units: Any = {part: ("", not inner), part.blocks[0]: ("blocks.0", inner)}
        assert (unsafe(region(part.blocks[0].norm.forward), units) is None) == inner
    assert "the whole stage" in str(unsafe(region(part.blocks[1].forward), {part: ("", False)}))


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_a_unit_of_fsdp1_never_counts_as_gathered(group: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.Sequential(
        FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")), nn.Linear(2, 2)
    )
    assert list(sharded_units(model).values()) == [("0", False)]


def test_the_next_weight_half_is_the_one_whose_gradients_are_added_next() -> None:
    actions = [("I", 1, 0), ("I", 1, 1), ("W", 1, 0), ("F", 1, 2)]
    order = Order([*actions, ("W", 1, 1), ("B", 1, 2)])
    assert order.next_weight_half(()) == (1, 0, False)
    assert order.next_weight_half({(1, 0)}) == (1, 1, False)
    assert order.next_weight_half({(1, 0), (1, 1)}) is None  # a whole backward is not divided
    order.arrive(("F", 1, 0))
    assert order.next_weight_half(()) is None  # nothing is known any more


def test_the_last_weight_half_of_a_stage_is_told_from_the_others() -> None:
    order = Order([("W", 1, 0), ("W", 2, 0), ("W", 1, 1)])
    assert order.next_weight_half(()) == (1, 0, False)
    assert order.next_weight_half({(1, 0)}) == (2, 0, True)
    assert order.next_weight_half({(1, 0), (2, 0)}) == (1, 1, True)
    assert order.next_weight_half({(1, 0), (2, 0), (1, 1)}) is None
