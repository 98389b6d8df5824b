"""Torch's surface over our engine: its defaults, warnings, error types and the beginnings of its messages."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as torchs
from torch import nn

from distckpt import compat
from distckpt.engine.stats import counters

ckpt = functools.partial(compat.checkpoint, use_reentrant=False)
reentrant = functools.partial(compat.checkpoint, use_reentrant=True)


def work(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x.sin(), 0.3).exp()


def leaf(n: int = 8) -> torch.Tensor:
    return torch.linspace(-1, 1, n).requires_grad_()


def grad_of(run: Any) -> torch.Tensor:
    torch.manual_seed(0)
    x = leaf()
    run(x).sum().backward()
    assert x.grad is not None
    return x.grad


# 2.15's public names; an older torch has a subset.
PUBLIC = {
    "checkpoint", "checkpoint_sequential", "CheckpointError", "CheckpointFunction", "check_backward_validity",
    "detach_variable", "get_device_states", "set_device_states", "noop_context_fn", "set_checkpoint_early_stop",
    "DefaultDeviceType", "set_checkpoint_debug_enabled", "CheckpointPolicy", "SelectiveCheckpointContext",
    "create_selective_checkpoint_contexts", "SAC_IGNORED_OPS", "GraphExecGroup",
}  # fmt: skip


def test_every_public_name_of_torch_is_here() -> None:
    assert {name for name in {*PUBLIC, *torchs.__all__} if not hasattr(compat, name)} == set()


@pytest.mark.parametrize(
    "name", ["checkpoint", "checkpoint_sequential", "create_selective_checkpoint_contexts"]
)
def test_a_signature_starts_with_torchs_parameters_and_defaults(name: str) -> None:
    theirs = inspect.signature(getattr(torchs, name)).parameters
    ours = inspect.signature(getattr(compat, name)).parameters
    for key, parameter in theirs.items():
        assert key in ours
        if parameter.default is not inspect.Parameter.empty:
            assert ours[key].default == parameter.default
    assert inspect.signature(compat.checkpoint).parameters["preserve_rng_state"].default is True
    assert inspect.signature(compat.checkpoint).parameters["use_reentrant"].default is None


@pytest.mark.parametrize("call", [ckpt, reentrant], ids=["plain", "reentrant"])
def test_the_gradient_equals_plain_autograd_and_torchs_engine(call: Any) -> None:
    mode = call.keywords["use_reentrant"]
    want = grad_of(work)
    assert torch.equal(grad_of(lambda x: call(work, x)), want)
    assert torch.equal(grad_of(lambda x: torchs.checkpoint(work, x, use_reentrant=mode)), want)


def test_the_engine_is_ours() -> None:
    before = counters.replays
    grad_of(lambda x: ckpt(work, x))
    assert counters.replays == before + 1


@pytest.mark.parametrize("mode", [True, False])
def test_the_decorator_and_the_method_form(mode: bool) -> None:
    @compat.checkpoint(use_reentrant=mode)
    def fn(x: torch.Tensor) -> torch.Tensor:
        return work(x)

    class Layer:
        @compat.checkpoint(use_reentrant=mode)
        def run(self, x: torch.Tensor) -> torch.Tensor:
            return work(x)

    want = grad_of(work)
    assert fn.__name__ == "fn"
    assert torch.equal(grad_of(fn), want)
    assert torch.equal(grad_of(Layer().run), want)
    assert torch.equal(grad_of(functools.partial(Layer.run, Layer())), want)


def test_the_decorator_refuses_unknown_keywords() -> None:
    with pytest.raises(ValueError, match="Unexpected keyword arguments: x"):
        compat.checkpoint(use_reentrant=False, x=1)


def test_leaving_use_reentrant_out_warns_and_means_true() -> None:
    with pytest.warns(UserWarning, match=r"torch.utils.checkpoint: the use_reentrant parameter"):
        out = compat.checkpoint(work, leaf())
    assert type(out.grad_fn).__name__ == "CheckpointFunctionBackward"
    with pytest.warns(UserWarning, match=r"torch.utils.checkpoint.checkpoint_sequential: the use_reentrant"):
        compat.checkpoint_sequential([work, work], 2, leaf())


def test_reentrant_regions_take_no_keywords_and_no_other_options() -> None:
    with pytest.raises(ValueError, match="Unexpected keyword arguments: y"):
        reentrant(work, leaf(), y=1)
    for options in ({"debug": True}, {"context_fn": lambda: None}, {"respect_saved_tensors_hooks": True}):
        with pytest.raises(ValueError, match="only supported when"):
            reentrant(work, leaf(), **options)


def test_a_reentrant_region_without_a_trainable_input_warns_and_gives_no_gradient() -> None:
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        out = reentrant(work, torch.ones(3))
    assert not out.requires_grad


def test_a_reentrant_region_refuses_autograd_grad() -> None:
    x = leaf()
    out = reentrant(work, x).sum()
    with pytest.raises(RuntimeError, match="incompatible with"):
        torch.autograd.grad(out, x)


def test_a_reentrant_region_whose_outputs_need_no_gradient_is_an_error_in_backward() -> None:
    x = leaf()
    out = reentrant(lambda t: t.detach() * 2, x)
    with pytest.raises(RuntimeError, match="none of output has requires_grad=True"):
        out.sum().backward()


@pytest.mark.parametrize("check", ["perhaps", "", None])
def test_an_unknown_determinism_check_is_a_value_error(check: Any) -> None:
    with pytest.raises(ValueError, match="determinism_check should be one of"):
        ckpt(work, leaf(), determinism_check=check)


def test_debug_with_a_context_function_is_a_value_error() -> None:
    def make() -> Any:
        return contextlib.nullcontext(), contextlib.nullcontext()

    with pytest.raises(ValueError, match="debug=True is incompatible"):
        ckpt(work, leaf(), debug=True, context_fn=make)
    with (
        compat.set_checkpoint_debug_enabled(True),
        pytest.raises(ValueError, match="debug=True is incompatible"),
    ):
        ckpt(work, leaf(), context_fn=make)


class Moody(nn.Module):
    """Another function in every call after the first."""

    def __init__(self, *runs: Any) -> None:
        super().__init__()
        self.runs = list(runs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.runs.pop(0)(x) if len(self.runs) > 1 else self.runs[0](x)


def test_fewer_tensors_in_the_recomputation() -> None:
    out = ckpt(Moody(lambda x: x.sin().exp(), lambda x: x.sin()), leaf())
    with pytest.raises(compat.CheckpointError, match="A different number of tensors was saved"):
        out.sum().backward()


def test_more_tensors_in_the_recomputation_without_early_stop() -> None:
    out = ckpt(Moody(lambda x: x.sin(), lambda x: x.sin().exp()), leaf(), early_stop=False)
    with pytest.raises(compat.CheckpointError, match="trying to save more tensors during recomputation"):
        out.sum().backward()


def test_other_metadata_in_the_recomputation() -> None:
    runs = [lambda x: x[:3].sin().exp(), lambda x: x[:2].sin().exp()]
    with pytest.raises(
        compat.CheckpointError, match="Recomputed values for the following tensors have different"
    ):
        ckpt(Moody(*runs), leaf()).sum().backward()
    ckpt(Moody(lambda x: x.sin(), lambda x: x.sin() * 1), leaf()).sum().backward()


def test_debug_shows_the_operators_of_both_runs() -> None:
    out = ckpt(Moody(lambda x: x[:3].sin().exp(), lambda x: x[:2].cos().exp()), leaf(), debug=True)
    with pytest.raises(compat.CheckpointError, match="An error happened while unpacking tensors") as caught:
        out.sum().backward()
    text = str(caught.value)
    assert "aten.sin" in text
    assert "aten.cos" in text
    assert "Operations executed during recomputation" in text


def test_checkpoint_error_is_caught_as_torchs_and_as_a_runtime_error() -> None:
    assert issubclass(compat.CheckpointError, torchs.CheckpointError)
    assert issubclass(compat.CheckpointError, RuntimeError)


class TwiceRead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (a,), (b,) = ctx.saved_tensors, ctx.saved_tensors
        return grad * (a + b)


def test_reading_saved_tensors_twice_in_one_backward_keeps_torchs_error() -> None:
    out = ckpt(lambda x: TwiceRead.apply(x.exp()), leaf())
    with pytest.raises(compat.CheckpointError, match="already unpacked once"):
        out.sum().backward()


def sac(policy: Any) -> Any:
    return functools.partial(compat.create_selective_checkpoint_contexts, policy)


def test_a_selective_region_keeps_torchs_error_for_a_second_backward() -> None:
    x = leaf()
    out = ckpt(lambda t: t.sin().exp(), x, context_fn=sac([torch.ops.aten.sin.default])).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Trying to backward an extra time"):
        out.backward()


def test_a_selective_region_is_exact_in_its_first_backward() -> None:
    want = grad_of(lambda x: x.sin().exp())
    found = grad_of(lambda x: ckpt(lambda t: t.sin().exp(), x, context_fn=sac([torch.ops.aten.sin.default])))
    assert torch.equal(found, want)


def test_saved_tensor_hooks_around_a_selective_region_warn_until_somebody_chooses() -> None:
    make = sac([torch.ops.aten.sin.default])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        with pytest.warns(FutureWarning, match="saved_tensors_hooks"):
            ckpt(lambda t: t.sin().exp(), leaf(), context_fn=make)
        for choice in (True, False):
            ckpt(
                lambda t: t.sin().exp(), leaf(), context_fn=make, respect_saved_tensors_hooks=choice
            ).sum().backward()


@pytest.mark.skipif(
    "respect_saved_tensors_hooks" not in inspect.signature(torchs.checkpoint).parameters,
    reason="this torch passes the hooks by in silence, and nobody can choose",
)
@pytest.mark.parametrize("choice", [None, True, False])
def test_what_torch_says_of_hooks_around_a_selective_region_compat_says_as_well(choice: bool | None) -> None:
    """A warning up to 2.15; torch means to make it an error (pytorch#191236), and then this fails."""

    def said(checkpoint: Any, contexts: Any) -> list[Any]:
        make = functools.partial(contexts, [torch.ops.aten.sin.default])
        options: dict[str, Any] = {} if choice is None else {"respect_saved_tensors_hooks": choice}
        packed: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    checkpoint(
                        lambda t: t.sin().exp(), leaf(), use_reentrant=False, context_fn=make, **options
                    )
                except Exception as error:
                    return [type(error)]
        return [warning.category for warning in caught] + [len(packed)]

    theirs = said(torchs.checkpoint, torchs.create_selective_checkpoint_contexts)
    assert said(compat.checkpoint, compat.create_selective_checkpoint_contexts) == theirs


def test_a_context_that_swallows_the_functions_exception_is_an_error() -> None:
    def boom(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("inside")

    with pytest.raises(RuntimeError, match="suppress"):
        ckpt(boom, leaf(), context_fn=lambda: (contextlib.suppress(KeyError), contextlib.nullcontext()))


def test_a_keyword_the_function_shares_with_an_option_is_taken_by_the_option() -> None:
    """As torch does it; ``dc.checkpoint`` refuses it."""
    seen: list[bool] = []

    def fn(x: torch.Tensor, debug: bool = False) -> torch.Tensor:
        seen.append(debug)
        return x.sin()

    ckpt(fn, leaf(), debug=True)
    assert seen == [False]


def test_batch_norm_statistics_change_twice_as_with_torch() -> None:
    """Torch's behaviour that models are tuned on; ``dc.checkpoint`` changes them once."""
    norm = nn.BatchNorm1d(4)
    x = torch.randn(8, 4, requires_grad=True)
    ckpt(norm, x).sum().backward()
    theirs = nn.BatchNorm1d(4)
    torchs.checkpoint(theirs, x, use_reentrant=False).sum().backward()
    assert norm.num_batches_tracked == theirs.num_batches_tracked == 2


def test_a_group_shares_a_replay_between_disjoint_backwards_and_refuses_overlapping_ones() -> None:
    x, y = leaf(), leaf()

    def fn(a: torch.Tensor, b: torch.Tensor) -> Any:
        return a.sin().exp(), b.cos().exp()

    u, v = ckpt(fn, x, y)
    before = counters.replays
    with compat.GraphExecGroup():
        torch.autograd.grad(u.sum(), x)
        torch.autograd.grad(v.sum(), y)
    assert counters.replays == before + 1
    u, v = ckpt(fn, x, y)
    with compat.GraphExecGroup(), pytest.raises(compat.CheckpointError, match="overlap"):
        torch.autograd.grad(u.sum(), x, retain_graph=True)
        torch.autograd.grad(u.sum(), x, retain_graph=True)


def test_groups_do_not_nest() -> None:
    with compat.GraphExecGroup(), pytest.raises(RuntimeError, match="cannot be nested"):
        with compat.GraphExecGroup():
            pass
    with compat.GraphExecGroup():
        pass


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("segments", [1, 2, 3])
def test_checkpoint_sequential_equals_the_sequence(segments: int, mode: bool) -> None:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2)) for _ in range(4)))
    want = grad_of(layers)
    assert torch.equal(
        grad_of(lambda x: compat.checkpoint_sequential(layers, segments, x, use_reentrant=mode)), want
    )
    with pytest.raises(ValueError, match="Unexpected keyword arguments"):
        compat.checkpoint_sequential(layers, 2, leaf(), use_reentrant=mode, debug=True)


