"""What the backends are for: regions on devices that no CPU machine has, through the engine.

Every name here is a case in which torch's own engine gives wrong gradients without a word, or refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distckpt_backends.errors import GraphCaptureError

import distckpt as dc
from tests.fakes.module import FakeModule
from tests.fakes.pair import run_pair_file
from tests.fakes.shapes import MpsShaped, TpuShaped


def segment(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(torch.tanh(x), 0.5)


def agree(device: str, plain: Callable[[Any], torch.Tensor], region: Callable[[Any], torch.Tensor]) -> bool:
    """Whether both give equal outputs and gradients from equal random states."""
    x = torch.randn(4, 8).to(device).requires_grad_()
    found = []
    backend = dc_backend(device)
    states = [(d, backend.rng_stash(d)) for d in backend.live_devices()]
    for call in (plain, region):
        for where, state in states:
            backend.rng_restore(where, state)
        out = call(x)
        (grad,) = (out.sum().backward(), x.grad)[1:]
        assert grad is not None
        found.append((out.detach().cpu(), grad.cpu()))
        x.grad = None
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def dc_backend(device: str) -> Any:
    import distckpt_backends

    return distckpt_backends.get(torch.device(device).type)


@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_dropout_on_a_device_that_is_not_current_is_exact(lazy: FakeModule, reentrant: bool) -> None:
    assert agree("lazy:1", segment, lambda x: dc.checkpoint(segment, x, use_reentrant=reentrant))


def test_a_closure_that_draws_on_another_index_is_exact(lazy: FakeModule) -> None:
    other = torch.ones(4, 8, device="lazy:0")

    def mixed(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * F.dropout(other, 0.5).to(x.device)

    assert agree("lazy:1", mixed, lambda x: dc.checkpoint(mixed, x))


@pytest.mark.parametrize("surface", ["dc", "compat"])
def test_a_tensor_passed_by_keyword_has_its_device_stashed(lazy: FakeModule, surface: str) -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        if surface == "dc":
            return dc.checkpoint(segment, x=x)
        return dc.compat.checkpoint(segment, x=x, use_reentrant=False)

    assert agree("lazy:1", segment, call)


def test_a_meta_tensor_among_the_inputs_changes_nothing(lazy: FakeModule) -> None:
    shape = torch.empty(2, device="meta")
    assert agree("lazy:1", segment, lambda x: dc.checkpoint(lambda m, y: segment(y), shape, x))


def test_a_region_that_draws_nothing_restores_nothing(lazy: FakeModule) -> None:
    x = torch.randn(4, 8, device="lazy:1", requires_grad=True)
    before = [g.sets for g in lazy.default_generators]
    dc.checkpoint(torch.tanh, x).sum().backward()
    assert [g.sets for g in lazy.default_generators] == before


def test_mps_dropout_is_exact_where_torch_forgets_the_device(mps_shaped: MpsShaped) -> None:
    assert agree("lazy:0", segment, lambda x: dc.checkpoint(segment, x))
    assert agree("lazy:0", segment, lambda x: dc.checkpoint(segment, x, use_reentrant=True))


def test_torch_tpu_replays_are_tied_to_their_gradients(tpu_shaped: TpuShaped) -> None:
    assert agree("lazy:0", segment, lambda x: dc.checkpoint(segment, x))
    assert tpu_shaped.barriers == [2]  # the input and the one gradient


def test_dropout_in_a_graph_capture_is_exact_where_torch_tells_the_state(lazy: FakeModule) -> None:
    x = torch.randn(4, 8, device="lazy:0", requires_grad=True)
    found = []
    for call in (segment, lambda y: dc.checkpoint(segment, y)):
        with lazy.capture(readable=True):
            call(x).sum().backward()
        assert x.grad is not None
        found.append(x.grad.cpu())
        x.grad = None
    assert torch.equal(*found)


def test_dropout_in_a_graph_capture_is_a_coded_error_where_it_does_not(lazy: FakeModule) -> None:
    x = torch.randn(4, 8, device="lazy:0", requires_grad=True)
    with (
        lazy.capture(readable=False),
        pytest.raises(GraphCaptureError, match=r"DC205.*(?s:.)*preserve_rng_state"),
    ):
        dc.checkpoint(segment, x)
    with lazy.capture(readable=False):
        dc.checkpoint(torch.tanh, x, preserve_rng_state=False).sum().backward()


def test_two_accelerator_types() -> None:
    run_pair_file(Path(__file__).with_name("pair_regions.py"))
