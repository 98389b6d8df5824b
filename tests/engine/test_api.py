"""``dc.checkpoint`` as people write it: options, decorator, methods, plain calls, errors."""

from __future__ import annotations

import functools
import inspect
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distckpt as dc
from distckpt import errors
from distckpt.engine.api import OPTION_NAMES
from distckpt.errors import BadOption, OptionCollision
from tests.processes import run

from .exact import Region, counted, exact, leaf
from .test_inputs import PLACES

ROOT = Path(__file__).resolve().parents[2]


def work(x: torch.Tensor) -> torch.Tensor:
    return x.sin().exp()


def takes_name(x: torch.Tensor, name: str = "nobody", debug: int = 0) -> torch.Tensor:
    return x.sin() * len(name) + debug


class TakesName(nn.Module):
    def forward(self, x: torch.Tensor, *, name: str) -> torch.Tensor:
        return takes_name(x, name)


@pytest.mark.parametrize(
    "fn",
    [
        takes_name,
        TakesName(),
        TakesName().forward,
        functools.partial(takes_name, debug=1),
        lambda x, name: takes_name(x, name),
    ],
    ids=["function", "module", "method", "partial", "lambda"],
)
def test_an_option_that_the_function_also_takes_is_refused(fn: Any) -> None:
    with pytest.raises(OptionCollision) as caught:
        dc.checkpoint(fn, leaf(3), name="block")
    assert caught.value.code == "DC108"
    assert "partial" in str(caught.value)


def test_both_ways_out_of_a_collision_work() -> None:
    x = leaf(3)
    assert torch.equal(dc.checkpoint(name="block")(takes_name)(x, name="abc"), takes_name(x, "abc"))
    assert torch.equal(dc.checkpoint(functools.partial(takes_name, name="abc"), x), takes_name(x, "abc"))


def test_a_function_with_an_options_name_is_fine_while_nobody_passes_it() -> None:
    x = leaf(3)
    assert torch.equal(dc.checkpoint(takes_name, x), takes_name(x))
    assert torch.equal(dc.checkpoint(takes_name, x, determinism_check="bitwise"), takes_name(x))


def test_no_signature_is_taken_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    real = inspect.signature

    def refuse(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals["__name__"]
        assert not caller.startswith("distckpt"), f"{caller} took a signature"
        return real(*args, **kwargs)  # torch 2.9 does, for every autograd.Function

    monkeypatch.setattr(inspect, "signature", refuse)
    dc.checkpoint(work, leaf(3), early_stop=False).sum().backward()


def test_the_decorator_makes_every_call_a_region() -> None:
    @dc.checkpoint(determinism_check="bitwise", name="decorated")
    def fn(x: torch.Tensor, *, name: str = "mine", scale: float = 1.0) -> torch.Tensor:
        """Its own words."""
        return x.sin().exp() * scale * len(name)

    assert fn.__name__ == "fn"
    assert fn.__doc__ == "Its own words."
    x = leaf(3)
    _, counts = counted(lambda: fn(x, name="abcd", scale=2.0).sum().backward())
    assert (counts.regions, counts.replays) == (1, 1)
    assert torch.allclose(x.grad, torch.autograd.grad((x.sin().exp() * 8).sum(), x)[0])


def test_a_decorated_method_is_bound_to_its_instance() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        @dc.checkpoint()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).sin().exp()

        @staticmethod
        @dc.checkpoint()
        def fixed(x: torch.Tensor) -> torch.Tensor:
            return x.sin().exp()

        @classmethod
        @dc.checkpoint()
        def named(cls, x: torch.Tensor) -> torch.Tensor:
            return x.sin().exp() * len(cls.__name__)

    block, x = Block(), leaf(2, 3)
    _, counts = counted(lambda: block(x).sum().backward())
    assert (counts.regions, counts.replays) == (1, 1)
    assert block.layer.weight.grad is not None
    assert torch.equal(Block.fixed(x), x.sin().exp())
    assert torch.equal(block.fixed(x), x.sin().exp())
    assert torch.equal(Block.forward(block, x), block(x))


def test_the_classmethod_form_is_bound_to_its_class() -> None:
    class Named:
        @classmethod
        @dc.checkpoint()
        def size(cls, x: torch.Tensor) -> torch.Tensor:
            return x.sin().exp() * len(cls.__name__)

    x = leaf(3)
    assert torch.equal(Named.size(x), x.sin().exp() * 5)


@pytest.mark.parametrize(
    "options",
    [
        {"determinism_check": "perhaps"},
        {"use_reentrant": "no"},
        {"use_reentrant": None},
        {"policy": object()},
        {"early_stop": 1},
        {"debug": "yes"},
        {"preserve_rng_state": None},
        {"context_fn": 3},
        {"use_reentrant": True, "debug": True},
        {"use_reentrant": True, "determinism_check": "bitwise"},
        {"use_reentrant": True, "context_fn": lambda: None},
    ],
    ids=lambda options: "-".join(options),  # no addresses: the workers must agree on the names
)
def test_an_option_that_cannot_be_honoured_is_refused_at_the_call_and_at_the_decorator(options: Any) -> None:
    for use in (lambda: dc.checkpoint(work, leaf(3), **options), lambda: dc.checkpoint(**options)):
        with pytest.raises(BadOption) as caught:
            use()
        assert caught.value.code == "DC109"
        assert isinstance(caught.value, ValueError)


