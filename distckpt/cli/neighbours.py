"""Other libraries that checkpoint activations too: which are here, and which would take our regions' place."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distckpt.cli.machine import installed
from distckpt.cli.page import Finding
from distckpt.errors import Conflict

# What these do at import; nothing is imported to find that out.
_PATCHERS = {
    "unsloth": "replaces torch.utils.checkpoint.checkpoint when it is imported",
    "unsloth_zoo": "replaces torch.utils.checkpoint.checkpoint when it is imported",
}


def findings(environment: Mapping[str, str], imports: Sequence[str] = ()) -> list[Finding]:
    """A line per neighbour that is installed, and one per name of torch's that somebody replaced.

    ``imports`` are modules to import first, for what they patch.
    """
    found = [*_accelerate(environment), *_transformers()]
    for name, what in _PATCHERS.items():
        version = installed(name)
        if version is not None:
            fix = "import it first, then use dc.apply or dc.checkpoint; see: distckpt doctor --import " + name
            found.append(Finding("warn", f"{name} {version}", what, fix))
    for name in imports:
        found += _imported(name)
    found += _patched()
    return found or [Finding("ok", "none", "no library here is known to conflict")]


def _accelerate(environment: Mapping[str, str]) -> list[Finding]:
    version = installed("accelerate")
    if version is None:
        return []
    subject = f"accelerate {version}"
    place = _loses_rng()
    switch = _accelerate_switch(environment)
    if switch and place:
        error = Conflict(
            f"{switch}: its FSDP2 checkpointing drops the random state, so dropout gradients are wrong",
            why=f"preserve_rng_state=False, {place}",
            fix="turn that off and call dc.apply(model, ...) before Accelerator.prepare",
        )
        return [Finding.failed(subject, error)]
    if place:
        text = f"its own FSDP2 checkpointing is off, and should stay off: it drops the random state ({place})"
        return [Finding("ok", subject, text)]
    return [Finding("ok", subject, "call dc.apply(model, ...) before Accelerator.prepare")]


def _loses_rng() -> str | None:
    """Where the installed accelerate turns the random state off, read from its source."""
    spec = find_spec("accelerate")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder) / "utils" / "fsdp_utils.py"
        if file.is_file():
            for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
                if "checkpoint_wrapper(" in line and "preserve_rng_state=False" in line:
                    return f"{file.name}:{number}"
    return None


def _accelerate_switch(environment: Mapping[str, str]) -> str | None:
    """The switch that turns accelerate's own checkpointing on in this environment, or None."""
    name = "FSDP_ACTIVATION_CHECKPOINTING"
    if environment.get(name, "").lower() in ("1", "true", "yes", "on"):
        return f"{name}={environment[name]}"
    cache = environment.get("HF_HOME") or os.path.join(
        environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    file = Path(cache) / "accelerate" / "default_config.yaml"
    if file.is_file():
        for line in file.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name.lower() and value.split("#")[0].strip().lower() == "true":
                return f"{name.lower()} in {file}"
    return None


def _transformers() -> list[Finding]:
    version = installed("transformers")
    if version is None:
        return []
    old = version.split(".")[0].isdigit() and int(version.split(".")[0]) < 5
    flag = "gradient_checkpointing" if old else "activation_checkpointing"
    text = f"leave TrainingArguments({flag}=) at False where you use dc.apply: it replaces our function"
    return [Finding("ok", f"transformers {version}", text)]


def _imported(name: str) -> list[Finding]:
    try:
        importlib.import_module(name)
    except Exception as error:
        text = f"cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
        return [Finding("fail", name, text, "leave out --import, or install it", Conflict.code)]
    return []


def _watched() -> list[tuple[str, Any]]:
    """Names of torch's that a checkpointing library may replace, with what they are now."""
    import torch
    import torch.utils.checkpoint as torchs

    hooks = torch.autograd.graph.saved_tensors_hooks
    return [
        *((f"torch.utils.checkpoint.{name}", getattr(torchs, name, None)) for name in torchs.__all__),
        ("torch.autograd.backward", torch.autograd.backward),
        ("torch.autograd.graph.saved_tensors_hooks", hooks),
        ("torch.Tensor.backward", torch.Tensor.backward),
    ]


def patched() -> list[tuple[str, str]]:
    """Names of torch's that are somebody else's now, each with the module that it comes from."""
    found = []
    for name, value in _watched():
        if not callable(value):
            continue
        home = getattr(value, "__module__", None) or ""
        code = getattr(value, "__code__", None)
        if code is not None and _module_of(code) is not None:
            home = _module_of(code) or home  # a wrapper may call itself torch's
        if home.split(".")[0] not in ("torch", "distckpt", "typing", "contextlib", "builtins"):
            found.append((name, home))
    return found


def _module_of(code: Any) -> str | None:
    """The module that a function's file belongs to: its name says little where functools.wraps was used."""
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) == code.co_filename:
            return name
    return None


def _patched() -> list[Finding]:
    by_module: dict[str, list[str]] = {}
    for name, module in patched():
        by_module.setdefault(module, []).append(name)
    return [
        Finding.failed(
            module,
            Conflict(
                f"replaces {', '.join(names)}",
                why="code that calls these names reaches neither torch nor us",
                fix="import it before distckpt.compat.install(), or use dc.apply and dc.checkpoint by name",
            ),
        )
        for module, names in by_module.items()
    ]
