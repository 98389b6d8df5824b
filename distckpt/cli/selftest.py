"""The replay self-test: every case plainly and as a region, compared bit by bit, in every way to make a region."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import distckpt_backends
import torch
import torch.nn.functional as F
from distckpt_backends import Backend
from torch import nn

import distckpt as dc
from distckpt.engine.region import DeterminismCheck

Region = Callable[..., Any]
Case = Callable[[torch.device, Region], tuple[torch.Tensor, list[torch.Tensor]]]

N = 16


def _leaf(device: torch.device, *shape: int) -> torch.Tensor:
    """Numbers that depend on nothing but the shape: a self-test must not hang on a device's generator."""
    count = int(torch.tensor(shape).prod())
    values = torch.sin(torch.arange(count, dtype=torch.float32) * 0.7).view(shape)
    return values.to(device).requires_grad_()


def _linear(device: torch.device, region: Region) -> Any:
    x, w = _leaf(device, N, N), _leaf(device, N, N)
    return region(lambda a: F.gelu(F.linear(F.gelu(F.linear(a, w)), w)), x).sum(), [x, w]


def _dropout(device: torch.device, region: Region) -> Any:
    x = _leaf(device, N, N)
    y = region(lambda a: F.dropout(torch.sin(a), 0.5) * a, x)
    return region(lambda a: F.dropout(torch.sin(a), 0.5) * a, y).sum(), [x]


def _attention(device: torch.device, region: Region) -> Any:
    q, k, v = (_leaf(device, 2, 2, 8, 8) for _ in range(3))
    return region(F.scaled_dot_product_attention, q, k, v, dropout_p=0.25, is_causal=True).sum(), [q, k, v]


def _autocast(device: torch.device, region: Region) -> Any:
    x, w = _leaf(device, N, N), _leaf(device, N, N)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = region(lambda a: torch.sigmoid(a @ w) @ w, x)
    return y.float().sum(), [x, w]


def _batch_norm(device: torch.device, region: Region) -> Any:
    norm = nn.BatchNorm1d(N).to(device)
    x = _leaf(device, 4, N)
    loss = region(lambda a: torch.tanh(norm(a)), x).square().sum()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return loss, [x, *norm.parameters(), norm.running_mean, norm.running_var]


def _nested(device: torch.device, region: Region) -> Any:
    x = _leaf(device, N, N)

    def inner(a: torch.Tensor) -> torch.Tensor:
        return F.dropout(torch.exp(-a * a), 0.25)

    return region(lambda a: region(inner, torch.sin(region(inner, a))), x).sum(), [x]