def test_an_unknown_option_of_the_decorator_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadOption) as caught:
        dc.checkpoint(early_stopp=False)
    assert "early_stop" in str(caught.value)
    with pytest.raises(BadOption):
        dc.checkpoint_sequential([work], 1, leaf(3), early_stopp=False)


@pytest.mark.parametrize("segments", [0, 3, -1])
def test_a_sequence_that_cannot_be_cut_is_refused(segments: int) -> None:
    with pytest.raises(BadOption):
        dc.checkpoint_sequential([work, work], segments, leaf(3))


@pytest.mark.parametrize("segments", [1, 2, 3, 5])
def test_checkpoint_sequential_equals_the_plain_sequence(segments: int) -> None:
    layers = [functools.partial(torch.mul, other=float(i + 1)) for i in range(4)] + [work]
    x = leaf(3)
    want = x
    for layer in layers:
        want = layer(want)
    out, counts = counted(lambda: dc.checkpoint_sequential(layers, segments, x))
    assert torch.equal(out, want)
    assert counts.regions == segments - 1
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0])


def test_the_signature_lists_every_option() -> None:
    parameters = inspect.signature(dc.checkpoint).parameters
    assert set(parameters) >= OPTION_NAMES


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_a_region_is_a_plain_call(mode: Any) -> None:
    seen: list[bool] = []

    def fn(x: torch.Tensor) -> torch.Tensor:
        seen.append(dc.is_recomputing())
        return work(x)

    x = leaf(3)
    with mode():
        out, counts = counted(lambda: dc.checkpoint(fn, x))
    assert (counts.regions, counts.replays) == (0, 0)
    assert not out.requires_grad
    assert seen == [False]


def test_inputs_without_grad_still_train_the_parameters_inside() -> None:
    def program(region: Region) -> Any:
        torch.manual_seed(1)
        layer = nn.Linear(3, 3)
        x = torch.ones(2, 3)
        out = region(lambda t: layer(t).sin(), x)
        out.sum().backward()
        return out, layer.weight.grad, layer.bias.grad

    exact(program)


def test_the_reentrant_form_is_exact() -> None:
    def program(region: Region) -> Any:
        x = leaf(8)
        out = region(lambda t: torch.nn.functional.dropout(t.sin(), 0.5).exp(), x)
        out.sum().backward()
        return out, x.grad

    exact(program, use_reentrant=True)


def test_a_gradient_taken_inside_a_reentrant_region_is_exact() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(inner.sin().exp().sum(), inner)
        return x * slope

    x = torch.randn(4, requires_grad=True)
    (plain,) = torch.autograd.grad(program(x).sum(), x)
    dc.checkpoint(program, x, use_reentrant=True).sum().backward()
    assert x.grad is not None
    assert torch.equal(plain, x.grad)


@pytest.mark.parametrize("place", sorted(set(PLACES) - {"positional"}))
def test_the_reentrant_form_refuses_tensors_that_its_node_cannot_take(place: str) -> None:
    fn, args, kwargs = PLACES[place](leaf(3))
    with pytest.raises(BadOption) as caught:
        dc.checkpoint(fn, *args, use_reentrant=True, **kwargs)
    assert "use_reentrant" in str(caught.value)


def test_the_reentrant_form_changes_buffers_once_and_replays_registered_generators() -> None:
    def program(region: Region) -> Any:
        norm, router = nn.BatchNorm1d(4), torch.Generator().manual_seed(1)
        x = leaf(8, 4)
        with dc.rng.register("router", router):
            out = region(lambda t: norm(t).sin() * torch.rand(8, 4, generator=router), x)
            out.sum().backward()
        return x.grad, torch.rand(1, generator=router), *(b.clone() for b in norm.buffers())

    exact(program, use_reentrant=True)


def test_the_reentrant_form_refuses_an_input_that_changed_in_place() -> None:
    y = leaf(3) * 1.0
    out = dc.checkpoint(work, y, use_reentrant=True)
    y.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_forward_context_that_swallows_an_exception_is_refused() -> None:
    import contextlib

    def boom(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("inside")

    with pytest.raises(errors.SuppressedException) as caught:
        dc.checkpoint(
            boom, leaf(3), context_fn=lambda: (contextlib.suppress(KeyError), contextlib.nullcontext())
        )
    assert caught.value.code == "DC113"
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "kind", [e for e in vars(errors).values() if inspect.isclass(e) and hasattr(e, "code")]
)
def test_every_coded_error_survives_pickling_and_keeps_its_parts(kind: Any) -> None:
    error = kind("what", where="where", why="why", fix="fix")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert (again.what, again.where, again.why, again.fix, again.code) == (
        "what",
        "where",
        "why",
        "fix",
        kind.code,
    )


def test_neither_import_nor_use_brings_in_dynamo_or_a_device() -> None:
    program = """
import sys, torch
before = set(sys.modules)
import distckpt as dc
x = torch.ones(4, requires_grad=True)
dc.checkpoint(lambda t: torch.nn.functional.dropout(t.sin(), 0.5), x).sum().backward()
dc.checkpoint(lambda t: t.sin().exp(), x, determinism_check="bitwise").sum().backward()
with dc.session():
    dc.compat.checkpoint(torch.sin, x, use_reentrant=False).sum().backward()
new = set(sys.modules) - before
heavy = [m for m in ("torch._dynamo", "torch._inductor", "torch_xla", "sympy", "numpy") if m in new]
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""
    done = run([sys.executable, "-c", program], limit=60, environment=_env())
    assert done.returncode == 0, done.stderr


def _env() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'backends'}"}
