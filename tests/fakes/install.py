"""Putting the fake device types into torch; once per process, and for good."""

from __future__ import annotations

from typing import Any

import torch

from .module import FakeModule
from .tensor import OWNERS, DeviceTensor, run

_installed: dict[str, FakeModule] = {}
_libraries: list[Any] = []  # a library object takes its kernels with it when it dies


def install_lazy(count: int = 2) -> FakeModule:
    """Device type `lazy` with `count` devices; autograd runs it on the calling thread, as it does the CPU."""
    if "lazy" not in _installed:
        module = FakeModule("lazy", count)
        torch._register_device_module("lazy", module)
        _finish("lazy", module, "Lazy")
    return _installed["lazy"]


def install_fake() -> FakeModule:
    """Device type `fake` with one device: PrivateUse1. Must come before the first backward; torch >= 2.10."""
    if "fake" not in _installed:
        from torch.utils import backend_registration

        setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
        if setup is None:
            raise RuntimeError(
                f"torch {torch.__version__} cannot have a device type in pure Python beside lazy"
            )
        torch.utils.rename_privateuse1_backend("fake")  # before torch.device("fake:0") can be written
        module = FakeModule("fake", 1)
        setup("fake", backend_module=module)
        _finish("fake", module, "PrivateUse1")
    return _installed["fake"]


def _finish(kind: str, module: FakeModule, key: str) -> None:
    _installed[kind] = module
    OWNERS[kind] = module
    library = torch.library.Library("aten", "IMPL", key)
    library.impl("empty.memory_format", _empty)
    library.impl("empty_strided", _empty_strided)
    for name, overload in _RESIZING:
        op = getattr(getattr(torch.ops.aten, name), overload)
        library.impl(name if overload == "default" else f"{name}.{overload}", _whole(op))
    _libraries.append(library)


# Factories that torch makes from an empty tensor and a resize; a DeviceTensor cannot change its shape.
_RESIZING = (
    *(("arange", o) for o in ("default", "start", "start_step")),
    *(("randperm", o) for o in ("default", "generator")),
    *(("eye", o) for o in ("default", "m")),
    ("linspace", "default"),
    ("logspace", "default"),
)


def _whole(op: Any) -> Any:
    return lambda *args, **kwargs: run(op, args, kwargs)


def _empty(
    size: Any,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> torch.Tensor:
    held = torch.empty(
        size, dtype=dtype, device="cpu", memory_format=memory_format or torch.contiguous_format
    )
    return DeviceTensor(held, torch.device(device.type, OWNERS[device.type].index(device)))


def _empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any, pin_memory: Any = None
) -> torch.Tensor:
    held = torch.empty_strided(size, stride, dtype=dtype, device="cpu")
    return DeviceTensor(held, torch.device(device.type, OWNERS[device.type].index(device)))
