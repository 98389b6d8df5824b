"""Slot: the place of one value that autograd would have saved."""

from __future__ import annotations

from typing import Any


class Slot:
    """What the graph of a region holds instead of a tensor.

    Autograd owns the slot; the region only knows it weakly. So a slot that is gone means that its part
    of the graph was freed, and a replay need not fill it. ``value`` is None except between a replay and
    the value's last use. ``meta`` is what was saved in the forward: (shape, dtype, device, version); the
    first three are None when nobody wants them checked. There is no ``__init__``: a call of one would
    cost more than the slot; whoever makes a slot sets both.
    """

    __slots__ = ("__weakref__", "meta", "value")

    meta: Any
    value: Any
