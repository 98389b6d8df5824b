"""The rules that every backend keeps, run against every backend of the machine and against the fakes."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import distckpt_backends
import pytest
import torch
import torch.nn.functional as F
from distckpt_backends.errors import DeviceError, RngStateError
from torch.utils._python_dispatch import TorchDispatchMode

from .targets import Target

DRAWS: dict[str, Callable[[torch.device], torch.Tensor]] = {
    "rand": lambda d: torch.rand(5, device=d),
    "randn": lambda d: torch.randn(7, device=d),
    "odd normal": lambda d: torch.empty(3, device=d).normal_(),
    "uniform_": lambda d: torch.empty(6, device=d).uniform_(),
    "dropout": lambda d: F.dropout(torch.ones(64, device=d), 0.5),
    "bernoulli": lambda d: torch.bernoulli(torch.full((32,), 0.5, device=d)),
    "randperm": lambda d: torch.randperm(9, device=d),
    "624 words": lambda d: torch.rand(624, device=d),
}


@pytest.fixture(params=DRAWS)
def name(request: pytest.FixtureRequest, target: Target) -> str:
    if request.param == "randperm" and target.backend.device_type == "xla":
        pytest.skip("xla: randperm of torch_xla 2.9 follows no seed at all")
    return request.param


def test_restoring_a_stash_repeats_the_draws(target: Target, name: str) -> None:
    for device in target.devices:
        state = target.backend.rng_stash(device)
        first = DRAWS[name](device)
        second = DRAWS[name](device)
        target.backend.rng_restore(device, state)
        assert torch.equal(first.cpu(), DRAWS[name](device).cpu())
        assert torch.equal(second.cpu(), DRAWS[name](device).cpu())


def test_moved_says_true_exactly_after_a_draw(target: Target, name: str) -> None:
    for device in target.devices:
        state = target.backend.rng_stash(device)
        assert not target.backend.rng_moved(device, state)
        (torch.ones(4, device=device) * 2).sum()
        assert not target.backend.rng_moved(device, state)
        DRAWS[name](device)
        assert target.backend.rng_moved(device, state)
        target.backend.rng_restore(device, state)
        assert not target.backend.rng_moved(device, state)


def test_devices_of_one_type_move_apart(target: Target) -> None:
    if len(target.devices) < 2:
        pytest.skip(f"{target.backend.device_type}: one device")
    states = [target.backend.rng_stash(d) for d in target.devices]
    target.draw(1)
    moved = [target.backend.rng_moved(d, s) for d, s in zip(target.devices, states, strict=True)]
    assert moved == [False, True] + [False] * (len(states) - 2)


def test_a_seed_starts_the_draws_anew_on_one_device_only(target: Target) -> None:
    device = target.devices[-1]
    others = [(d, target.backend.rng_stash(d)) for d in target.devices[:-1]]
    found = []
    for seed in (2**62 + 5, 6, 2**62 + 5):
        target.backend.rng_seed(device, seed)
        found.append(target.draw(len(target.devices) - 1))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert not any(target.backend.rng_moved(d, state) for d, state in others)


def test_a_stash_does_not_change_with_the_generator(target: Target) -> None:
    device = target.devices[0]
    state = target.backend.rng_stash(device)
    frozen = pickle.dumps(state)
    first = target.draw()
    again = pickle.loads(frozen)
    target.backend.rng_restore(device, again)
    assert torch.equal(first, target.draw())
    assert pickle.dumps(state) == frozen


@pytest.mark.parametrize(
    "foreign",
    [
        None,
        "state",
        -1,
        1 << 64,
        1.5,
        True,
        b"",
        b"12345",
        (1,),
        (1, 2),
        (1, -4),
        ("1", 4),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(5056, dtype=torch.float32),
        torch.zeros(5056, dtype=torch.uint8),
    ],
    ids=lambda v: f"{type(v).__name__} {len(v) if hasattr(v, '__len__') else v}",
)
def test_a_foreign_state_is_refused_and_changes_nothing(target: Target, foreign: object) -> None:
    device = target.devices[0]
    target.draw()
    state = target.backend.rng_stash(device)
    with pytest.raises(RngStateError, match=r"^\[DC204\] ") as caught:
        target.backend.rng_restore(device, foreign)
    assert caught.value.code == "DC204"
    assert not target.backend.rng_moved(device, state)


def test_a_fork_puts_the_states_back_also_after_an_exception(target: Target) -> None:
    states = [target.backend.rng_stash(d) for d in target.devices]
    with pytest.raises(KeyError), target.backend.rng_fork():
        target.draw()
        raise KeyError
    assert not any(target.backend.rng_moved(d, s) for d, s in zip(target.devices, states, strict=True))


def test_what_was_lent_is_taken_back(target: Target) -> None:
    for device in target.devices:
        torch.rand(3, device=device)
        state = target.backend.rng_lend(device)
        inner = target.backend.rng_lend(device)
        torch.rand(5, device=device)
        target.backend.rng_take_back(device, inner)
        torch.rand(2, device=device)
        target.backend.rng_take_back(device, state)
        assert not target.backend.rng_moved(device, state)


def test_a_device_of_another_type_or_index_is_refused(target: Target) -> None:
    kind = target.backend.device_type
    if kind == "cpu":
        pytest.skip("cpu: the hot path takes any device as the host")
    for bad in (torch.device("meta"), torch.device("cpu"), torch.device(kind, 63), torch.device(kind)):
        with pytest.raises(DeviceError, match=r"^\[DC203\] "):
            target.backend.rng_stash(bad)


def test_reading_random_states_dispatches_no_op(target: Target) -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            raise AssertionError(f"{func} was dispatched")

    device = target.devices[0]
    with Seen():
        state = target.backend.rng_stash(device)
        target.backend.rng_moved(device, state)
        target.backend.rng_restore(device, state)


def test_the_barrier_returns_equal_tensors_and_passes_gradients(target: Target) -> None:
    device = target.devices[0]
    x = torch.randn(3, 4, device=device, requires_grad=True)
    y = torch.arange(5, device=device)
    view = x.detach()[1:]
    host = torch.ones(2)
    out = target.backend.barrier([x, y, view, host, x])
    assert [t.shape for t in out] == [x.shape, y.shape, view.shape, host.shape, x.shape]
    assert all(
        torch.equal(a.detach().cpu(), b.detach().cpu())
        for a, b in zip(out, [x, y, view, host, x], strict=True)
    )
    (out[0] * 2 + out[4]).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad.cpu(), torch.full((3, 4), 3.0))
    assert target.backend.barrier([]) == []


def test_the_barrier_leaves_its_arguments_alone(target: Target) -> None:
    x = torch.ones(3, device=target.devices[0])
    given = [x]
    version = x._version
    target.backend.barrier(given)
    assert given[0] is x
    assert x._version == version


def test_every_false_flag_has_a_reason(target: Target) -> None:
    flags = target.backend.capabilities
    for name, on in flags.flags().items():
        reason = flags.why(name)
        assert reason is None if on else reason


def test_what_a_flag_denies_is_none_and_what_it_grants_is_there(target: Target) -> None:
    backend, device = target.backend, target.devices[0]
    flags = backend.capabilities
    stats = backend.memory(device)
    assert (stats is not None) == flags.current_memory
    if stats is not None:
        assert stats.allocated >= 0
        assert (stats.peak_allocated is not None) == flags.peak_memory
    backend.reset_peak(device)
    assert (backend.side_stream(device) is not None) == flags.streams
    assert (backend.event(device) is not None) == flags.streams
    assert (backend.autocast_state() is not None) == flags.autocast


def test_autocast_is_found_and_entered_again(target: Target) -> None:
    backend = target.backend
    if not backend.capabilities.autocast:
        pytest.skip(str(backend.capabilities.why("autocast")))
    if not torch.amp.is_autocast_available(backend.device_type):
        pytest.skip("the stand-in's device type has no autocast in torch")
    with torch.autocast(backend.device_type, dtype=torch.bfloat16, cache_enabled=False):
        inside = backend.autocast_state()
    outside = backend.autocast_state()
    assert inside != outside
    with backend.autocast_context(inside):
        assert backend.autocast_state() == inside
    assert backend.autocast_state() == outside


def test_no_autocast_state_enters_nothing(target: Target) -> None:
    with target.backend.autocast_context(None):
        pass


def test_a_live_device_is_counted_current_and_can_be_waited_for(target: Target) -> None:
    backend = target.backend
    assert backend.is_available()
    assert backend.is_initialized()
    assert backend.device_count() >= len(target.devices) >= 1
    for device in target.devices:
        with backend.device_guard(device):
            if backend.capabilities.multi_device:
                assert backend.current_device() == device
        backend.synchronize(device)
        assert backend.is_capturing(device) is False
    backend.synchronize()
    assert backend.current_device() in target.devices


def test_live_names_every_initialised_backend_but_the_cpu(target: Target) -> None:
    found = [b.device_type for b in distckpt_backends.live()]
    assert (target.backend.device_type in found) == (target.backend.device_type != "cpu")


def test_the_same_object_serves_every_call(target: Target) -> None:
    kind = target.backend.device_type
    assert distckpt_backends.get(kind) is distckpt_backends.get(kind) is target.backend
