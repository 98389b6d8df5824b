"""Run by test_pair.py: device types `lazy` and `fake` in one process."""

from __future__ import annotations

import distckpt_backends
import torch
import torch.nn.functional as F
from distckpt_backends.generator import GeneratorBackend

from tests.fakes.module import FakeModule

LAZY, FAKE = torch.device("lazy", 1), torch.device("fake", 0)


def test_both_types_are_live_with_the_generic_backend(lazy: FakeModule, fake: FakeModule) -> None:
    found = {b.device_type: type(b) for b in distckpt_backends.live()}
    assert found == {"lazy": GeneratorBackend, "fake": GeneratorBackend}


def test_a_draw_on_one_type_does_not_move_the_other(lazy: FakeModule, fake: FakeModule) -> None:
    one, other = distckpt_backends.get("lazy"), distckpt_backends.get("fake")
    a, b = one.rng_stash(LAZY), other.rng_stash(FAKE)
    torch.rand(3, device=FAKE)
    assert not one.rng_moved(LAZY, a)
    assert other.rng_moved(FAKE, b)


def test_backward_crosses_the_types_and_dropout_repeats_on_both(lazy: FakeModule, fake: FakeModule) -> None:
    x = torch.randn(6, device=FAKE, requires_grad=True)
    y = torch.randn(6, device=LAZY, requires_grad=True)
    states = [(distckpt_backends.get(d.type), d) for d in (LAZY, FAKE)]
    stashed = [(b, d, b.rng_stash(d)) for b, d in states]

    def grads() -> list[torch.Tensor]:
        out = F.dropout(x * x, 0.5).to(LAZY) * F.dropout(y, 0.5)
        return [g.cpu() for g in torch.autograd.grad(out.sum(), (x, y))]

    first = grads()
    for backend, device, state in stashed:
        backend.rng_restore(device, state)
    assert all(torch.equal(a, b) for a, b in zip(first, grads(), strict=True))


def test_the_rule_prefers_the_first_met(lazy: FakeModule, fake: FakeModule) -> None:
    assert distckpt_backends.select(["cpu", "fake", "lazy"]) == "fake"
