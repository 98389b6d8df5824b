"""A callback for transformers' ``Trainer``. Models need no more than ``dc.apply(model)``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

from distckpt.errors import BothSwitches
from distckpt.modules import Applied, apply


class DistckptCallback(TrainerCallback):
    """``dc.apply`` for the time of ``Trainer.train()``, with or without ``activation_checkpointing=True``.

    The Trainer switches its own checkpointing on inside ``train()``, after any ``dc.apply`` before it. This callback
    comes later and wins: torch's checkpoint is switched off and the same layers become regions.

    Args:
        globs: which modules, as for ``dc.apply``; None for the model's layers.
        options: options of ``dc.apply``.

    Raises:
        BothSwitches: when the Trainer is made, for FSDP's own activation checkpointing, and for
            ``activation_checkpointing_kwargs`` that would be ignored (DC603).
        DistckptError: whatever ``dc.apply`` raises, at the start of ``train()``.
    """

    def __init__(self, globs: str | Iterable[str] | None = None, **options: Any) -> None:
        self.globs = globs
        self.options = options
        self.handle: Applied | None = None

    def on_init_end(self, args: object, state: object, control: object, **others: Any) -> None:
        """Refuse settings that cannot both be honoured."""
        _refuse_fsdp(args)
        if _flag(args):
            _refuse_kwargs(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        """Make the regions."""
        self.on_init_end(args, state, control)  # a callback may have been added after the Trainer was made
        if self.handle is not None:  # an earlier train() that ended with an exception
            self.handle.remove()
        if _flag(args):
            disable = getattr(model, "activation_checkpointing_disable", None)
            (disable or model.gradient_checkpointing_disable)()  # the name in earlier versions
        self.handle = apply(model, self.globs, **self.options)

    def on_train_end(self, args: object, state: object, control: object, **others: Any) -> None:
        """Take the regions off."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


def _flag(args: object) -> bool:
    return bool(
        getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None)
    )


def _refuse_fsdp(args: object) -> None:
    config = getattr(args, "fsdp_config", None)
    asked = config.get("activation_checkpointing") if isinstance(config, dict) else None
    if asked is None:
        asked = os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false")
    if str(asked).lower() in ("1", "true", "yes", "y", "t", "on"):
        raise BothSwitches(
            "FSDP's own activation checkpointing is on, and so is distckpt",
            where="fsdp_config['activation_checkpointing'] or FSDP_ACTIVATION_CHECKPOINTING",
            why="accelerate would wrap every layer in torch's checkpoint, without its random state under FSDP2",
            fix="set it to false; the callback does the checkpointing",
        )


def _refuse_kwargs(args: object) -> None:
    given = getattr(args, "activation_checkpointing_kwargs", None) or getattr(
        args, "gradient_checkpointing_kwargs", None
    )
    ignored = {
        key: value for key, value in dict(given or {}).items() if (key, value) != ("use_reentrant", False)
    }
    if ignored:
        raise BothSwitches(
            f"activation_checkpointing_kwargs has {', '.join(sorted(ignored))}, and DistckptCallback is there",
            why="the callback replaces transformers' checkpointing, so its arguments would be ignored",
            fix="give the options of dc.apply to DistckptCallback(...), and leave activation_checkpointing_kwargs out",
        )
