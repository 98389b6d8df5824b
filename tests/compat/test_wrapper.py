"""The wrapper surface: torch's module wrappers over our engine."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as torchs
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from distckpt.compat.wrapper import (
    ActivationWrapper,
    CheckpointImpl,
    CheckpointWrapper,
    OffloadWrapper,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from distckpt.engine.stats import counters

BOTH = pytest.mark.parametrize("impl", [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), nn.Linear(4, 4))


def step(model: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(3, 4, requires_grad=True)
    model.zero_grad()
    out = model(x)
    torch.manual_seed(2)
    out.sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@BOTH
def test_a_wrapped_module_has_the_plain_gradients_to_the_bit(impl: Any) -> None:
    assert same(step(checkpoint_wrapper(net(), impl)), step(net()))


def test_it_is_our_engine_that_runs() -> None:
    before = counters.regions, counters.replays
    step(checkpoint_wrapper(net()))
    assert (counters.regions - before[0], counters.replays - before[1]) == (1, 1)


def test_torchs_checks_by_class_recognise_ours() -> None:
    wrapped, offloaded = checkpoint_wrapper(net()), offload_wrapper(net())
    assert isinstance(wrapped, CheckpointWrapper)
    assert isinstance(wrapped, torchs.CheckpointWrapper)
    assert isinstance(offloaded, OffloadWrapper)
    for one in (wrapped, offloaded):
        assert isinstance(one, torchs.ActivationWrapper)
        assert isinstance(one, ActivationWrapper)
    assert torchs.CheckpointImpl.REENTRANT is CheckpointImpl.REENTRANT


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, offload_wrapper])
def test_names_and_state_are_those_of_the_wrapped_module(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, wrapped = net(), wrap(net())
    assert [n for n, _ in wrapped.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(wrapped.state_dict())
    wrapped.load_state_dict(plain.state_dict())


def test_missing_attributes_and_indices_reach_the_wrapped_module() -> None:
    inner = net()
    inner.note = "here"  # type: ignore[assignment]
    wrapped = checkpoint_wrapper(inner)
    assert wrapped.note == "here"
    assert wrapped[0] is inner[0]  # type: ignore[index]
    with pytest.raises(AttributeError):
        _ = wrapped.absent


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, a: torch.Tensor, *, b: torch.Tensor, flag: bool = True) -> torch.Tensor:
        assert flag
        return self.linear(a) * b.sin()


@BOTH
def test_keyword_arguments_pass_both_variants(impl: Any) -> None:
    torch.manual_seed(0)
    plain = Keywords()
    wrapped = checkpoint_wrapper(copy.deepcopy(plain), impl)
    grads = []
    for module in (plain, wrapped):
        a, b = torch.ones(2, 4, requires_grad=True), torch.ones(2, 4, requires_grad=True)
        module(a, b=b, flag=True).sum().backward()
        grads.append([a.grad, b.grad])
    assert same(*grads)


def test_options_reach_the_engine_and_use_reentrant_comes_from_the_impl() -> None:
    runs: list[int] = []

    class Shrinks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            runs.append(1)
            return x[: 4 - len(runs)].sin()

    with pytest.raises(RuntimeError):
        checkpoint_wrapper(Shrinks())(torch.ones(4, requires_grad=True)).sum().backward()
    with pytest.raises(ValueError, match="determinism_check"):
        checkpoint_wrapper(net(), determinism_check="nonsense")(torch.ones(1, 4, requires_grad=True))
    with pytest.raises(TypeError, match="use_reentrant"):
        checkpoint_wrapper(net(), use_reentrant=False)


def test_a_custom_checkpoint_fn_gets_the_module_and_the_options() -> None:
    seen: list[Any] = []

    def fn(module: nn.Module, *args: Any, **options: Any) -> Any:
        seen.append((module, options))
        return module(*args)

    inner = net()
    checkpoint_wrapper(inner, CheckpointImpl.REENTRANT, fn, depth=3)(torch.ones(1, 4))
    assert seen == [(inner, {"depth": 3})]


@BOTH
def test_apply_replaces_the_chosen_submodules_and_never_the_model(impl: Any) -> None:
    model = net()
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, impl),
        check_fn=lambda m: isinstance(m, nn.Linear),
    )
    assert sum(isinstance(m, CheckpointWrapper) for m in model.modules()) == 3
    assert type(model) is nn.Sequential
    assert list(model.state_dict()) == list(net().state_dict())
    assert same(step(model), step(net()))


def test_apply_takes_fsdp_wrapping_policies_and_defaults_to_ours() -> None:
    model = net()
    apply_activation_checkpointing(model, auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}))
    assert [type(child) for child in model.children()] == [nn.Linear, CheckpointWrapper, nn.Linear]
    assert same(step(model), step(net()))


@BOTH
def test_wrapped_models_copy_and_pickle(impl: Any) -> None:
    wrapped = checkpoint_wrapper(net(), impl)
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert same(step(other), step(net()))


def test_offload_gives_the_plain_gradients() -> None:
    # Not to the bit: torch's save_on_cpu gives a transposed weight back contiguous, and the product rounds otherwise.
    torch.testing.assert_close(step(offload_wrapper(net())), step(net()))
    assert same(step(offload_wrapper(checkpoint_wrapper(net()))), step(net()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_wrapped_model_is_one_graph_and_exact() -> None:
    model = checkpoint_wrapper(net())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = step(net())
    torch.manual_seed(1)
    x = torch.randn(3, 4, requires_grad=True)
    out = compiled(x)
    out.sum().backward()
    assert same([out.detach(), x.grad], expected[:2])  # type: ignore[list-item]
