"""Value checks: drift with the same shapes is found, and what is exact is never called drift."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import distckpt as dc
from distckpt.engine.determinism import checksum
from distckpt.errors import CountMismatch, MetadataMismatch, ValueMismatch

from .exact import Region, exact, leaf

levels = pytest.mark.parametrize("level", ["fingerprint", "bitwise"])


def drifting(amount: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function whose second run adds ``amount`` to one element."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 1.0
        if dc.is_recomputing():
            y = y + F.one_hot(torch.tensor(2), 8) * amount
        return (y.sin() * x).exp()

    return fn


@levels
@pytest.mark.parametrize("amount", [1.0, 1e-6, float("nan"), float("inf")])
def test_a_change_of_one_element_is_found(level: str, amount: float) -> None:
    out = dc.checkpoint(drifting(amount), leaf(8), determinism_check=level)
    with pytest.raises(ValueMismatch) as caught:
        out.sum().backward()
    assert caught.value.code == "DC103"
    assert "positions" in str(caught.value)


@pytest.mark.parametrize("level", ["none", "default"])
def test_the_cheaper_levels_do_not_look_at_values(level: str) -> None:
    dc.checkpoint(drifting(1.0), leaf(8), determinism_check=level).sum().backward()


@levels
def test_a_permutation_of_the_same_values_is_found(level: str) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x.flip(0) if dc.is_recomputing() else x * 1.0
        return (y * 2).sin()

    out = dc.checkpoint(fn, leaf(8), determinism_check=level)
    with pytest.raises(ValueMismatch):
        out.sum().backward()


@levels
def test_a_sign_of_zero_is_found(level: str) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros(8) * (-1.0 if dc.is_recomputing() else 1.0)
        return x * zero

    out = dc.checkpoint(fn, leaf(8), determinism_check=level)
    with pytest.raises(ValueMismatch):
        out.sum().backward()


torch.manual_seed(0)
LSTM = torch.nn.LSTM(4, 4, 2, dropout=0.5)
EXACT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dropout": lambda x: F.dropout(x.sin(), 0.5) * x,
    "rrelu, which fills its noise after it is saved": lambda x: F.rrelu(x.sin(), training=True).exp(),
    "rrelu last": lambda x: F.rrelu(x.sin(), training=True),
    "nan": lambda x: (x * float("nan")).sin().exp(),
    "inf": lambda x: (x * float("inf")).sin().exp(),
    "bfloat16": lambda x: x.bfloat16().sin().exp().float(),
    "float16": lambda x: x.half().sin().exp().float(),
    "float64": lambda x: x.double().sin().exp(),
    "complex": lambda x: torch.complex(x, x.sin()).exp().abs().sin(),
    "conjugate view": lambda x: (torch.complex(x, x.sin()).conj() * torch.complex(x, x)).abs(),
    "negative view": lambda x: torch.complex(x, x).conj().imag * x.sin(),
    "bool mask": lambda x: torch.where(x > 0, x.sin(), x.exp()).sin(),
    "integer index": lambda x: x[torch.tensor([3, 1, 1])].sin().exp(),
    "empty": lambda x: x[:0].sin().exp().sum() + x.sin().exp().sum(),
    "scalar": lambda x: x.sum().sin().exp(),
    "expanded": lambda x: (x[:1].expand(8) * x).sin(),
    "transposed": lambda x: (x.view(2, 4).t() * x.view(4, 2)).sin(),
    "in place": lambda x: (x * 2).add_(1.0).mul_(x).sin(),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(1, 1, 2, 4)] * 3, dropout_p=0.3),
    "lstm cell": lambda x: torch.lstm_cell(
        x[None], [torch.ones(1, 8)] * 2, torch.ones(32, 8), torch.ones(32, 8), None, None
    )[0],
    "lstm, whose kernel saves a workspace that it does not fill": lambda x: LSTM(x.view(2, 1, 4))[0].sin(),
    "gradient inside": lambda x: torch.autograd.grad(F.dropout(x.sin(), 0.3).sum(), x, create_graph=True)[
        0
    ].exp(),
    "gradient of a last rrelu inside": lambda x: torch.autograd.grad(
        F.rrelu(x.sin(), training=True).sum(), x, create_graph=True
    )[0].exp(),
    "nested region": lambda x: dc.checkpoint(lambda t: F.dropout(t, 0.3).exp(), x).sin(),
    "sparse": lambda x: torch.sparse.mm(torch.eye(8).to_sparse(), x[:, None]).sin(),
    "norm": lambda x: F.layer_norm(F.group_norm(x.view(1, 4, 2), 2), (2,)).sin(),
}


@pytest.mark.parametrize("level", ["none", "default", "fingerprint", "bitwise"])
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", EXACT)
def test_an_exact_replay_is_never_called_drift(level: str, name: str, early_stop: bool) -> None:
    def program(region: Region) -> Any:
        x = leaf(8)
        out = region(EXACT[name], x)
        torch.rand(2)
        out.sum().backward()
        return x.grad, out

    exact(program, determinism_check=level, early_stop=early_stop)


@levels
def test_every_backward_is_checked(level: str) -> None:
    later: list[int] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        return (x + float(len(later))).sin().exp()

    out = dc.checkpoint(fn, leaf(8), determinism_check=level).sum()
    out.backward(retain_graph=True)
    later.append(1)
    with pytest.raises(ValueMismatch):
        out.backward()


def test_an_exact_copy_is_not_changed_by_what_happens_to_the_original() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = y.sin()
        return z

    x = leaf(8)
    out = dc.checkpoint(fn, x, determinism_check="bitwise")
    out.detach().zero_()
    out.sum().backward()


def test_checksums_differ_for_one_bit_and_for_two_swapped_values() -> None:
    x = torch.arange(100.0)
    flipped = x.clone()
    flipped.view(torch.int32)[50] ^= 1
    swapped = x.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    sums = {int(checksum(t)) for t in (x, flipped, swapped)}
    assert len(sums) == 3
    assert int(checksum(x)) == int(checksum(x.clone()))


def test_other_shapes_or_dtypes_are_found_at_the_default_level() -> None:
    for change in (lambda x: x[:3], lambda x: x.double()):

        def fn(x: torch.Tensor, change: Any = change) -> torch.Tensor:
            y = x.sin()
            return (change(y) if dc.is_recomputing() else y).exp().sum()

        out = dc.checkpoint(fn, leaf(8))
        with pytest.raises(MetadataMismatch) as caught:
            out.backward()
        assert caught.value.code == "DC102"
        assert "position" in str(caught.value)


@pytest.mark.parametrize("early_stop", [True, False])
def test_fewer_saved_tensors_are_found(early_stop: bool) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.sin() if dc.is_recomputing() else x.sin().exp()

    out = dc.checkpoint(fn, leaf(8), early_stop=early_stop)
    with pytest.raises(CountMismatch) as caught:
        out.sum().backward()
    assert caught.value.code == "DC101"


def test_more_saved_tensors_are_found_without_early_stop() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.sin().exp() if dc.is_recomputing() else x.sin()

    out = dc.checkpoint(fn, leaf(8), early_stop=False)
    with pytest.raises(CountMismatch) as caught:
        out.sum().backward()
    assert caught.value.code == "DC101"


def test_every_mismatch_is_torchs_checkpoint_error_too() -> None:
    from torch.utils.checkpoint import CheckpointError

    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.sin()[: 2 if dc.is_recomputing() else 3].exp()

    with pytest.raises(CheckpointError):
        dc.checkpoint(fn, leaf(8)).sum().backward()


def test_after_a_mismatch_no_value_of_the_failed_replay_is_used() -> None:
    broken = [1]

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        return (y[:3] if dc.is_recomputing() and broken else y[:4]).exp()

    x = leaf(8)
    out = dc.checkpoint(fn, x).sum()
    with pytest.raises(dc.CheckpointError):
        out.backward(retain_graph=True)
    broken.clear()
    x.grad = None
    out.backward()
    assert torch.equal(x.grad, torch.autograd.grad(x.sin()[:4].exp().sum(), x)[0])
