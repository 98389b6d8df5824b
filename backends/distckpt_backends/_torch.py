"""Private or version-dependent names of torch and torch_xla that the backends need; nothing else may use
any."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, ModuleType
from typing import Any

import torch

from .private import NEWEST, OLDEST, PrivateNames, version

NAMES = PrivateNames(
    {
        "devices": ("torch._C:_get_privateuse1_backend_name",),
        "devices that compile whole programs": (
            "torch._C:_current_graph_task_id",
            "torch.autograd:Variable._execution_engine.queue_callback",
            "torch.utils._python_dispatch:_disable_current_modes",
        ),
    }
)


def compiled_types() -> tuple[str, ...]:
    """The accelerator types that this build of torch was compiled for, whether or not the machine has one."""
    found = []
    if torch.backends.cuda.is_built():
        found.append("cuda")
    if torch.backends.mps.is_built():
        found.append("mps")
    for kind in ("xpu", "mtia"):  # torch 2.9 to 2.15: a private predicate in both modules
        check = getattr(getattr(torch, kind, None), "_is_compiled", None)
        if check is not None and check():
            found.append(kind)
    return tuple(found)


def private_use_name() -> str:
    """The name that a device extension gave to PrivateUse1; "privateuseone" while none did."""
    NAMES.need("devices")
    return torch._C._get_privateuse1_backend_name()


def device_module(device_type: str) -> ModuleType | None:
    """`torch.<device_type>` if `device_type` is a device type and has a module; imports nothing."""
    try:
        torch.device(device_type)
    except RuntimeError:
        return None
    found = getattr(torch, device_type, None)
    return found if isinstance(found, ModuleType) else None


def registered_module_types() -> tuple[str, ...]:
    """Device types that someone gave a module through torch's registration function, beside those torch
    ships.

    That function puts the module into `sys.modules` as `torch.<type>`; only types that torch has no module
    for are asked, so the list is fixed.
    """
    return tuple(k for k in _WITHOUT_MODULE if f"torch.{k}" in sys.modules)


_WITHOUT_MODULE = ("lazy", "hpu", "ipu", "ve", "fpga", "maia", "vulkan", "opengl", "opencl", "ideep")


# What follows the start of the Mersenne Twister: its seed, position and flag, its words, and two cached normals.
_BEFORE_WORDS, _WORDS, _CACHED = 20, 624 * 4, 28
_FIRST_WORDS = 32 * 4


class GeneratorMemory:
    """The first and the last bytes of what torch keeps for a CPU generator, as they are now."""

    __slots__ = ("first", "last")

    def __init__(self, address: int) -> None:
        self.first = (ctypes.c_char * (_BEFORE_WORDS + _FIRST_WORDS)).from_address(address)
        self.last = (ctypes.c_char * _CACHED).from_address(address + _BEFORE_WORDS + _WORDS)

    def read(self) -> tuple[bytes, bytes]:
        """Both."""
        return self.first.raw, self.last.raw

    def moved(self, mark: tuple[bytes, bytes]) -> bool:
        """Whether they are others than in ``mark``."""
        return self.first.raw != mark[0] or self.last.raw != mark[1]


def cpu_generator_memory(generator: torch.Generator) -> GeneratorMemory | None:
    """The memory in which torch keeps the state of a CPU generator.

    None where it cannot be found for certain: see Note [Generator memory] in ``cpu.py``. Known for torch 2.9 to
    2.15 on Linux; any other is asked by ``get_state()``.
    """
    if sys.platform != "linux" or not OLDEST <= version() <= NEWEST:
        return None
    try:
        base = generator._cdata  # type: ignore[attr-defined]
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(base)
            block = memory.read(4096)  # ends early where the next page is not there
    except (AttributeError, OSError, OverflowError, ValueError):
        return None
    state = generator.get_state()
    words = struct.unpack_from("<624Q", ctypes.string_at(state.data_ptr(), state.numel()), 24)
    try:
        found = struct.pack("=624I", *words)
    except struct.error:  # the layout of the state itself is another one
        return None
    start = block.find(found) - _BEFORE_WORDS
    size = _BEFORE_WORDS + _WORDS + _CACHED
    if start < 0 or start + size > len(block):
        return None
    return GeneratorMemory(base + start)


# torch_xla 2.9 --------------------------------------------------------------------------------------------


def xla_module() -> Any:
    """torch_xla, imported now if it was not."""
    import torch_xla

    return torch_xla


def xla_is_initialized() -> bool:
    """True when torch_xla is imported and its runtime is up; imports nothing."""
    module = sys.modules.get("torch_xla")
    native = getattr(module, "_XLAC", None)  # missing while torch_xla is still being imported
    return native is not None and native._xla_runtime_is_initialized()


def pjrt_device() -> str | None:
    """The PJRT device that the environment names ("CPU", "TPU"); None when none does. Imports nothing."""
    value = os.environ.get("PJRT_DEVICE")
    return value.split("_")[0] if value else None


def xla_devices() -> list[str]:
    """The device names of this process, such as "xla:0"; one virtual device under SPMD. Initialises the
    runtime."""
    from torch_xla.core import xla_model

    return xla_model.get_xla_supported_devices()


def xla_default_device() -> str:
    """The name of the device that "xla" without an index means. Initialises the runtime."""
    return sys.modules["torch_xla"]._XLAC._xla_get_default_device()


def xla_get_seed(device: str) -> int:
    """The running seed of `device`: half the cost of the public function, which formats the name again."""
    return sys.modules["torch_xla"]._XLAC._xla_get_rng_seed(device)


def xla_set_seed(seed: int, device: str) -> None:
    """Set the running seed of `device`, an unsigned 64-bit int."""
    sys.modules["torch_xla"]._XLAC._xla_set_rng_seed(seed, device)


def xla_get_root_seed(device: str) -> int | None:
    """The seed that the running seed of `device` started from. One scalar goes to the device and back.

    None where torch_xla cannot tell. Asking winds the running seed back to it, so that is set again, as a root.
    """
    ask = getattr(sys.modules["torch_xla"]._XLAC, "_get_base_seed_as_tensor", None)
    if ask is None:
        return None
    seed = xla_get_seed(device)
    with _unseen():
        root = int(ask(device).item()) & ((1 << 64) - 1)
    xla_set_seed(seed, device)
    return root


def xla_draw(device: torch.device, count: int) -> None:
    """Draw `count` times on `device` and use nothing: only its running seed moves."""
    with _unseen():
        for _ in range(count):
            torch.rand((), device=device)


@contextmanager
def _unseen() -> Iterator[None]:
    """Run operators that neither autograd nor any mode of the user sees."""
    from torch.utils._python_dispatch import _disable_current_modes  # torch 2.9 to 2.15

    with torch.no_grad(), torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def backward_number() -> int:
    """Which backward autograd runs on this thread, by a number that is never used again; -1 for none."""
    NAMES.need("devices that compile whole programs")
    return torch._C._current_graph_task_id()


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Run `callback` when the backward that is running ends."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def xla_memory(device: str) -> dict[str, Any]:
    """Memory of `device` in bytes: bytes_used, bytes_limit, peak_bytes_used. RuntimeError on the CPU
    runtime."""
    from torch_xla.core import xla_model

    return dict(xla_model.get_memory_info(torch.device(device)))


def xla_barrier(tensors: list[torch.Tensor]) -> None:
    """Put the graph nodes of these tensors, all of one device, behind one optimization barrier, in place."""
    from torch_xla.core import xla_model

    xla_model.optimization_barrier_(tensors)


def xla_fsdp_unit() -> type | None:
    """The class of torch_xla's own FSDP units; None while nobody imported it. Imports nothing."""
    module = sys.modules.get("torch_xla.distributed.fsdp.xla_fully_sharded_data_parallel")
    return getattr(module, "XlaFullyShardedDataParallel", None)


XLA_SCAN_NODE = "ScanBackward"
"""What autograd calls the node of torch_xla's scan."""


def in_xla_scan(thread: int) -> bool:
    """True when torch_xla's scan is running on a thread, which may be waiting for the backward on another one."""
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch_xla.experimental.scan":
            return True
        frame = frame.f_back
    return False


def xla_sync(device: str) -> None:
    """Compile and run everything pending on `device` and wait for it.

    `torch_xla.sync` serves the default device only, so other devices go to the step marker below it.
    """
    torch_xla = sys.modules["torch_xla"]
    if device == torch_xla._XLAC._xla_get_default_device():
        torch_xla.sync(wait=True)
    else:
        torch_xla._XLAC._xla_step_marker(device, [], wait=True)


def xla_eager() -> AbstractContextManager[Any]:
    """Inside, torch_xla runs each operation as a program of its own instead of tracing it."""
    from torch_xla.experimental.eager import eager_mode_context

    return eager_mode_context(True)
