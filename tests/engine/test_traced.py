"""Traced: the marks that a region leaves in a graph that a compiler traces on a deferred device."""

from __future__ import annotations

import operator

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from distckpt._torch import node_number, nodes_since, traced_graph
from distckpt.engine.compiler import Traced
from distckpt.engine.region import DEFAULT, Options
from distckpt.errors import ScannedDropout, ScannedRegion

x = torch.ones(4)


def marks(region: object, *, pins: object = None) -> dict[str, tuple[str, int]]:
    """What ``y.cos()`` after a region of ``region(x)`` is marked as, by operator."""

    def function(x: torch.Tensor) -> torch.Tensor:
        before = x.exp()
        graph = traced_graph()
        if graph is None:  # make_fx may run it once to look
            return before
        for part in region if isinstance(region, tuple) else (region,):
            traced = Traced(graph, DEFAULT, "here")
            before = part(before)
            traced.seal(pins)
        return before.cos()

    graph = make_fx(function)(x).graph
    return {
        str(node.target): (node.meta["recompute"].name, node.meta["ac_graph_id"])
        for node in graph.nodes
        if "recompute" in node.meta
    }


def test_only_the_regions_own_operators_are_recomputed() -> None:
    found = marks(lambda x: x.sin().tanh())
    assert {name: policy for name, (policy, _) in found.items()} == {
        "aten.sin.default": CheckpointPolicy.PREFER_RECOMPUTE.name,
        "aten.tanh.default": CheckpointPolicy.PREFER_RECOMPUTE.name,
    }


def test_what_was_drawn_is_kept() -> None:
    found = marks(lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)))
    assert found["aten.bernoulli.default"][0] == "MUST_SAVE"
    assert found["aten.mul.Tensor"][0] == "PREFER_RECOMPUTE"


def test_the_parts_of_what_was_drawn_are_kept() -> None:
    found = marks(lambda x: torch.ops.aten.rrelu_with_noise_functional(x, x, 0.1, 0.3, True)[0])
    assert found[str(operator.getitem)][0] == "MUST_SAVE"


def test_regions_of_one_graph_are_told_apart_in_order() -> None:
    found = marks((lambda x: x.sin(), lambda x: x.tanh()))
    assert found["aten.sin.default"][1] < found["aten.tanh.default"][1]


def test_the_fused_dropout_operator_is_refused() -> None:
    with pytest.raises(ScannedDropout, match="bernoulli"):
        marks(lambda x: torch.ops.aten.native_dropout(x, 0.5, True)[0])


def test_a_pinned_value_is_refused() -> None:
    with pytest.raises(ScannedRegion, match="pin"):
        marks(lambda x: x.sin(), pins=[1])


@pytest.mark.parametrize(
    "options",
    [
        Options(debug=True),
        Options(determinism_check="bitwise"),
        Options(context_fn=lambda: None),  # type: ignore[arg-type,return-value]
    ],
    ids=["debug", "determinism_check", "context_fn"],
)
def test_options_that_need_a_replay_are_refused(options: Options) -> None:
    with pytest.raises(ScannedRegion, match="cannot honour"):
        Traced(torch.fx.Graph(), options, "here")


def test_no_graph_is_traced_in_plain_code() -> None:
    assert traced_graph() is None


def test_nodes_since_stops_at_what_was_there_before_and_at_leaves() -> None:
    leaf = torch.ones(3, requires_grad=True)
    before = leaf.sin()
    first = node_number()
    after = before.cos() * leaf
    assert sorted(n.name() for n in nodes_since(first, [after, before, leaf])) == [
        "CosBackward0",
        "MulBackward0",
    ]
