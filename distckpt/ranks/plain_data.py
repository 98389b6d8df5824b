"""Plain data: nested values as bytes, and bytes as nested values, without anything that could run code.

Note [The format]
    One line of JSON, and after it the contents of tensors, arrays and bytes, one after another. In the JSON a number,
    a string, a bool or None stands for itself; everything else is a list that begins with its kind:

    ``["list", item...]``, ``["tuple", item...]``, ``["dict", [key, value]...]``, ``["bytes", size]``,
    ``["tensor", size, dtype, shape, device]``, ``["array", size, dtype, shape]``

    Contents are met in the order in which they lie there, so sizes are enough to find them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import torch

_ITSELF = (type(None), bool, int, float, str)
_ARRAY_TYPE = re.compile(r"[<>|][biufc]\d+")  # how numpy spells bools, integers, floats and complex numbers


class NotPlain(ValueError):
    """A value that is no plain data, or bytes that hold none."""


def dumps(value: Any) -> bytes:
    """``value`` as bytes: None, bools, numbers, strings, bytes, tensors, numpy arrays; lists, tuples, dicts of them.

    Raises:
        NotPlain: anything else, a subclass of one of these included.
    """
    contents: list[bytes] = []
    try:
        head = json.dumps(_encode(value, contents), separators=(",", ":"))
    except (RecursionError, ValueError) as error:  # ValueError: an int of more digits than Python prints
        raise error if isinstance(error, NotPlain) else NotPlain(str(error)) from error
    return b"".join([head.encode(), b"\n", *contents])


def _encode(value: Any, contents: list[bytes]) -> Any:
    kind = type(value)
    if kind in _ITSELF:
        return value
    if kind in (list, tuple):
        return [kind.__name__, *(_encode(item, contents) for item in value)]
    if kind is dict:
        return ["dict", *([_encode(k, contents), _encode(v, contents)] for k, v in value.items())]
    if kind is bytes:
        contents.append(value)
        return ["bytes", len(value)]
    if kind is torch.Tensor and value.layout is torch.strided and value.device.type != "meta":
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        contents.append(bytes(flat.view(torch.uint8).tolist()))
        name = str(value.dtype).removeprefix("torch.")
        return ["tensor", len(contents[-1]), name, list(value.shape), str(value.device)]
    # numpy without importing it; a scalar of numpy's is an array without dimensions
    if kind.__module__ == "numpy" and _ARRAY_TYPE.fullmatch(
        getattr(getattr(value, "dtype", None), "str", "")
    ):
        contents.append(value.tobytes())
        return ["array", len(contents[-1]), value.dtype.str, list(value.shape)]
    raise NotPlain(f"{kind.__module__}.{kind.__qualname__} is no plain data")


def loads(data: bytes) -> Any:
    """The value of :func:`dumps`.

    Raises:
        NotPlain: ``data`` is not what :func:`dumps` returned.
    """
    try:
        head, _, contents = data.partition(b"\n")
        reader = _Reader(contents)
        value = reader.decode(json.loads(head))
        if reader.at != len(contents):
            raise NotPlain("it is longer than it says")
        return value
    except NotPlain:
        raise
    except Exception as error:  # whatever is wrong with bytes from outside
        raise NotPlain(f"{type(error).__name__}: {error}") from error


class _Reader:
    def __init__(self, contents: bytes) -> None:
        self.contents = contents
        self.at = 0

    def decode(self, said: Any) -> Any:
        if type(said) in _ITSELF:
            return said
        kind, *rest = said
        if kind == "list":
            return [self.decode(item) for item in rest]
        if kind == "tuple":
            return tuple([self.decode(item) for item in rest])
        if kind == "dict":
            return dict(self._pairs(rest))
        if kind == "bytes":
            (size,) = rest
            return self._take(size)
        if kind == "tensor":
            size, name, shape, device = rest
            dtype = getattr(torch, name)
            if not isinstance(dtype, torch.dtype):
                raise NotPlain(f"there is no dtype {name!r}")
            return self._tensor(size).view(dtype).reshape(shape).to(device)
        if kind == "array":
            size, name, shape = rest
            if not _ARRAY_TYPE.fullmatch(name):
                raise NotPlain(f"there is no array of {name!r}")
            made = self._tensor(size).numpy().view(name).reshape(shape)
            return made if shape else made[()]
        raise NotPlain(f"there is no kind {kind!r}")

    def _pairs(self, pairs: Any) -> Iterator[tuple[Any, Any]]:
        for key, value in pairs:
            yield self.decode(key), self.decode(value)

    def _take(self, size: Any) -> bytes:
        if type(size) is not int or not 0 <= size <= len(self.contents) - self.at:
            raise NotPlain("it is cut off")
        self.at += size
        return self.contents[self.at - size : self.at]

    def _tensor(self, size: Any) -> torch.Tensor:
        found = bytearray(self._take(size))
        return torch.frombuffer(found, dtype=torch.uint8) if found else torch.empty(0, dtype=torch.uint8)