def _arguments(device: torch.device, region: Region) -> Any:
    x, w, b = _leaf(device, N, N), _leaf(device, N, N), _leaf(device, N)

    def fn(a: torch.Tensor, *, weight: torch.Tensor, rest: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.tanh(F.linear(a, weight, rest["bias"]))

    return region(functools.partial(fn, weight=w), x, rest={"bias": b}).sum(), [x, w, b]


AUTOCAST = "autocast to bfloat16"  # not every device type has it
CASES: dict[str, Case] = {
    "two linear layers": _linear,
    "dropout": _dropout,
    "attention with dropout": _attention,
    AUTOCAST: _autocast,
    "batch norm, in training": _batch_norm,
    "nested regions": _nested,
    "keywords and partials": _arguments,
}


_OURS, _TORCHS = "dc.checkpoint", "torch's names"
_WAYS: dict[str, Callable[[bool], Region]] = {
    _OURS: lambda deferred: functools.partial(_ours, "default" if deferred else "bitwise"),
    _TORCHS: lambda _: functools.partial(dc.compat.checkpoint, use_reentrant=False),
}
_STATE = "state"  # of modules; torch's names change it twice, as torch does


def _ours(check: DeterminismCheck, fn: Any, *args: Any, **kwargs: Any) -> Any:
    # Comparing every saved value would flush a deferred device in the middle of its program.
    return dc.checkpoint(determinism_check=check)(fn)(*args, **kwargs)


def _plain(fn: Any, *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


@dataclass(frozen=True)
class Result:
    """One case on one device: ``status`` is "equal", "differs" or "unsure" (the device itself is not
    deterministic there, or lacks an operator); ``detail`` says more."""

    device: str
    case: str
    way: str
    status: str
    detail: str = ""


def run(devices: Sequence[torch.device]) -> list[Result]:
    """Every case on every device; this initialises them. Random state and grad mode are left as they were.

    An accelerator without an index stands for all devices of its type, where only the running one can tell how many.
    """
    # All devices before the first backward: autograd counts them then, once, and torch_xla's later ones are unknown.
    dead = {device: error for device in devices if (error := _start(device)) is not None}
    found = [Result(str(device), "start the device", "", "differs", error) for device, error in dead.items()]
    alive = [each for device in devices if device not in dead for each in _every(device)]
    return found + [result for device in alive for result in _on(device)]


def _start(device: torch.device) -> str | None:
    try:
        if device.type != "cpu":
            distckpt_backends.get(
                device.type
            ).current_device()  # torch does not know a type whose package is not imported
        torch.zeros(1, device=device)
    except Exception as error:
        return _short(error)


def _every(device: torch.device) -> tuple[torch.device, ...]:
    unknown = device.index is None and device.type != "cpu"
    return distckpt_backends.get(device.type).live_devices() if unknown else (device,)


def _on(device: torch.device) -> list[Result]:
    backend = distckpt_backends.get(device.type)
    with backend.rng_fork([device] if backend.capabilities.rng else []), _cpu_fork(device):
        return [result for name, case in CASES.items() for result in _case(name, case, device, backend)]


@contextlib.contextmanager
def _cpu_fork(device: torch.device) -> Iterator[None]:
    with contextlib.nullcontext() if device.type == "cpu" else distckpt_backends.get("cpu").rng_fork():
        yield


def _case(name: str, case: Case, device: torch.device, backend: Backend) -> list[Result]:
    result = functools.partial(Result, str(device), name)
    if name == AUTOCAST and not backend.capabilities.autocast:
        return [result("", "unsure", f"no autocast: {backend.capabilities.why('autocast')}")]
    try:
        start = _states(device, backend)
        plain = _measure(case, device, backend, _plain)
        _restore(device, backend, start)
        again = _measure(case, device, backend, _plain)
    except Exception as error:
        return [result("", "unsure", f"does not run without regions either: {_short(error)}")]
    if _differences(plain, again):
        return [result("", "unsure", "two runs without regions differ already")]
    found = []
    for way, make in _WAYS.items():
        try:
            _restore(device, backend, start)
            ours = _measure(case, device, backend, make(backend.capabilities.deferred))
            promised = {k: v for k, v in plain.items() if way == _OURS or not k.startswith(_STATE)}
            wrong = _differences(promised, ours)
            found.append(result(way, "differs" if wrong else "equal", wrong))
        except Exception as error:
            found.append(result(way, "differs", _short(error)))
    return found


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _states(device: torch.device, backend: Backend) -> tuple[Any, Any]:
    cpu = distckpt_backends.get("cpu").rng_stash(torch.device("cpu"))
    return cpu, backend.rng_stash(device) if backend.capabilities.rng else None


def _restore(device: torch.device, backend: Backend, states: tuple[Any, Any]) -> None:
    distckpt_backends.get("cpu").rng_restore(torch.device("cpu"), states[0])
    if backend.capabilities.rng:
        backend.rng_restore(device, states[1])


def _measure(case: Case, device: torch.device, backend: Backend, region: Region) -> dict[str, Any]:
    """Everything that must not depend on regions: loss, values, gradients, and the random state that is left."""
    with torch.enable_grad(), backend.device_guard(device), backend.one_by_one(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss, tensors = case(device, region)
        loss.backward()
    after = _states(device, backend)
    backend.synchronize(device)
    found: dict[str, Any] = {"the loss": loss.detach().cpu(), "the CPU's random state": after[0]}
    found["the device's random state"] = after[1]
    for i, tensor in enumerate(tensors):
        if tensor.requires_grad:
            found[f"gradient {i}"] = None if tensor.grad is None else tensor.grad.cpu()
        else:
            found[f"{_STATE} {i}"] = tensor.detach().cpu()
    return found


def _same(a: object, b: object) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def _differences(a: dict[str, Any], b: dict[str, Any]) -> str:
    wrong = [name for name in a if not _same(a[name], b.get(name))]
    if not wrong:
        return ""
    far = [(a[n] - b[n]).abs().max().item() for n in wrong if _subtract(a[n], b.get(n))]
    return ", ".join(wrong) + (f": off by up to {max(far):.2e}" if far else "")


def _subtract(a: Any, b: Any) -> bool:
    floats = (t.is_floating_point() and t.shape == a.shape for t in (a, b) if isinstance(t, torch.Tensor))
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and all(floats)
