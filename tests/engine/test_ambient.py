"""Ambient state: a replay runs under the state its forward ran under, and leaves no trace of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import distckpt as dc

from .exact import Region, exact, leaf

tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def context_variable() -> Iterator[None]:
    token = tenant.set("somebody")
    try:
        yield
    finally:
        tenant.reset(token)


def flags() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            tuple(torch._C._get_sdp_priority_order()),
        ),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "device": torch.empty(0).device.type,
        "context variable": tenant.get(),
        "grad mode": torch.is_grad_enabled(),
    }


STATES: dict[str, Callable[[], Any]] = {
    "nothing": contextlib.nullcontext,
    "default dtype": default_dtype,
    "deterministic algorithms": deterministic,
    "attention choice": lambda: sdpa_kernel(SDPBackend.MATH),
    "attention order": lambda: sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast without cache": lambda: torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False),
    "autocast in half": lambda: torch.autocast("cpu", dtype=torch.float16),
    "device context": lambda: torch.device("meta"),
    "context variable": context_variable,
}


@pytest.mark.parametrize(
    "around_backward", ["nothing", "default dtype", "autocast in half", "device context"]
)
@pytest.mark.parametrize("around_forward", STATES)
def test_a_replay_sees_the_state_of_its_forward_and_puts_back_what_it_found(
    around_forward: str, around_backward: str
) -> None:
    seen: list[dict[str, Any]] = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        seen.append(flags())
        return t.sin().exp()

    x = leaf(4)
    with STATES[around_forward]():
        out = dc.checkpoint(fn, x)
    with STATES[around_backward]():
        before = flags()
        out.backward(torch.ones(4, device="cpu", dtype=torch.float32))
        assert flags() == before
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_grad_mode_is_on_in_the_replay_of_a_first_order_backward() -> None:
    seen: list[bool] = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        with torch.no_grad():
            scale = t.detach().norm() + 1
        return (t * scale).sin()

    def program(region: Region) -> Any:
        x = leaf(4)
        region(fn, x).sum().backward()
        return (x.grad,)

    exact(program)
    assert seen == [True, True, True]


@pytest.mark.parametrize("cache", [True, False])
def test_cpu_autocast_with_shared_weights_is_exact(cache: bool) -> None:
    """The weight cast is made once in the forward and again in the replay, whatever the cache holds."""

    def program(region: Region) -> Any:
        torch.manual_seed(2)
        layer = torch.nn.Linear(8, 8)
        x = leaf(4, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            y = layer(x)
            y = region(lambda t: layer(layer(t).sin()), y)
            loss = layer(y).float().sum()
        loss.backward()
        return y, x.grad, layer.weight.grad, layer.bias.grad

    exact(program)


def test_a_backward_outside_autocast_leaves_no_cached_weight_casts() -> None:
    """A cast that a replay leaves in the cache would be a stale weight in the next step's forward."""
    layer = torch.nn.Linear(8, 8)
    x = leaf(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dc.checkpoint(lambda t: layer(t).sin(), x)
    out.float().sum().backward()
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).abs().sum().item() == 0.0


