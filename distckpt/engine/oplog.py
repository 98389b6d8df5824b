"""A log of the operators that run in a block, each with the user's source line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HIDDEN = ("/torch/", "/distckpt/engine/", "/distckpt_backends/", "/distckpt/compat/", "/distckpt/policy/")


class Entry(NamedTuple):
    """One operator: its call in words, the modules around it (outermost first), and its frames (innermost first)."""

    op: str
    modules: tuple[str, ...]
    frames: tuple[tuple[str, int, str], ...]

    @property
    def place(self) -> str:
        """``file:line`` of the user's code, and the module path."""
        for file, line, name in self.frames:
            if not any(part in file for part in _HIDDEN):
                within = f" in {'.'.join(self.modules)}" if self.modules else ""
                return f"{file}:{line} ({name}){within}"
        return "an unknown place"


def _short(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    return repr(x) if len(repr(x)) < 40 else type(x).__name__


def _frames() -> tuple[tuple[str, int, str], ...]:
    found = []
    frame = sys._getframe(2)
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(found)


class _Mode(TorchDispatchMode):
    def __init__(self, log: OpLog) -> None:
        super().__init__()
        self._log = log

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.detach.default:  # the engine's own, and not the same in both runs
            shown = ", ".join([*map(_short, args), *(f"{k}={_short(v)}" for k, v in (kwargs or {}).items())])
            result = ", ".join(_short(x) for x in tree_leaves(out))
            self._log.entries.append(
                Entry(f"{result} = torch.ops.{func}({shown})", tuple(self._log.modules), _frames())
            )
        return out


class OpLog:
    """The operators of one run."""

    def __init__(self, names: dict[int, str] | None = None) -> None:
        self.entries: list[Entry] = []
        self.modules: list[str] = []
        self._names = names or {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Log what runs inside the block."""

        def enter(module: torch.nn.Module, args: Any) -> None:
            self.modules.append(self._names.get(id(module)) or type(module).__name__)

        def leave(module: torch.nn.Module, args: Any, out: Any) -> None:
            if self.modules:
                self.modules.pop()

        hooks = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        try:
            with _Mode(self):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self.modules.clear()
