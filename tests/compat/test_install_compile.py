"""torch.compile while torch's names are ours: Dynamo still finds its operator, in and around a region."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as torchs
from torch import nn

import distckpt
from distckpt.compat.install import install
from distckpt.engine.stats import counters

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    torch._dynamo.reset()
    with install():
        yield
    torch._dynamo.reset()


def backend(graphs: list[str], name: str) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend

    def compile_it(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph.code)
        return lookup_backend(name)(graph, example)

    return compile_it


class Net(nn.Module):
    def __init__(self, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.call = call

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.second(x).sin(), 0.5).cos()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(self.block, self.first(x).sin()) * 2


def step(net: nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(4, 8, requires_grad=True)
    net.zero_grad()
    out = call(x)
    out.sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in net.parameters())]  # type: ignore[list-item]


def plainly(f: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return f(x)


def by_torchs_name(f: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torchs.checkpoint(f, x, use_reentrant=False)


def by_our_name(f: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return distckpt.checkpoint(f, x)


def selectively(f: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    contexts = functools.partial(torchs.create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    return torchs.checkpoint(f, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("call", [by_torchs_name, by_our_name, selectively])
def test_a_compiled_model_with_a_region_is_one_graph_and_exact(call: Callable[..., torch.Tensor]) -> None:
    net, graphs = Net(call), []
    compiled = torch.compile(net, backend=backend(graphs, "aot_eager"), fullgraph=True)
    expected = step(plain := Net(plainly), plain)
    for got, want in zip(step(net, compiled), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert len(graphs) == 1
    assert "tag_activation_checkpoint" in graphs[0]


def test_the_backward_graph_recomputes_what_the_region_did() -> None:
    backwards: list[str] = []

    def keep(graph: torch.fx.GraphModule, example: Any) -> Any:
        backwards.append(graph.code)
        return graph

    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    compiler = aot_autograd(
        fw_compiler=lambda graph, _: graph, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    net = Net(lambda f, x: torchs.checkpoint(f, x, use_reentrant=False))
    net.block = lambda x: torch.sigmoid(torch.mm(x, net.second.weight)).sin()  # type: ignore[method-assign]
    net(torch.randn(4, 8)).sum().backward()
    torch.compile(net, backend=compiler, fullgraph=True)(torch.randn(4, 8)).sum().backward()
    assert "aten.mm" in backwards[0]
    assert "sigmoid.default" in backwards[0]


@pytest.mark.parametrize("call", [by_torchs_name, by_our_name, selectively])
def test_while_aot_traces_it_is_torchs_engine_that_is_traced(call: Callable[..., torch.Tensor]) -> None:
    net = Net(call)
    before = counters.regions
    step(net, torch.compile(net, backend="aot_eager", fullgraph=True))
    assert counters.regions == before


def test_a_compiled_function_inside_a_region_is_exact() -> None:
    net = Net(by_torchs_name)
    plain = Net(plainly)
    expected = step(plain, plain)
    net.block = torch.compile(net.block, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
    for got, want in zip(step(net, net), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_code_compiled_before_is_still_right_after() -> None:
    net, graphs = Net(by_torchs_name), []
    compiled = torch.compile(net, backend=backend(graphs, "aot_eager"), fullgraph=True)
    first = step(net, compiled)
    with install():
        assert all(torch.equal(a, b) for a, b in zip(step(net, compiled), first, strict=True))
