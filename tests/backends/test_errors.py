"""Coded errors: what the message says, and that they survive a process boundary."""

from __future__ import annotations

import inspect
import pickle

import pytest
from distckpt_backends import errors
from distckpt_backends.errors import DistckptError

CODED = [
    e
    for _, e in inspect.getmembers(errors, inspect.isclass)
    if issubclass(e, DistckptError) and e is not DistckptError
]


def test_the_message_starts_with_the_code_and_has_a_line_per_part() -> None:
    error = errors.DeviceError("no such device", where="block.3", why="one GPU", fix="use index 0")
    assert str(error).splitlines() == [
        "[DC203] no such device",
        "  where: block.3",
        "  why:   one GPU",
        "  fix:   use index 0",
    ]


def test_parts_that_are_not_given_take_no_line() -> None:
    assert str(errors.DeviceError("no such device")) == "[DC203] no such device"


@pytest.mark.parametrize("kind", CODED)
def test_a_coded_error_is_a_runtime_error_and_pickles(kind: type[DistckptError]) -> None:
    error = kind("what", where="where", why="why", fix="fix")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert isinstance(again, RuntimeError)
    assert (str(again), again.what, again.fix) == (str(error), "what", "fix")


def test_codes_of_the_device_floor_are_unique_and_in_its_range() -> None:
    codes = [e.code for e in CODED]
    assert len(set(codes)) == len(codes)
    assert all(c.startswith("DC2") for c in codes)
