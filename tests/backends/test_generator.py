"""Backends over default_generators: counters, byte states, graph capture, memory, several devices."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from distckpt_backends.errors import BackendLoadError, DeviceError, GraphCaptureError, RngStateError
from distckpt_backends.generator import GeneratorBackend

from tests.fakes.module import FakeModule

ZERO, ONE = torch.device("lazy", 0), torch.device("lazy", 1)


@pytest.fixture
def backend(lazy: FakeModule) -> GeneratorBackend:
    return GeneratorBackend("lazy", lazy)


def test_the_state_is_seed_and_offset_and_makes_no_tensor(
    lazy: FakeModule, backend: GeneratorBackend
) -> None:
    lazy.default_generators[1].manual_seed(2**63 + 5)
    torch.rand(5, device=ONE)
    assert backend.rng_stash(ONE) == (2**63 + 5, 8)
    assert lazy.default_generators[1].gets == 1


def test_a_reseed_is_undone_too(lazy: FakeModule, backend: GeneratorBackend) -> None:
    torch.rand(3, device=ZERO)
    state = backend.rng_stash(ZERO)
    lazy.manual_seed_all(99)
    assert backend.rng_moved(ZERO, state)
    backend.rng_restore(ZERO, state)
    assert backend.rng_stash(ZERO) == state


def test_restoring_the_seed_it_has_only_sets_the_offset(
    lazy: FakeModule, backend: GeneratorBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = backend.rng_stash(ZERO)
    monkeypatch.setattr(
        type(lazy.default_generators[0]), "manual_seed", lambda self, seed: pytest.fail("reseeded")
    )
    backend.rng_restore(ZERO, state)


def test_a_state_that_the_generator_refuses_midway_is_rolled_back(
    lazy: FakeModule, backend: GeneratorBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.rand(3, device=ZERO)
    before = backend.rng_stash(ZERO)
    generator = lazy.default_generators[0]
    keep = generator.set_offset

    def refuse(offset: int) -> None:
        if offset == 400:
            raise RuntimeError("offset too large")
        keep(offset)

    monkeypatch.setattr(generator, "set_offset", refuse)
    with pytest.raises(RngStateError):
        backend.rng_restore(ZERO, (7, 400))
    assert backend.rng_stash(ZERO) == before


def test_generators_without_an_offset_use_their_byte_state(
    lazy: FakeModule, backend: GeneratorBackend
) -> None:
    for generator in lazy.default_generators:
        generator.get_offset = lambda: (_ for _ in ()).throw(RuntimeError("no offset"))  # type: ignore[method-assign]
    try:
        state = backend.rng_stash(ZERO)
        assert isinstance(state, torch.Tensor)
        first = torch.rand(4, device=ZERO)
        assert backend.rng_moved(ZERO, state)
        backend.rng_restore(ZERO, state)
        assert not backend.rng_moved(ZERO, state)
        assert torch.equal(first, torch.rand(4, device=ZERO))
        with pytest.raises(RngStateError):
            backend.rng_restore(ZERO, state[:8])
    finally:
        for generator in lazy.default_generators:
            del generator.get_offset


def test_an_uninitialised_runtime_has_no_live_devices_and_no_states(
    lazy: FakeModule, backend: GeneratorBackend
) -> None:
    lazy._initialized = False
    lazy.default_generators, kept = (), lazy.default_generators
    try:
        assert backend.live_devices() == ()
        with pytest.raises(DeviceError, match="not initialised"):
            backend.rng_stash(ZERO)
    finally:
        lazy.default_generators = kept


def test_a_type_without_a_module_cannot_have_a_backend() -> None:
    with pytest.raises(BackendLoadError, match=r"torch\.hpu does not exist"):
        GeneratorBackend("hpu")


# Graph capture ------------------------------------------------------------------------------------------------


def test_capture_with_readable_states_replays_exactly(lazy: FakeModule, backend: GeneratorBackend) -> None:
    with lazy.capture(readable=True):
        assert backend.is_capturing(ZERO)
        state = backend.rng_stash(ZERO)
        assert not backend.rng_moved(ZERO, state)
        first = torch.rand(4, device=ZERO)
        assert backend.rng_moved(ZERO, state)
        backend.rng_restore(ZERO, state)
        assert not backend.rng_moved(ZERO, state)
        assert torch.equal(first, torch.rand(4, device=ZERO))
    assert not backend.is_capturing(ZERO)


def test_capture_with_unreadable_states_is_an_error_once_they_are_needed(
    lazy: FakeModule, backend: GeneratorBackend
) -> None:
    with lazy.capture(readable=False):
        state = backend.rng_stash(ZERO)
        for ask in (backend.rng_moved, backend.rng_restore):
            with pytest.raises(GraphCaptureError, match=r"^\[DC205\] ") as caught:
                ask(ZERO, state)
            assert "2.13" in str(caught.value)


@pytest.mark.parametrize("readable", [True, False])
def test_a_capture_on_one_device_leaves_the_others_as_they_are(
    lazy: FakeModule, backend: GeneratorBackend, readable: bool
) -> None:
    with lazy.capture(readable=readable):
        state = backend.rng_stash(ONE)
        assert isinstance(state, tuple)
        first = torch.rand(4, device=ONE)
        assert backend.rng_moved(ONE, state)
        backend.rng_restore(ONE, state)
        assert torch.equal(first, torch.rand(4, device=ONE))
        assert lazy.current_device() == 0


@pytest.mark.parametrize("inside_first", [True, False])
def test_a_state_does_not_cross_the_border_of_a_capture(
    lazy: FakeModule, backend: GeneratorBackend, inside_first: bool
) -> None:
    if inside_first:
        with lazy.capture(readable=True):
            state = backend.rng_stash(ZERO)
        with pytest.raises(GraphCaptureError, match="inside a graph capture"):
            backend.rng_restore(ZERO, state)
    else:
        state = backend.rng_stash(ZERO)
        with lazy.capture(readable=True), pytest.raises(GraphCaptureError, match="before a graph capture"):
            backend.rng_restore(ZERO, state)


# What torch.cuda has and the fake has not -----------------------------------------------------------------------


class Rich(ModuleType):
    """A device module with the names of torch.cuda for memory and streams."""

    def __init__(self) -> None:
        super().__init__("torch.lazy")
        self.default_generators = ()
        self.reset: list[int] = []
        self.Stream = lambda device: SimpleNamespace(device=device)
        self.Event = SimpleNamespace

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def memory_allocated(self, index: int) -> int:
        return 10 + index

    def memory_reserved(self, index: int) -> int:
        return 20 + index

    def max_memory_allocated(self, index: int) -> int:
        return 15 + index

    def reset_peak_memory_stats(self, index: int) -> None:
        self.reset.append(index)

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(total_memory=100)


def test_memory_streams_and_events_come_from_the_module() -> None:
    module = Rich()
    backend = GeneratorBackend("lazy", module)
    stats = backend.memory(ONE)
    assert stats is not None
    assert (stats.allocated, stats.reserved, stats.peak_allocated, stats.total) == (11, 21, 16, 100)
    backend.reset_peak(ONE)
    assert module.reset == [1]
    assert backend.side_stream(ONE).device == ONE  # type: ignore[union-attr]
    assert backend.event(ONE) is not None


def test_discovery_turns_whatever_a_module_raises_into_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Rich()
    monkeypatch.setattr(module, "is_available", lambda: 1 / 0)
    backend = GeneratorBackend("lazy", module)
    assert not backend.is_available()
    assert "ZeroDivisionError" in str(backend.why_unavailable())
    assert backend.device_count() == 0
