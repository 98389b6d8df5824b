"""Tensors that claim a fake device and compute on the host."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map

aten = torch.ops.aten


class Owner(Protocol):
    """Who holds the randomness of a fake device type."""

    def draw(self, index: int, numel: int) -> torch.Generator: ...

    def index(self, device: Any = None) -> int: ...


OWNERS: dict[str, Owner] = {}
"""The owner of each installed fake device type; a test may put another in for a while."""


class DeviceTensor(torch.Tensor):
    """A tensor on a fake device; `held` is the host tensor with its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device, requires_grad: bool = False) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.held}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an op whose tensors are on one fake device, with the randomness of that device."""
    if func is aten._to_copy.default:
        return _to_copy(args[0], **kwargs)
    if func is aten.copy_.default:
        _held(args[0]).copy_(_held(args[1]))
        return args[0]
    device = _device_of(func, args, kwargs)
    host_args, host_kwargs = tree_map(_held, args), tree_map(_held, kwargs)
    if host_kwargs.get("device") is not None:
        host_kwargs["device"] = torch.device("cpu")
    if torch.Tag.nondeterministic_seeded in func.tags and host_kwargs.get("generator") is None:
        out = _draw(func, host_args, host_kwargs, device)
    else:
        out = func(*host_args, **host_kwargs)
    if device.type == "cpu":
        return out
    written = _written(func, args, kwargs)
    if written is not None:
        if isinstance(written, DeviceTensor) and written.shape != written.held.shape:
            raise NotImplementedError(f"{func} resizes its output, which fake devices cannot")
        return written
    return tree_map(lambda o: DeviceTensor(o, device) if isinstance(o, torch.Tensor) else o, out)


def _to_copy(source: torch.Tensor, *, device: Any = None, **options: Any) -> torch.Tensor:
    target = source.device if device is None else torch.device(device)
    copied = aten._to_copy.default(_held(source), device="cpu", **options)
    return copied if target.type not in OWNERS else DeviceTensor(copied, _indexed(target))


def _device_of(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    named = kwargs.get("device")
    if named is not None:
        return _indexed(torch.device(named))
    found: torch.device | None = None
    for value in torch.utils._pytree.tree_leaves((args, kwargs)):
        # a scalar on the host mixes with everything, on real devices too; so do indices
        if not isinstance(value, torch.Tensor) or (value.device.type == "cpu" and value.dim() == 0):
            continue
        if value.device.type == "cpu" and func in (aten.index.Tensor, aten.index_put_.default):
            continue
        if found is not None and value.device != found and value.dim() > 0:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, got {found} and {value.device}"
            )
        found = value.device if found is None else found
    return torch.device("cpu") if found is None else found


def _draw(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> Any:
    numel = next((a.numel() for a in args if isinstance(a, torch.Tensor)), 64)
    kept = torch.default_generator.get_state()
    source = OWNERS[device.type].draw(device.index, numel)
    torch.default_generator.set_state(source.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        torch.default_generator.set_state(kept)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any | None:
    """The argument that `func` changed in place and returns; None for other ops."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return args[i] if i < len(args) else kwargs.get(argument.name)
    return None


def _held(value: Any) -> Any:
    return value.held if isinstance(value, DeviceTensor) else value


def _indexed(device: torch.device) -> torch.device:
    return torch.device(device.type, OWNERS[device.type].index(device)) if device.type in OWNERS else device
