"""Parameters that are others at the replay than at the record: put back, or refused where a gradient needs them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import distckpt as dc
from distckpt.errors import ParameterRead, ReplayError

from .exact import exact, leaf


def plainly(fn: Callable[..., Any], *args: Any) -> Any:
    return fn(*args)


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4)


def step(module: nn.Module) -> None:
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def new_data(module: nn.Module) -> None:
    for p in module.parameters():
        p.data = p.data + 1.0


def there_and_back(module: nn.Module) -> None:
    module.half().float()


def loaded(module: nn.Module) -> None:
    module.load_state_dict({k: v + 1.0 for k, v in module.state_dict().items()})


@pytest.mark.parametrize("change", [step, new_data, there_and_back, loaded])
@pytest.mark.parametrize("reach", ["module", "method", "closure", "argument"])
def test_a_value_computed_from_a_parameter_that_changed_before_the_replay_is_refused(
    change: Any, reach: str
) -> None:
    block = nn.Sequential(layer(), nn.Tanh())
    x = leaf(2, 4)
    if reach == "argument":
        out = dc.checkpoint(lambda m, t: m(t), block, x)
    else:
        out = dc.checkpoint(
            {"module": block, "method": block.forward, "closure": lambda t: block(t)}[reach], x
        )
    change(block)
    with pytest.raises(ParameterRead, match="DC124"):
        out.sum().backward()


def test_a_changed_parameter_that_nothing_saved_depends_on_is_no_error() -> None:
    grads = []
    for region in (plainly, dc.checkpoint):
        block, x = layer(), leaf(2, 4)
        out = region(
            lambda t, m=block: m.bias + (t + m.bias.detach() * 0.0 + t.sin()).sum() * 0.0 + t.cos(), x
        )
        block.bias.data = block.bias.data + 1.0
        out.sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])


def test_a_changed_parameter_that_the_region_does_not_read_is_no_error() -> None:
    grads = []
    for region in (plainly, dc.checkpoint):
        block, x = nn.ModuleList([layer(), layer()]), leaf(2, 4)
        out = region(lambda t, m=block: m[0](t).sin(), x)
        step(block[1])
        out.sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])


def test_an_optimizer_step_inside_backward_is_exact() -> None:
    found = []
    for region in (plainly, dc.checkpoint):
        blocks, x = nn.Sequential(*(nn.Sequential(layer(), nn.Tanh()) for _ in range(3))), leaf(2, 4)
        for p in blocks.parameters():
            optimizer = torch.optim.SGD([p], lr=0.1)
            p.register_post_accumulate_grad_hook(lambda _, o=optimizer: o.step())
        h = x
        for block in blocks:
            h = region(block, h)
        h.sum().backward()
        found.append([x.grad, *(p.detach() for p in blocks.parameters())])
    assert all(map(torch.equal, *found))


def test_a_second_backward_after_a_step_is_refused() -> None:
    block, x = layer(), leaf(2, 4)
    out = dc.checkpoint(lambda t: block(t).sin(), x).sum()
    out.backward(retain_graph=True)
    step(block)
    with pytest.raises(ReplayError):
        out.backward()


def test_a_region_recorded_in_a_replay_does_not_take_changed_parameters_for_its_own() -> None:
    block, x = layer(), leaf(2, 4)
    out = dc.checkpoint(lambda t: dc.checkpoint(lambda u: (u + block.bias).sin(), t.cos()), x)
    step(block)
    with pytest.raises(ParameterRead):
        out.sum().backward()


def test_a_number_read_out_of_a_changed_parameter_counts_as_read() -> None:
    block, x = layer(), leaf(2, 4)
    out = dc.checkpoint(lambda t: (t * block.bias.sum().item()).sin(), x)
    step(block)
    with pytest.raises(ParameterRead):
        out.sum().backward()


class Block(nn.Module):
    def __init__(self, region: Callable[..., Any]) -> None:
        super().__init__()
        self.region = region
        self.inner = layer()
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.inner.weight

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.region(lambda u: self.tied(self.inner(u).sin()).sin(), t)


def _functional(region: Callable[..., Any], again: bool) -> list[torch.Tensor]:
    x, w, b = leaf(2, 4), leaf(4, 4, seed=1), leaf(4, seed=2)
    block = Block(region)
    out = functional_call(block, {"inner.weight": w * 1.25, "inner.bias": b.sin()}, (x,))
    if again:
        out = functional_call(block, {"inner.weight": w * 0.5}, (out,))
    before = [id(p) for p in block.parameters()]
    out.sum().backward()
    assert [id(p) for p in block.parameters()] == before
    assert all(type(p) is nn.Parameter for p in block.parameters())
    return [x.grad, w.grad, b.grad, block.tied.bias.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_functional_call_around_a_region_is_exact(again: bool, nested: bool) -> None:
    def twice(fn: Any, *args: Any) -> Any:
        return dc.checkpoint(lambda *a: dc.checkpoint(fn, *a), *args)

    expected = _functional(plainly, again)
    assert all(map(torch.equal, expected, _functional(twice if nested else dc.checkpoint, again)))


@pytest.mark.parametrize("unpack", [lambda t: t, lambda t: torch.empty_like(t).copy_(t)])
def test_functional_call_under_hooks_that_copy_is_exact(unpack: Any) -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), unpack):
        expected = _functional(plainly, again=False)
        assert all(map(torch.equal, expected, _functional(dc.checkpoint, again=False)))


def test_functional_call_with_parameters_of_another_module_is_exact() -> None:
    grads = []
    for region in (plainly, dc.checkpoint):
        block, other, x = Block(region), nn.Linear(4, 4), leaf(2, 4)
        nn.init.ones_(other.bias), nn.init.constant_(other.weight, 0.5)
        functional_call(block, {f"inner.{k}": p for k, p in other.named_parameters()}, (x,)).sum().backward()
        grads.append([x.grad, other.weight.grad, other.bias.grad])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("hooks", [False, True])
def test_a_swapped_tensor_changed_in_place_before_the_replay_is_refused_and_the_module_is_as_it_was(
    hooks: bool,
) -> None:
    block, x, w = Block(dc.checkpoint), leaf(2, 4), torch.ones(4, 4)
    around = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with around if hooks else contextlib.nullcontext():
        out = functional_call(block, {"inner.weight": w}, (x,))
    w.add_(1.0)
    own = block.inner.weight
    with pytest.raises(ReplayError):
        out.sum().backward()
    assert block.inner.weight is own


def test_a_parameter_replaced_before_the_replay_is_put_back_for_it() -> None:
    grads = []
    for region in (plainly, dc.checkpoint):
        block, x = layer(), leaf(2, 4)
        out = region(lambda t, m=block: m(t).sin(), x)
        block.bias = new = nn.Parameter(torch.ones(4))
        out.sum().backward()
        assert block.bias is new
        grads.append(x.grad)
    assert torch.equal(*grads)


SCALE = nn.Parameter(torch.full((4,), 0.5))


def scaled(t: torch.Tensor) -> torch.Tensor:
    return (t + SCALE).sin()


@pytest.mark.parametrize(
    "reach", ["argument", "keyword", "in a list", "partial", "cell", "global", "by a helper"]
)
def test_a_parameter_that_the_call_holds_by_itself_is_watched_as_well(reach: str) -> None:
    def fn(t: torch.Tensor, scale: Any) -> torch.Tensor:
        return (t + (scale[0] if type(scale) is list else scale)).sin()

    x, p, before = leaf(2, 4), SCALE, SCALE.data
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "argument": lambda: dc.checkpoint(fn, x, p),
        "keyword": lambda: dc.checkpoint(fn, x, scale=p),
        "in a list": lambda: dc.checkpoint(fn, x, [p]),
        "partial": lambda: dc.checkpoint(functools.partial(fn, scale=p), x),
        "cell": lambda: dc.checkpoint(lambda t: fn(t, p), x),
        "global": lambda: dc.checkpoint(scaled, x),
        "by a helper": lambda: dc.checkpoint(lambda t: scaled(t), x),
    }
    try:
        out = calls[reach]()
        p.data = p.data + 1.0
        with pytest.raises(ParameterRead, match="DC124"):
            out.sum().backward()
    finally:
        p.data = before


def test_a_weight_passed_by_itself_whose_data_was_exchanged_is_what_plain_autograd_hands_out() -> None:
    def program(region: Any) -> list[Any]:
        x, w = leaf(2, 4), nn.Parameter(leaf(4, 4, seed=1).detach())
        out = region(lambda t, u: t @ u, x, w)
        w.data = w.data * 2.0
        out.sum().backward()
        return [x.grad, w.grad]

    exact(program)


def test_a_module_replaced_before_the_replay_is_put_back_for_it() -> None:
    def program(region: Any) -> list[Any]:
        layers, x = nn.Sequential(layer(), nn.Sequential(nn.Sigmoid(), nn.Tanh())), leaf(2, 4)
        out = region(lambda t: layers(t).sin(), x)
        layers[1][0] = new = nn.ReLU6()  # type: ignore[index, operator]
        out.sum().backward()
        assert layers[1][0] is new  # type: ignore[index]
        return [x.grad, layers[0].weight.grad, layers[0].bias.grad]

    exact(program)


class Shifted(nn.Module):
    def __init__(self, region: Any) -> None:
        super().__init__()
        self.region = region
        self.register_buffer("shift", torch.zeros(4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.region(lambda u: self.norm((u + self.shift).sin()), t)


def test_a_buffer_that_functional_call_exchanges_around_a_region_is_exact() -> None:
    def program(region: Any) -> list[Any]:
        block, x = Shifted(region), leaf(3, 4)
        mean, count, shift = torch.ones(4), torch.tensor(5), leaf(4, seed=1)
        swapped = {"shift": shift * 2.0, "norm.running_mean": mean, "norm.num_batches_tracked": count}
        functional_call(block, swapped, (x,)).exp().sum().backward()
        buffers = [b.clone() for b in block.buffers()]
        return [x.grad, shift.grad, mean, count, *buffers]

    exact(program)


def test_a_buffer_replaced_by_the_caller_before_the_replay_is_put_back_for_it() -> None:
    def program(region: Any) -> list[Any]:
        block, x = Shifted(region), leaf(3, 4)
        out = block(x)
        block.shift = torch.ones(4)
        out.exp().sum().backward()
        return [x.grad, block.shift]

    exact(program)


def test_parameters_made_in_inference_mode_count_no_versions_and_may_be_read() -> None:
    def program(region: Any) -> list[Any]:
        with torch.inference_mode():
            frozen = nn.Linear(4, 4).requires_grad_(False)
        x = leaf(2, 4)
        region(lambda t: (t + frozen.bias).sin(), x).sum().backward()
        return [x.grad]

    exact(program)