def test_a_region_recorded_without_autocast_replays_without_it_inside_autocast() -> None:
    def program(region: Region) -> Any:
        w = leaf(8, 8, seed=3)
        x = leaf(4, 8)
        out = region(lambda t: (t @ w).sin() @ w, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out.sum().backward()
        return out, x.grad, w.grad

    exact(program)


def test_factories_in_a_region_use_the_device_context_of_the_forward() -> None:
    def program(region: Region) -> Any:
        x = leaf(4)
        with torch.device("cpu"):
            out = region(lambda t: (t * torch.arange(4.0)).sin(), x)
        with torch.device("meta"):
            out.backward(torch.ones(4, device="cpu"))
        return out, x.grad

    exact(program)


def test_a_device_context_is_left_cleanly_after_replays_inside_and_outside_it() -> None:
    """Re-entering the recorded context object would leave the device behind (pytorch#180423)."""
    x = leaf(4)
    with torch.device("meta"):
        out = dc.checkpoint(lambda t: t.sin().exp(), x)
        out.backward(torch.ones(4, device="cpu"), retain_graph=True)
        out.backward(torch.ones(4, device="cpu"), retain_graph=True)
    out.backward(torch.ones(4))
    assert torch.empty(0).device.type == "cpu"


def test_a_context_variable_set_inside_a_region_does_not_leak_out_of_its_replay() -> None:
    def fn(t: torch.Tensor) -> torch.Tensor:
        if dc.is_recomputing():
            tenant.set("replay")
        return t.sin().exp()

    dc.checkpoint(fn, leaf(4)).sum().backward()
    assert tenant.get() == "nobody"


def test_state_that_the_region_itself_sets_is_set_again_in_the_replay() -> None:
    def program(region: Region) -> Any:
        w = leaf(8, 8, seed=3)
        x = leaf(4, 8)

        def fn(t: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                t = t @ w
            with default_dtype():
                return t.double() * torch.ones(8)

        out = region(fn, x)
        out.sum().backward()
        return out, x.grad, w.grad

    exact(program)


@pytest.mark.parametrize(
    "state", ["default dtype", "deterministic algorithms", "autocast", "attention choice"]
)
def test_the_state_is_put_back_when_a_replay_fails(state: str) -> None:
    def fn(t: torch.Tensor) -> torch.Tensor:
        if dc.is_recomputing():
            raise KeyError("only in the replay")
        return t.sin().exp()

    with STATES[state]():
        out = dc.checkpoint(fn, leaf(4))
    before = flags()
    with pytest.raises(KeyError, match="only in the replay"):
        out.sum().backward()
    assert flags() == before


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_replays_with_the_kernel_it_was_recorded_with(kernel: SDPBackend) -> None:
    def program(region: Region) -> Any:
        q = leaf(1, 2, 8, 16)
        with sdpa_kernel(kernel):
            out = region(
                lambda t: torch.nn.functional.scaled_dot_product_attention(
                    t, t.sin(), t.cos(), is_causal=True
                ),
                q,
            )
        out.sum().backward()
        return out, q.grad

    exact(program)


def dtype_and_back(inner: Any) -> Any:
    torch.set_default_dtype(torch.float64)
    inner()
    torch.set_default_dtype(torch.float32)


def deterministic_and_back(inner: Any) -> Any:
    torch.use_deterministic_algorithms(True, warn_only=True)
    inner()
    torch.use_deterministic_algorithms(False)


def attention_and_back(inner: Any) -> Any:
    torch.backends.cuda.enable_flash_sdp(False)
    inner()
    torch.backends.cuda.enable_flash_sdp(True)


def autocast_and_back(inner: Any) -> Any:
    torch.set_autocast_enabled("cpu", True)
    inner()
    torch.set_autocast_enabled("cpu", False)


def device_and_back(inner: Any) -> Any:
    torch.set_default_device("meta")
    inner()
    torch.set_default_device(None)


SETTERS = [dtype_and_back, deterministic_and_back, attention_and_back, autocast_and_back, device_and_back]


@pytest.mark.parametrize("around", ["nothing", "default dtype", "autocast in half", "device context"])
@pytest.mark.parametrize("setter", SETTERS)
def test_a_state_that_a_function_sets_and_puts_back_at_its_end_is_as_it_was_after_an_early_stop(
    setter: Any, around: str
) -> None:
    def fn(t: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []
        setter(lambda: found.append(t.sin()))
        return found[0]

    out = dc.checkpoint(fn, leaf(4))
    with STATES[around]():
        before = flags()
        out.backward(torch.ones(4, device="cpu", dtype=torch.float32))
        assert flags() == before


@pytest.mark.skipif(
    not hasattr(torch.fx._symbolic_trace, "_get_is_fx_tracing"),
    reason="one flag of the process before torch 2.14",
)
@pytest.mark.parametrize("in_record", [True, False])
def test_a_replay_sees_whether_fx_was_tracing_in_its_forward(in_record: bool) -> None:
    fx = torch.fx._symbolic_trace
    seen: list[bool] = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        seen.append(fx._get_is_fx_tracing())
        return t.sin().exp()

    with fx._is_fx_tracing_context(in_record):
        out = dc.checkpoint(fn, leaf(4))
    with fx._is_fx_tracing_context(not in_record):
        out.sum().backward()
        assert fx._get_is_fx_tracing() is not in_record
    assert seen == [in_record, in_record]


def test_a_state_that_a_function_with_buffers_puts_back_at_its_end_does_not_leak() -> None:
    norm = torch.nn.BatchNorm1d(4)

    def run(x: torch.Tensor) -> torch.Tensor:
        torch.set_default_dtype(torch.float64)
        y = norm(x).sin()
        torch.set_default_dtype(torch.float32)
        return y * 2  # nothing is saved here: the replay stops before

    dc.checkpoint(run, torch.randn(3, 4, requires_grad=True)).sum().backward()
    try:
        assert torch.get_default_dtype() is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
