"""torch.compile around and inside regions, vmap, forward-mode AD and torch.func."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import distckpt as dc

from .exact import counted, leaf

pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo's own deprecations differ from version to version


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.options = options

    def work(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.relu(self.one(x)).sin())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.options is None:
            return self.work(x).cos()
        return dc.checkpoint(self.work, x, **self.options).cos()


def grads(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    module(x).sum().backward()
    return [x.grad, *(p.grad for p in module.parameters())]  # type: ignore[list-item]


def close(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(u, v) for u, v in zip(a, b, strict=True))


OPTIONS: dict[str, dict[str, Any]] = {
    "no options": {},
    "name and check": {"name": "block", "determinism_check": "none"},
    "selective": {
        "context_fn": functools.partial(
            dc.create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default]
        )
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_compile_around_a_region_becomes_one_graph_of_torchs_operator(name: str) -> None:
    x = torch.ones(2, 8)
    want = grads(Block(), x)
    compiled = torch.compile(Block(OPTIONS[name]), backend="aot_eager", fullgraph=True)
    found, counts = counted(lambda: grads(compiled, x))
    assert close(found, want)
    assert counts.regions == 0


def test_compile_inside_a_region_stays_on_our_engine() -> None:
    x = torch.ones(2, 8)
    want = grads(Block(), x)
    block = Block({})
    block.work = torch.compile(block.work, backend="aot_eager")  # type: ignore[method-assign]
    found, counts = counted(lambda: grads(block, x))
    assert close(found, want)
    assert (counts.regions, counts.replays) == (1, 1)


def test_a_graph_break_around_a_region_leaves_record_and_replay_on_our_engine() -> None:
    runs: list[bool] = []

    class Broken(Block):
        def work(self, x: torch.Tensor) -> torch.Tensor:
            runs.append(dc.is_recomputing())
            return super().work(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + 1
            torch._dynamo.graph_break()
            out = untraceable(self.work, x)
            return out.cos()

    @torch._dynamo.disable
    def untraceable(fn: Any, x: torch.Tensor) -> torch.Tensor:
        return dc.checkpoint(fn, x)

    class Plain(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.work(x + 1).cos()

    x = torch.ones(2, 8)
    want = grads(Plain(), x)
    compiled = torch.compile(Broken(), backend="aot_eager")
    found, counts = counted(lambda: grads(compiled, x))
    assert close(found, want)
    assert (counts.regions, counts.replays) == (1, 1)
    assert runs == [False, True]


def test_a_graph_break_inside_a_region_hands_the_region_to_our_engine() -> None:
    class Broken(Block):
        def work(self, x: torch.Tensor) -> torch.Tensor:
            x = self.one(x)
            torch._dynamo.graph_break()
            return self.two(torch.relu(x).sin())

    x = torch.ones(2, 8)
    want = grads(Block(), x)
    compiled = torch.compile(Broken({}), backend="aot_eager")
    found, counts = counted(lambda: grads(compiled, x))
    assert close(found, want)
    assert (counts.regions, counts.replays) == (1, 1)


def test_a_compiled_module_as_the_regions_function_is_exact_over_steps() -> None:
    x = torch.ones(2, 8)
    want = grads(Block(), x)
    compiled = torch.compile(Block(), backend="aot_eager")

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = compiled

        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return dc.checkpoint(self.inner, t)

    around = Around()
    for _ in range(3):
        found, counts = counted(lambda: grads(around, x))
        assert close(found, want)
        assert (counts.regions, counts.replays) == (1, 1)


def test_the_decorator_compiles_too() -> None:
    @dc.checkpoint(name="decorated")
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.sin().exp()

    compiled = torch.compile(lambda x: fn(x).cos(), backend="aot_eager")
    x, y = leaf(4), leaf(4)
    compiled(x).sum().backward()
    fn(y).cos().sum().backward()
    assert torch.allclose(x.grad, y.grad)


def test_dropout_in_a_compiled_region_has_one_mask() -> None:
    torch.manual_seed(0)
    x = torch.ones(512, requires_grad=True)
    compiled = torch.compile(
        lambda t: dc.checkpoint(lambda u: torch.nn.functional.dropout(u, 0.5) * 1.0, t), backend="aot_eager"
    )
    out = compiled(x)
    out.sum().backward()
    assert torch.equal(out != 0, x.grad != 0)


def test_vmap_over_a_region_equals_a_loop() -> None:
    x, w = leaf(5, 3), leaf(3, 3, seed=2)

    def fn(row: torch.Tensor) -> torch.Tensor:
        return (row @ w).sin().exp()

    out = torch.vmap(lambda row: dc.checkpoint(fn, row))(x)
    assert torch.allclose(out, torch.stack([fn(row) for row in x]))


def test_a_backward_outside_the_vmap_that_a_region_ran_in_is_exact_or_refused() -> None:
    """The region's inputs are tensors of that vmap; torch's engine refuses it, as ours does after torch 2.9."""
    x = leaf(5, 3)
    out = torch.vmap(lambda row: dc.checkpoint(lambda t: t.sin().exp(), row))(x)
    try:
        out.sum().backward()
    except RuntimeError as error:
        text = str(error)
        assert "vmap" in text, text
    else:
        assert torch.equal(x.grad, torch.autograd.grad(x.sin().exp().sum(), x)[0])


def test_vmap_inside_a_region_is_exact() -> None:
    x, w = leaf(5, 3), leaf(3, 3, seed=2)

    def fn(rows: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: (row @ w).sin())(rows).exp()

    want = torch.autograd.grad(fn(x).sum(), (x, w))
    found = torch.autograd.grad(dc.checkpoint(fn, x).sum(), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_forward_mode_goes_through_a_region() -> None:
    from torch.autograd import forward_ad

    x, t = torch.linspace(0, 1, 4), torch.ones(4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        _, tangent = forward_ad.unpack_dual(dc.checkpoint(lambda v: v.sin() * v, dual))
    _, want = torch.func.jvp(lambda v: v.sin() * v, (x,), (t,))
    assert torch.allclose(tangent, want)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev], ids=["grad", "jacrev"])
def test_reverse_transforms_of_torch_func_are_refused(transform: Any) -> None:
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        transform(lambda t: dc.checkpoint(lambda u: u.sin().sum(), t))(torch.ones(3))
    x = leaf(3)  # and nothing is left half open
    dc.checkpoint(lambda t: t.sin().exp(), x).sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(x.sin().exp().sum(), x)[0])


def test_a_refused_region_leaves_nothing_open() -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    from distckpt.engine.region import here

    for options in OPTIONS.values():
        with pytest.raises(RuntimeError):
            torch.func.grad(lambda t, o=options: dc.checkpoint(lambda u: u.sin().sum(), t, **o))(
                torch.ones(3)
            )
        assert here.frame is None
        assert _get_current_dispatch_mode_stack() == []


def test_reverse_transforms_of_torch_func_inside_a_region_are_refused() -> None:
    def fn(t: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda u: (u.sin() * u).sum())(t).exp()

    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        dc.checkpoint(fn, leaf(3))


def test_dynamo_compiles_no_frame_of_the_engines_below_a_graph_break() -> None:
    @torch._dynamo.disable(recursive=False)
    def eager(y: torch.Tensor) -> torch.Tensor:
        return y.exp()  # its frame runs as it is, and Dynamo looks at every frame that is called in it

    def frames(checkpoint: Any) -> int:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(lambda x: eager(x.sin()).cos(), backend="eager")
        checkpoint(compiled, leaf(4), use_reentrant=False).sum().backward()
        return torch._dynamo.utils.counters["frames"]["total"]

    # the caller's own frames, in the record and in the replay; torch 2.9 and 2.10 look at one of torch's engine as well
    assert frames(dc.checkpoint) == 4 <= frames(torch.utils.checkpoint.checkpoint)
