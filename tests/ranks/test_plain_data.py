"""Plain data: what goes in comes out with type and bits, and nothing else goes in or comes out."""

from __future__ import annotations

import collections
import enum
import random
from typing import Any

import pytest
import torch

from distckpt.engine.streams import same
from distckpt.ranks.rng_states import NotPlain, dumps, loads

VALUES: list[Any] = [
    None,
    True,
    -(1 << 128),
    0.1,
    float("inf"),
    "wörter \ud800 \n",
    b"\x00\n[1]",
    b"",
    [],
    (),
    {},
    (1, [2, (3,)], {"a": {(4, "b"): [None]}, 5: b"x"}),
    random.getstate(),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_a_value_comes_back_equal_and_of_its_type(value: Any) -> None:
    found = loads(dumps(value))
    assert found == value
    assert repr(found) == repr(value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.get_rng_state(),
        torch.randn(3, 4).t(),
        torch.randn(2, 2, dtype=torch.complex64).conj(),
        torch.tensor(3, dtype=torch.int64),
        torch.empty(0, 3, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.randn(5, dtype=torch.float64)[1::2],
    ],
    ids=lambda t: f"{t.dtype}",
)
def test_a_tensor_comes_back_with_dtype_shape_and_bits(tensor: torch.Tensor) -> None:
    found = loads(dumps((1, tensor)))[1]
    assert (found.dtype, found.shape, found.device) == (tensor.dtype, tensor.shape, tensor.device)
    assert torch.equal(found, tensor)
    found.zero_()  # memory of its own


def test_numpy_arrays_and_scalars_come_back_with_dtype_shape_and_bits() -> None:
    numpy = pytest.importorskip("numpy")
    arrays = [
        numpy.random.RandomState(1).get_state(),
        numpy.arange(6, dtype=">u2").reshape(2, 3).T,
        numpy.float64(0.1),
        numpy.array([True]),
        numpy.zeros((0, 2), "complex128"),
    ]
    found = loads(dumps(arrays))
    assert same(found, arrays)
    for one, before in zip(found[1:], arrays[1:], strict=True):
        assert (type(one), one.dtype, one.shape) == (type(before), before.dtype, before.shape)


class Level(enum.IntEnum):
    LOW = 1


Pair = collections.namedtuple("Pair", "a b")
deep: list[Any] = []
deep.append(deep)


@pytest.mark.parametrize(
    "value",
    [
        Level.LOW,
        Pair(1, 2),
        {1, 2},
        object(),
        len,
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, device="meta"),
        torch.eye(2).to_sparse(),
        collections.OrderedDict(a=1),
        bytearray(b"x"),
        1 << 20000,
        deep,
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_is_no_plain_data_is_refused(value: Any) -> None:
    with pytest.raises(NotPlain):
        dumps((1, {"a": value}))


def test_an_array_of_objects_is_refused() -> None:
    numpy = pytest.importorskip("numpy")
    with pytest.raises(NotPlain):
        dumps(numpy.array([object()]))
    with pytest.raises(NotPlain):
        loads(b'["array",8,"|O",[1]]\n12345678')


GOOD = dumps((1, torch.arange(3), b"abc"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[:-1],
        GOOD + b"x",
        GOOD.replace(b"int64", b"load"),
        GOOD.replace(b"int64", b"__doc__"),
        GOOD.replace(b"tuple", b"set"),
        GOOD.replace(b"[3]", b"[4]"),
        GOOD.replace(b"[3]", b"[99999999999999]"),
        b'["bytes",-1]\n',
        b'["bytes",true]\nx',
        b'["dict",[["list"],1]]\n',
        b"[" * 100000,
        b"{}",
        b"[]",
        "text",
        7,
    ],
)
def test_bytes_from_elsewhere_are_refused(data: Any) -> None:
    with pytest.raises(NotPlain):
        loads(data)
