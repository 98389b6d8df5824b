"""Coordinator: what the ranks of one job do together. A facade; each method's work is a room of its own."""

from __future__ import annotations

from typing import Any

import torch


class Coordinator:
    """One per process: under torchrun, under ``torch_xla.launch``, or alone.

    Args:
        device_type: what this rank trains on; None finds it out.
        rule: ``"error"``, ``"warn"`` or ``"all"``: the single-device-type rule, over ranks.
        timeout: seconds that a check waits for the other ranks.
    """

    def __init__(self, device_type: str | None = None, *, rule: str = "error", timeout: float = 60.0) -> None:
        self.device_type = device_type
        self.rule = rule
        self.timeout = timeout

    def fully_shard(self, model: torch.nn.Module, units: Any, **options: Any) -> Any:
        """See :func:`distckpt.ranks.fsdp.fully_shard`."""
        from distckpt.ranks.fsdp import fully_shard

        return fully_shard(self, model, units, **options)

    def attach(self, schedule_or_stages: Any, **options: Any) -> Any:
        """See :func:`distckpt.ranks.pipeline.attach`."""
        from distckpt.ranks.pipeline import attach

        return attach(self, schedule_or_stages, **options)

    def streams(self, mesh: Any, seed: int, **options: Any) -> Any:
        """See :func:`distckpt.ranks.streams.seed_streams`."""
        from distckpt.ranks.streams import seed_streams

        return seed_streams(mesh, seed, **options)

    def check_streams(self) -> Any:
        """See :func:`distckpt.ranks.stream_check.check_streams`."""
        from distckpt.ranks.stream_check import check_streams

        return check_streams()

    def partition(self, group: Any, **options: Any) -> Any:
        """See :class:`distckpt.ranks.partition.Partition`."""
        from distckpt.ranks.partition import Partition

        return Partition(group, **options)

    def state_dict(self) -> dict[str, Any]:
        """See :func:`distckpt.ranks.streams.state_dict`."""
        from distckpt.ranks.streams import state_dict

        return state_dict(self)

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """See :func:`distckpt.ranks.streams.load_state_dict`."""
        from distckpt.ranks.streams import load_state_dict

        load_state_dict(self, state, strict)
