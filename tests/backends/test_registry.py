"""Finding a backend: the table, registration by code, entry points, torch's modules, and errors for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import distckpt_backends
import pytest
import torch
from distckpt_backends import registry
from distckpt_backends.cpu import CpuBackend
from distckpt_backends.errors import BackendLoadError, DuplicateBackendError, UnknownDeviceTypeError
from distckpt_backends.generator import GeneratorBackend

from tests.fakes.module import FakeModule


class Maia(CpuBackend):
    """A backend for a device type that nobody has."""

    device_type = "maia"
    up = True

    def is_initialized(self) -> bool:
        return self.up


@pytest.fixture
def clean() -> Iterator[None]:
    yield
    distckpt_backends.unregister_backend("maia")
    distckpt_backends.unregister_backend("cuda")
    registry._entries = None


def provide(monkeypatch: pytest.MonkeyPatch, *entries: Any) -> None:
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [e for e in entries if group == registry.GROUP]
    )
    monkeypatch.setattr(registry, "_entries", None)


def entry(value: str, dist: str) -> Any:
    found = EntryPoint("maia", value, registry.GROUP)
    return SimpleNamespace(
        name=found.name, value=value, load=found.load, dist=SimpleNamespace(name=dist, version="1.0")
    )


@pytest.mark.parametrize("kind", ["nonsense", "hpu", "meta", "functional"])
def test_an_unknown_type_is_an_error_that_says_where_was_looked(kind: str) -> None:
    with pytest.raises(UnknownDeviceTypeError, match=r"^\[DC201\] ") as caught:
        distckpt_backends.get(kind)
    assert registry.GROUP in str(caught.value)
    assert "register_backend" in str(caught.value)


def test_an_unknown_type_is_looked_for_again_the_next_time(clean: None) -> None:
    with pytest.raises(UnknownDeviceTypeError):
        distckpt_backends.get("maia")
    distckpt_backends.register_backend("maia", Maia)
    assert isinstance(distckpt_backends.get("maia"), Maia)


def test_a_registered_factory_runs_at_first_use_and_once(clean: None) -> None:
    made: list[Maia] = []

    def factory() -> Maia:
        made.append(Maia())
        return made[-1]

    distckpt_backends.register_backend("maia", factory)
    assert made == []
    assert distckpt_backends.get("maia") is distckpt_backends.get("maia") is made[0]


def test_a_registered_backend_is_live_while_its_runtime_is(clean: None) -> None:
    distckpt_backends.register_backend("maia", Maia)
    backend = distckpt_backends.get("maia")
    assert backend in distckpt_backends.live()
    backend.up = False  # type: ignore[attr-defined]
    assert backend not in distckpt_backends.live()


def test_registering_a_taken_type_needs_replace(clean: None) -> None:
    with pytest.raises(DuplicateBackendError, match=r"^\[DC202\] "):
        distckpt_backends.register_backend("cuda", Maia)
    distckpt_backends.register_backend("maia", Maia)
    with pytest.raises(DuplicateBackendError):
        distckpt_backends.register_backend("maia", Maia)


def test_unregistering_brings_the_built_in_backend_back(clean: None) -> None:
    class Mine(CpuBackend):
        device_type = "cuda"

    distckpt_backends.register_backend("cuda", Mine, replace=True)
    assert type(distckpt_backends.get("cuda")) is Mine
    distckpt_backends.unregister_backend("cuda")
    assert type(distckpt_backends.get("cuda")).__name__ == "CudaBackend"


def test_a_backend_of_another_type_than_registered_is_refused(clean: None) -> None:
    distckpt_backends.register_backend("maia", CpuBackend)
    with pytest.raises(BackendLoadError, match="says that it is for 'cpu'"):
        distckpt_backends.get("maia")


def test_a_package_provides_a_type_by_entry_point(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, entry(f"{__name__}:Maia", "maia-torch"))
    monkeypatch.setitem(__import__("sys").modules, __name__, SimpleNamespace(Maia=Maia))
    assert isinstance(distckpt_backends.get("maia"), Maia)
    assert "maia" in distckpt_backends.known_types()


def test_two_packages_for_one_type_are_both_named(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, entry("a:b", "one"), entry("c:d", "two"))
    with pytest.raises(DuplicateBackendError, match=r"one 1\.0 \(a:b\) and two 1\.0 \(c:d\)"):
        distckpt_backends.get("maia")


def test_a_broken_package_is_named(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, entry("no_such_module_here:b", "broken"))
    with pytest.raises(BackendLoadError, match=r"(?s)DC206.*broken 1\.0.*ModuleNotFoundError"):
        distckpt_backends.get("maia")


def test_entry_points_are_not_read_for_built_in_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: pytest.fail("read"))
    monkeypatch.setattr(registry, "_entries", None)
    # another test of this process may have put a device module into torch, for which packages are asked
    monkeypatch.setattr(registry._torch, "registered_module_types", list)
    for scanned in ("_candidates", "_scanned"):  # put back what the scan below replaces
        monkeypatch.setattr(registry, scanned, getattr(registry, scanned))
    for kind in registry.BUILTIN:
        assert distckpt_backends.get(kind).device_type == kind
    registry._scan()


def test_a_type_with_a_torch_module_needs_no_backend_of_its_own(lazy: FakeModule) -> None:
    backend = distckpt_backends.get("lazy")
    assert type(backend) is GeneratorBackend
    assert backend.live_devices() == (torch.device("lazy", 0), torch.device("lazy", 1))


def test_a_device_module_that_appears_later_is_live_at_once(lazy: FakeModule) -> None:
    lazy._initialized = False
    assert "lazy" not in [b.device_type for b in distckpt_backends.live()]
    lazy._initialized = True
    assert "lazy" in [b.device_type for b in distckpt_backends.live()]
