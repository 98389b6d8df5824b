"""The CPU backend: nothing that was drawn goes unseen, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable

import distckpt_backends
import pytest
import torch
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


def ratio(
    call: Callable[[], object], base: Callable[[], object], *, calls: int = 500, rounds: int = 30
) -> float:
    """Time of `call` over time of `base` in the best of many interleaved rounds: other work slows both."""
    found = float("inf")
    for _ in range(rounds):
        took = []
        for run in (call, base):
            start = time.perf_counter()
            for _ in range(calls):
                run()
            took.append(time.perf_counter() - start)
        found = min(found, took[0] / took[1])
    return found


def test_stash_and_moved_cost_about_one_read_of_the_generator(backend: distckpt_backends.Backend) -> None:
    state = backend.rng_stash(CPU)
    read = torch.default_generator.get_state
    assert ratio(lambda: backend.rng_stash(CPU), read) < 1.5
    assert ratio(lambda: backend.rng_moved(CPU, state), read) < 2.0


def test_asking_for_live_backends_is_almost_free_without_an_accelerator() -> None:
    if distckpt_backends.live():
        pytest.skip("an accelerator is in use in this process")
    # 0.1 us against 1 us
    assert ratio(distckpt_backends.live, torch.default_generator.get_state) < 0.6
