"""dc.apply and torch.compile: around the model, and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from distckpt.engine.stats import counters
from distckpt.modules import apply
from tests.modules.models import Model, same, step

# Dynamo warns about its own doings, such as reading .grad of a non-leaf.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def backend(graphs: list[str]) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend

    def compile_it(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph.code)
        return lookup_backend("aot_eager")(graph, example)

    return compile_it


def test_a_compiled_model_has_one_graph_with_torchs_operator_for_each_region() -> None:
    model, graphs = Model(), []
    apply(model, "layers.*")
    compiled = torch.compile(model, backend=backend(graphs), fullgraph=True)
    assert same(step(model, compiled), step(Model()))
    assert len(graphs) == 1
    assert graphs[0].count("tag_activation_checkpoint") >= 3


def test_layers_that_compile_one_by_one_share_one_graph() -> None:
    model, graphs = Model(layers=12), []
    apply(model, "layers.*")
    expected = step(Model(layers=12))
    compiler = backend(graphs)
    for layer in model.layers:
        layer.compile(backend=compiler, fullgraph=True)
    assert same(step(model), expected)
    assert len(graphs) == 1
    assert "tag_activation_checkpoint" in graphs[0]


def test_removing_the_regions_compiles_again_without_them() -> None:
    model, graphs = Model(), []
    handle = apply(model, "layers.*")
    compiled = torch.compile(model, backend=backend(graphs), fullgraph=True)
    step(model, compiled)
    handle.remove()
    assert same(step(model, compiled)[0:1], step(Model())[0:1])
    assert "tag_activation_checkpoint" not in graphs[-1]


def test_a_graph_break_inside_falls_back_to_our_engine() -> None:
    class Breaking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.sin()
            torch._dynamo.graph_break()
            return nn.functional.dropout(x, 0.5).cos()

    plain = nn.Sequential(nn.Linear(8, 8), Breaking())
    model = nn.Sequential(plain[0], Breaking())
    apply(model, "1")
    regions_before = counters.regions
    compiled = torch.compile(model, backend="aot_eager")
    assert same(step(model, compiled), step(plain))
    assert counters.regions == regions_before + 1


def test_regions_then_compiled_layers_then_fsdp2_is_exact(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        results, graphs = [], []
        compiler = backend(graphs)
        for regions in (False, True):
            model = Model()
            for index, layer in enumerate(model.layers):
                layer.norm = nn.LayerNorm(8)
                if regions:
                    apply(layer, "")
                    model.layers[index] = torch.compile(layer, backend=compiler, fullgraph=True)
                fully_shard(model.layers[index])
            fully_shard(model)
            torch.manual_seed(1)
            model(torch.randn(4, 8)).sum().backward()
            results.append([p.grad.full_tensor() for p in model.parameters()])
    finally:
        dist.destroy_process_group()
    assert same(*results)
    assert all("tag_activation_checkpoint" in graph for graph in graphs)
    assert 1 <= len(graphs) <= 2  # the first layer's input needs no gradient
