"""What watch mode stands on: autograd's device threads inherit the dispatch modes of who called backward."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import distckpt as dc
from tests.fakes.install import install_fake
from tests.ranks.spawn import report

seen: list[tuple[str, str]] = []


class Mode(TorchDispatchMode):
    """Notes what is called during a replay, and on which thread."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if dc.is_recomputing():
            main = threading.current_thread() is threading.main_thread()
            seen.append((func._schema.name.split("::")[1], "main" if main else "autograd's"))
        return func(*args, **(kwargs or {}))


def main() -> None:
    """One region on the fake device."""
    try:
        install_fake()
    except RuntimeError:  # this torch cannot have one
        return report(None)
    x = torch.ones(4).to("fake:0").requires_grad_()
    with Mode():
        dc.checkpoint(lambda x: x.sin().exp(), x).sum().backward()
    return report({"threads": sorted({thread for _, thread in seen}), "ops": [op for op, _ in seen]})


main()
os._exit(0)  # the thread of a device in Python may abort when the interpreter ends
