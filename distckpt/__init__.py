"""distckpt: recompute activations instead of storing them, exactly, on one device or on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distckpt import compat as compat
    from distckpt import devices as devices
    from distckpt import errors as errors
    from distckpt import rng as rng
    from distckpt.engine import Session as Session
    from distckpt.engine import checkpoint as checkpoint
    from distckpt.engine import checkpoint_sequential as checkpoint_sequential
    from distckpt.engine import is_recomputing as is_recomputing
    from distckpt.engine import pin as pin
    from distckpt.engine import session as session
    from distckpt.engine.region import set_checkpoint_debug_enabled as set_checkpoint_debug_enabled
    from distckpt.engine.region import set_checkpoint_early_stop as set_checkpoint_early_stop
    from distckpt.engine.rng import DefaultDeviceType as DefaultDeviceType
    from distckpt.errors import CheckpointError as CheckpointError
    from distckpt.errors import DistckptError as DistckptError
    from distckpt.modules import Applied as Applied
    from distckpt.modules import apply as apply
    from distckpt.policy import CheckpointPolicy as CheckpointPolicy
    from distckpt.policy import SelectiveCheckpointContext as SelectiveCheckpointContext
    from distckpt.policy import create_selective_checkpoint_contexts as create_selective_checkpoint_contexts
    from distckpt.ranks import Coordinator as Coordinator
    from distckpt.ranks import guard_units as guard_units

if not TYPE_CHECKING:  # out of the checkers' sight, or any name at all would pass them
    import contextlib
    import importlib
    import sys

    _ROOMS = {
        "": "errors compat devices rng",
        ".errors": "CheckpointError DistckptError",
        ".engine": "Session checkpoint checkpoint_sequential is_recomputing pin session",
        ".engine.rng": "DefaultDeviceType",
        ".engine.region": "set_checkpoint_debug_enabled set_checkpoint_early_stop",
        ".policy": "CheckpointPolicy SelectiveCheckpointContext create_selective_checkpoint_contexts",
        ".modules": "Applied apply",
        ".ranks": "Coordinator guard_units",  # what only jobs of several ranks use comes when it is named
    }
    _HOMES = {name: room for room, names in _ROOMS.items() for name in names.split()}
    __all__ = sorted(_HOMES)

    def _load(name):
        room = _HOMES[name]
        found = importlib.import_module(f"distckpt{room or '.' + name}")
        globals()[name] = getattr(found, name) if room else found

    def _load_all():
        # A torch that lacks something: it is said again with the first name that needs it. Until then
        # `distckpt doctor` can say what is missing.
        from distckpt_backends.errors import UnsupportedTorch

        with contextlib.suppress(UnsupportedTorch):
            for name, room in _HOMES.items():
                if room != ".ranks":
                    _load(name)

    # Where torch is imported already, every name is here at once, also for a compiler that looks at them. Where it is
    # not, `distckpt --help` would otherwise wait seconds for it, so they come with the first one that is asked for.
    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'distckpt' has no attribute {name!r}")
        _load(name)
        _load_all()
        return globals()[name]

    def __dir__():
        return __all__

    if "torch" in sys.modules:
        _load_all()
