"""The CPU backend: nothing that was drawn goes unseen."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable

import distckpt_backends
import pytest
import torch
from distckpt_backends import _torch, cpu
from distckpt_backends.errors import RngStateError

CPU = torch.device("cpu")


@pytest.fixture
def backend() -> distckpt_backends.Backend:
    return distckpt_backends.get("cpu")


def test_a_draw_of_a_whole_block_of_words_is_seen(backend: distckpt_backends.Backend) -> None:
    # after exactly 624 words the engine's header reads as before; only the words differ
    torch.rand(1)
    state = backend.rng_stash(CPU)
    torch.empty(624).uniform_()
    assert backend.rng_moved(CPU, state)


def test_the_cached_second_normal_is_part_of_the_state(backend: distckpt_backends.Backend) -> None:
    torch.manual_seed(0)
    torch.normal(0.0, 1.0, (1,))
    state = backend.rng_stash(CPU)
    first = torch.normal(0.0, 1.0, (1,))
    assert backend.rng_moved(CPU, state)
    backend.rng_restore(CPU, state)
    assert torch.equal(first, torch.normal(0.0, 1.0, (1,)))


def test_bytes_that_are_no_twister_state_are_refused(backend: distckpt_backends.Backend) -> None:
    state = backend.rng_stash(CPU)
    broken = state.clone()
    broken[8:16] = 255
    with pytest.raises(RngStateError, match="left as it was"):
        backend.rng_restore(CPU, broken)
    assert not backend.rng_moved(CPU, state)


def test_states_made_in_inference_mode_restore_outside(backend: distckpt_backends.Backend) -> None:
    with torch.inference_mode():
        state = backend.rng_stash(CPU)
    first = torch.rand(3)
    assert backend.rng_moved(CPU, state)
    backend.rng_restore(CPU, state)
    assert torch.equal(first, torch.rand(3))


DRAWS = {
    "uniform": lambda: torch.rand(1),
    "normal": lambda: torch.randn(1),
    "many normals": lambda: torch.randn(64),
    "float of a pair": lambda: torch.empty(1).normal_(),
    "double of a pair": lambda: torch.empty(1, dtype=torch.float64).normal_(),
    "whole turn": lambda: torch.empty(624).uniform_(),
    "bernoulli": lambda: torch.nn.functional.dropout(torch.ones(3)),
    "permutation": lambda: torch.randperm(3),
    "seed": lambda: torch.manual_seed(int(torch.initial_seed()) + 1),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
@pytest.mark.parametrize("read", ["memory", "state"])
def test_a_fingerprint_changes_with_every_draw_and_with_nothing_else(
    read: str, draw: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    if read == "state":
        monkeypatch.setattr(cpu, "_memory", None)
    draw()  # the second of a cached pair is a draw too
    before = cpu.fingerprint()
    torch.get_rng_state()
    torch.ones(3).sin()
    assert not cpu.drawn_since(before)
    draw()
    assert cpu.drawn_since(before)


@pytest.mark.skipif(sys.platform != "linux", reason="found on Linux only; elsewhere the state is read")
def test_the_generators_memory_is_found_and_is_its_own_to_the_last_byte() -> None:
    assert cpu._memory is not None
    first, last = cpu._memory.first, cpu._memory.last
    end = ctypes.addressof(last) + len(last)
    assert end - ctypes.addressof(first) == 2544  # the twister and two cached normals
    assert (len(first), len(last)) == (20 + 32 * 4, 28)


def in_a_new_process(code: str, **environment: str) -> str:
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    ).stdout


def test_an_environment_variable_turns_the_reading_of_generator_memory_off() -> None:
    code = """
from distckpt_backends import _torch
def no(generator): raise AssertionError("looked for")
_torch.cpu_generator_memory = no
from distckpt_backends import _torch, cpu
import torch
before = cpu.fingerprint()
print(cpu._memory, cpu.drawn_since(before), bool(torch.rand(1)), cpu.drawn_since(before))
"""
    assert in_a_new_process(code, DISTCKPT_GENERATOR_MEMORY="0").split() == ["None", "False", "True", "True"]


def test_a_search_at_an_address_that_is_not_there_finds_nothing_and_does_not_crash() -> None:
    code = """
import torch
from distckpt_backends import _torch
class Elsewhere:
    get_state = torch.default_generator.get_state
for Elsewhere._cdata in (0, 8, (1 << 47) - 4096, (1 << 64) - 8, -1, 1 << 70):
    print(_torch.cpu_generator_memory(Elsewhere()))
"""
    assert in_a_new_process(code).split() == 6 * ["None"]


def test_memory_that_reaches_beyond_the_generator_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cpu.cpu_generator_memory

    def longer(generator: torch.Generator) -> object:
        found = real(generator)
        return found and _torch.GeneratorMemory(ctypes.addressof(found.first) + 8)

    monkeypatch.setattr(cpu, "cpu_generator_memory", longer)
    assert not cpu._every_draw_shows()


def test_memory_that_a_draw_does_not_show_in_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real, nothing = cpu.cpu_generator_memory, ctypes.create_string_buffer(4096)
    monkeypatch.setattr(
        cpu, "cpu_generator_memory", lambda g: _torch.GeneratorMemory(ctypes.addressof(nothing))
    )
    assert not cpu._every_draw_shows()
    monkeypatch.setattr(cpu, "cpu_generator_memory", lambda g: None)
    assert not cpu._every_draw_shows()
    monkeypatch.setattr(cpu, "cpu_generator_memory", real)
    assert cpu._every_draw_shows() == (cpu._memory is not None)
