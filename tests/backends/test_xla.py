"""XLA for real, on PJRT CPU: integer states, no execution, and a barrier whose arguments stay as they were."""

from __future__ import annotations

from typing import Any

import distckpt_backends
import pytest
import torch
import torch.nn.functional as F
from distckpt_backends.errors import BackendLoadError
from distckpt_backends.xla import XlaBackend

import distckpt as dc

pytestmark = pytest.mark.xla


@pytest.fixture
def xla() -> Any:
    backend = distckpt_backends.get("xla")
    reason = backend.why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    torch.empty(1, device="xla")
    return backend


def hlo(*tensors: torch.Tensor) -> str:
    import torch_xla

    return torch_xla._XLAC._get_xla_tensors_hlo(list(tensors))


def test_the_state_is_an_unsigned_64_bit_int(xla: XlaBackend) -> None:
    for device in xla.live_devices():
        for state in (0, 2**63 + 5, 2**64 - 1):
            xla.rng_restore(device, state)
            assert xla.rng_stash(device) == state


def test_reading_the_state_compiles_and_runs_nothing(xla: XlaBackend) -> None:
    from torch_xla.debug import metrics

    device = xla.current_device()
    xla.synchronize()
    metrics.clear_all()
    state = xla.rng_stash(device)
    torch.rand(4, device=device)
    assert xla.rng_moved(device, state)
    xla.rng_restore(device, state)
    assert metrics.metric_data("ExecuteTime") is None
    assert metrics.metric_data("CompileTime") is None


def test_randperm_follows_no_seed_so_nobody_can_replay_it(xla: XlaBackend) -> None:
    # A limit of torch_xla 2.9 that docs/backends.md names: its shuffle draws from the runtime's own state. Should this
    # test fail one day, the limit is gone.
    host, device = torch.device("cpu"), xla.current_device()
    cpu = distckpt_backends.get("cpu")
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        xla.rng_restore(device, 5)
        on_host = cpu.rng_stash(host)
        found.append(torch.randperm(64, device=device))
        assert not xla.rng_moved(device, 5)
        assert not cpu.rng_moved(host, on_host)
    assert not torch.equal(found[0].cpu(), found[1].cpu())


@pytest.mark.parametrize("name", ["multinomial", "log_normal_", "rrelu"])
def test_ops_that_torch_xla_runs_on_the_host_draw_from_the_host(xla: XlaBackend, name: str) -> None:
    host, device = torch.device("cpu"), xla.current_device()
    cpu = distckpt_backends.get("cpu")
    draw = {
        "multinomial": lambda: torch.multinomial(torch.ones(8, device=device), 4),
        "log_normal_": lambda: torch.empty(4, device=device).log_normal_(),
        "rrelu": lambda: torch.nn.functional.rrelu(-torch.ones(4, device=device), training=True),
    }[name]
    state = cpu.rng_stash(host)
    first = draw().cpu()
    assert cpu.rng_moved(host, state)
    cpu.rng_restore(host, state)
    assert torch.equal(first, draw().cpu())


def test_only_results_of_the_barrier_are_behind_it(xla: XlaBackend) -> None:
    x = torch.randn(4).to(xla.current_device())
    xla.synchronize()
    (tied,) = xla.barrier([x])
    assert "opt-barrier" not in hlo(x.cos())
    assert hlo(tied.cos()).count("opt-barrier(") == 1


def test_all_tensors_of_a_device_share_one_barrier(xla: XlaBackend) -> None:
    device = xla.current_device()
    a, b = torch.ones(3, device=device), torch.ones(5, device=device)
    assert hlo(*(t.sin() for t in xla.barrier([a, b, a]))).count("opt-barrier(") == 1


def test_devices_are_not_tied_together(xla: XlaBackend) -> None:
    devices = xla.live_devices()
    if len(devices) < 2:
        pytest.skip("one XLA device")
    # one program runs on one device: a barrier over both would abort the process when it runs
    tied = xla.barrier([torch.ones(3, device=d) for d in devices])
    for device, tensor in zip(devices, tied, strict=True):
        assert hlo(tensor.sin()).count("opt-barrier(") == 1
        assert torch.equal(tensor.cpu(), torch.ones(3))
        assert tensor.device == device


def test_without_torch_xla_the_reason_says_so_and_use_is_a_coded_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from distckpt_backends import _torch
    from distckpt_backends import xla as file

    backend = XlaBackend()
    if "torch_xla" not in __import__("sys").modules:
        monkeypatch.setattr(file, "find_spec", lambda name: None)
        assert backend.why_unavailable() == "torch_xla is not installed"
    monkeypatch.setattr(_torch, "xla_module", lambda: (_ for _ in ()).throw(ImportError("wrong torch")))
    monkeypatch.setattr(file, "find_spec", lambda name: object())
    assert "wrong torch" in str(backend.why_unavailable())
    with pytest.raises(BackendLoadError, match=r"^\[DC206\] "):
        backend.current_device()


def drop(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x.sin(), 0.5).cos()


def by_backward(xla: XlaBackend, x: torch.Tensor) -> None:
    dc.checkpoint(drop, x).sum().backward()


def by_session(xla: XlaBackend, x: torch.Tensor) -> None:
    with dc.session() as session:
        kept = dc.checkpoint(drop, x)
    session.replay()
    del kept


def by_fork(xla: XlaBackend, x: torch.Tensor) -> None:
    drop(x)
    with xla.rng_fork([x.device]), xla.rng_fork([x.device]):
        xla.rng_restore(x.device, 99)


def future(xla: XlaBackend, use: Any) -> tuple[int, list[float], int]:
    """The random state after `use`, what is drawn then, and the state after the next flush."""
    device = torch.device("xla", 0)
    xla.rng_restore(device, 7)
    torch.rand(2, device=device)
    use(xla, torch.ones(4, device=device, requires_grad=True))
    state, drawn = xla.rng_stash(device), torch.rand(3, device=device)
    xla.synchronize(device)
    return state, drawn.tolist(), xla.rng_stash(device)


@pytest.mark.parametrize("use", [by_backward, by_session, by_fork])
def test_what_is_drawn_after_a_replay_and_after_the_next_flush_is_as_without(
    xla: XlaBackend, use: Any
) -> None:
    # a flush reseeds from the root of the seed, which a restore replaces
    plain = future(xla, lambda _, x: drop(x))
    assert future(xla, use) == plain
    assert future(xla, use) == plain


def test_a_backward_that_fails_spoils_no_later_one(xla: XlaBackend) -> None:
    def fail(_: torch.Tensor) -> None:
        raise ZeroDivisionError

    x = torch.ones(4, device="xla", requires_grad=True)
    x.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        by_backward(xla, x)
    assert future(xla, by_backward) == future(xla, lambda _, x: drop(x))