def test_detach_variable_and_check_backward_validity_behave_as_torchs() -> None:
    x = leaf()
    alone, number = compat.detach_variable((x, 3))
    assert alone.is_leaf
    assert alone.requires_grad
    assert alone is not x
    assert number == 3
    with pytest.raises(RuntimeError, match="Only tuple of tensors is supported"):
        compat.detach_variable([x])  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="None of the inputs"):
        compat.check_backward_validity([torch.ones(1)])
    compat.check_backward_validity([x])


def test_the_policy_has_all_six_members_with_torchs_values() -> None:
    assert [(p.name, p.value) for p in compat.CheckpointPolicy] == [
        ("MUST_SAVE", 0), ("PREFER_SAVE", 1), ("MUST_RECOMPUTE", 2), ("PREFER_RECOMPUTE", 3),
        ("MUST_CPU_OFFLOAD", 4), ("PREFER_CPU_OFFLOAD", 5),
    ]  # fmt: skip


def test_noop_context_fn_gives_two_contexts_that_do_nothing() -> None:
    forward, recompute = compat.noop_context_fn()
    with forward, recompute:
        pass


def test_the_generator_form_opens_a_region_around_code_that_the_caller_runs() -> None:
    from distckpt.compat.checkpoint import _checkpoint_without_reentrant_generator as generator

    def run(x: torch.Tensor) -> torch.Tensor:
        g = generator(work, True, compat.noop_context_fn, "default", False, True, x)
        next(g)
        out = work(x)
        with pytest.raises(StopIteration):
            next(g)
        return out

    assert torch.equal(grad_of(run), grad_of(work))


def test_nested_both_ways_equals_plain_autograd() -> None:
    want = grad_of(lambda x: work(work(x).cos()))
    assert torch.equal(grad_of(lambda x: ckpt(lambda t: work(ckpt(work, t).cos()), x)), want)
    assert torch.equal(grad_of(lambda x: reentrant(lambda t: work(ckpt(work, t).cos()), x)), want)
    assert torch.equal(grad_of(lambda x: ckpt(lambda t: work(reentrant(work, t).cos()), x)), want)
