"""What a selective region keeps: unwritten until the replay, no longer than anybody needs it, and found again."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import distckpt as dc
from distckpt._torch import storage_of
from distckpt.errors import NoPolicy, PinMismatch, SavedOutputChanged, SelectiveMismatch
from distckpt.policy.saved_outputs import SavedOutput, saved_in
from tests.engine.exact import Region, exact, leaf

aten = torch.ops.aten
Fn = Callable[[torch.Tensor], torch.Tensor]
W = torch.linspace(-1.0, 1.0, 36).view(6, 6)


def keeps(*policy: Any, **options: Any) -> Callable[[], Any]:
    chosen: Any = (
        policy[0]
        if callable(policy[0]) and not isinstance(policy[0], torch._ops.OpOverload)
        else list(policy)
    )
    return functools.partial(dc.create_selective_checkpoint_contexts, chosen, **options)


MM = keeps(aten.mm.default)


def gradient(fn: Fn, x: torch.Tensor, **options: Any) -> torch.Tensor:
    return torch.autograd.grad(dc.checkpoint(fn, x, **options).sum(), x)[0]


def is_exact(fn: Fn, *shape: int, **options: Any) -> None:
    def program(region: Region) -> Any:
        x = leaf(*shape)
        out = region(fn, x)
        return [
            out,
            *torch.autograd.grad(out.sum(), x, retain_graph=True),
            *torch.autograd.grad(out.sum(), x),
        ]

    exact(program, **options)


# Each changes ``h`` where its own version counter does not move.
CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "unsafe view": lambda h: h.add_(1.0),  # a product of three dimensions ends in one
    "a view of an unsafe view": lambda h: h[0].add_(1.0),
    ".data": lambda h: h.data.add_(1.0),
    "foreach": lambda h: torch._foreach_add_([h.data], 1.0),
    "out=": lambda h: torch.add(h.detach(), 1.0, out=h.data),
    "as_strided": lambda h: h.data.as_strided((3,), (1,)).zero_(),
    "unsafe chunk": lambda h: h.data.unsafe_chunk(2, -1)[1].mul_(2.0),
    "unsafe split": lambda h: torch.unsafe_split(h.data, 2)[0].mul_(2.0),
    "a slice assigned to": lambda h: h.data.__setitem__(0, 3.0),
}


def changes_a_kept_output(change: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def fn(x: torch.Tensor) -> torch.Tensor:
        h = x @ W
        u = h.tanh()
        CHANGES[change](h)
        return (u * h).exp()

    return fn


@pytest.mark.parametrize("change", CHANGES)
def test_a_kept_output_changed_through_another_tensor_over_its_memory_is_refused(change: str) -> None:
    fn = changes_a_kept_output(change)
    with pytest.raises(SavedOutputChanged, match="DC121"):
        gradient(fn, leaf(2, 3, 6), context_fn=MM)
    dc.checkpoint(fn, leaf(2, 3, 6)).sum().backward()
    dc.checkpoint(
        fn, leaf(2, 3, 6), context_fn=keeps(aten.mm.default, allow_cache_entry_mutation=True)
    ).sum().backward()


@pytest.mark.parametrize("change", CHANGES)
def test_compat_computes_again_what_torchs_engine_does_not_see_changed(change: str) -> None:
    fn = changes_a_kept_output(change)
    x = leaf(2, 3, 6)
    (plain,) = torch.autograd.grad(fn(x).sum(), x)
    out = dc.compat.checkpoint(fn, x, use_reentrant=False, context_fn=MM)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], plain)


def test_compat_passes_by_a_changed_output_that_no_gradient_needs() -> None:
    """A GRU changes its kept products through unsafe chunks; it was refused, and torch's engine runs."""
    module = torch.nn.GRU(6, 6)

    def fn(x: torch.Tensor) -> torch.Tensor:
        module(x)
        return x.sin()

    x = leaf(3, 6)
    out = dc.compat.checkpoint(fn, x, use_reentrant=False, context_fn=keeps(aten.addmm.default))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], x.cos())


def test_compat_draws_no_kept_number_again() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand_like(x)
        y = (x * noise).sin()
        noise.data.add_(1.0)
        return (y * noise).exp()

    x = leaf(6)
    out = dc.compat.checkpoint(fn, x, use_reentrant=False, context_fn=keeps(aten.rand_like.default))
    with pytest.raises(RuntimeError, match="mutated"):
        out.sum().backward()


@pytest.mark.parametrize("cell", [torch.nn.GRU, torch.nn.LSTM])
def test_a_recurrent_module_that_changes_its_kept_products_is_refused(cell: Any) -> None:
    """Its gates are unsafe chunks of the product, and change in place."""
    torch.manual_seed(0)
    module = cell(6, 6)

    def program(region: Region) -> Any:
        x = leaf(2, 3, 6)
        return torch.autograd.grad(region(lambda x: module(x)[0], x).sum(), x)

    try:
        exact(program, context_fn=keeps(aten.addmm.default))
    except SavedOutputChanged:
        assert cell is torch.nn.GRU


def test_a_change_by_the_caller_through_an_unsafe_view_is_refused() -> None:
    x = leaf(2, 3, 6)

    def fn(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x @ W
        return h, (h * 2.0).sin().exp()

    h, out = dc.checkpoint(fn, x, context_fn=MM)
    with torch.no_grad():
        h.add_(1.0)
    with pytest.raises(SavedOutputChanged):
        out.sum().backward()


def _before_the_save(x: torch.Tensor) -> torch.Tensor:
    x = x * 1.0
    x.data.add_(1.0)
    return (x @ W).sin().exp()


def _beside(x: torch.Tensor) -> torch.Tensor:
    h = x @ W
    other = h * 2.0
    other.data.add_(1.0)
    return (h.sin() * other).exp()


def _last(x: torch.Tensor) -> torch.Tensor:
    h = x.sin().exp() @ W
    h.data.add_(1.0)
    return h


def _copied(x: torch.Tensor) -> torch.Tensor:
    h = (x @ W).clone()
    h.data.add_(1.0)
    return h.sin().exp()


@pytest.mark.parametrize("fn", [_before_the_save, _beside, _last, _copied])
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_change_that_no_kept_value_sees_is_no_error(fn: Fn, early_stop: bool) -> None:
    is_exact(fn, 2, 3, 6, context_fn=MM, early_stop=early_stop)


def test_a_change_of_one_of_two_kept_outputs_in_one_memory_is_no_change_of_the_other() -> None:
    with torch.library._scoped_library("distckpt_kept", "FRAGMENT") as lib:
        lib.define("halves(Tensor x) -> (Tensor, Tensor)")

        def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            both = torch.cat([x, x * 2.0])
            return both[: len(x)], both[len(x) :]

        lib.impl("halves", halves, "CPU")
        op = torch.ops.distckpt_kept.halves.default

        def fn(x: torch.Tensor) -> torch.Tensor:
            a, b = op(x.detach())
            b.data.zero_()
            return (x * a).sin().exp()

        def other(x: torch.Tensor) -> torch.Tensor:
            a, b = op(x.detach())
            y = (x * b).sin()
            b.data.zero_()
            return (y * a).exp()

        with pytest.raises(SavedOutputChanged):
            gradient(other, leaf(4), context_fn=keeps(op))
        with pytest.raises(SavedOutputChanged):  # b is a kept output as well, and the replay is handed both
            gradient(fn, leaf(4), context_fn=keeps(op))


def test_an_operator_of_somebodys_that_returns_its_argument_is_not_kept() -> None:
    with torch.library._scoped_library("distckpt_kept", "FRAGMENT") as lib:
        lib.define("same(Tensor x) -> Tensor")
        lib.impl("same", lambda x: x.view(x.shape), "CPU")
        same = torch.ops.distckpt_kept.same.default

        def fn(x: torch.Tensor) -> torch.Tensor:
            c = torch.ones(6)
            d = same(c)
            c.add_(1.0)  # the replay must change what it hands on
            return (x * d).sin().exp()

        is_exact(fn, 6, context_fn=keeps(same))


def test_batch_statistics_that_a_kept_norm_writes_are_there_in_the_replay() -> None:
    """Its schema does not say that it writes them."""

    def program(region: Region) -> Any:
        norm = torch.nn.BatchNorm1d(6)

        def fn(x: torch.Tensor) -> torch.Tensor:
            assert norm.running_mean is not None
            return (norm(x) * norm.running_mean.clone()).sin().exp()

        x = leaf(4, 6)
        return [*torch.autograd.grad(region(fn, x).sum(), x), norm.running_mean]

    exact(program, context_fn=keeps(aten.native_batch_norm.default))


@pytest.mark.parametrize("flavour", ["dc", "compat"])
@pytest.mark.parametrize("op", [aten.add_.Tensor, aten.copy_.default, aten._foreach_add_.Scalar])
def test_an_operator_that_writes_into_its_argument_is_never_skipped(flavour: str, op: Any) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 2.0
        y.add_(torch.ones(6))
        z = torch.zeros(6)
        z.copy_(y.detach())
        torch._foreach_add_([z], 1.0)
        return (y * z).sin().exp()

    x = leaf(6)
    (want,) = torch.autograd.grad(fn(x).sum(), x)
    call = dc.checkpoint if flavour == "dc" else functools.partial(dc.compat.checkpoint, use_reentrant=False)
    assert torch.equal(want, *torch.autograd.grad(call(fn, x, context_fn=keeps(op)).sum(), x))


# Operators that raise


def _fails(op: Callable[[], Any]) -> bool:
    try:
        op()
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("kept", [aten.mm.default, aten.sin.default, aten.add_.Tensor])
@pytest.mark.parametrize("early_stop", [True, False])
def test_an_operator_that_raises_and_is_caught_is_exact(kept: Any, early_stop: bool) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x @ W
        assert _fails(lambda: torch.mm(x, torch.ones(3, 3)))
        y = (y @ W).sin()
        assert _fails(lambda: y.detach().add_(torch.ones(7)))
        return (y @ W).exp() @ W

    is_exact(fn, 4, 6, context_fn=keeps(kept), early_stop=early_stop)
    x = leaf(4, 6)
    out = dc.compat.checkpoint(fn, x, use_reentrant=False, context_fn=keeps(kept))
    assert torch.equal(*torch.autograd.grad(out.sum(), x), *torch.autograd.grad(fn(x).sum(), x))


@pytest.mark.parametrize("handler", [RuntimeError, Exception, BaseException])
def test_a_handler_of_the_functions_does_not_swallow_the_error_of_a_replay(handler: Any) -> None:
    def unknown(x: torch.Tensor) -> torch.Tensor:
        try:
            y = x.cos() if dc.is_recomputing() else x.sin()
        except handler:
            y = x
        return y.exp().sin()

    def changed(x: torch.Tensor) -> torch.Tensor:
        try:
            h = x.exp()
        except handler:
            h = x
        u = h.tanh()
        h.data.add_(1.0)
        return u.sin() * h.sin()

    def pinned(x: torch.Tensor) -> torch.Tensor:
        x = x * 2.0
        try:
            if dc.is_recomputing():
                x = dc.pin(x)
        except handler:
            x = x * 1.0
        return x.sin().exp()

    for fn, error in ((unknown, SelectiveMismatch), (changed, SavedOutputChanged), (pinned, PinMismatch)):
        x = leaf(6)
        out = dc.checkpoint(fn, x, context_fn=keeps(aten.exp.default))
        for _ in range(2):
            with pytest.raises(error):
                torch.autograd.grad(out.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="encountered during backward"):
        dc.compat.checkpoint(unknown, leaf(6), use_reentrant=False, context_fn=MM).sum().backward()


def test_a_handler_of_the_functions_does_not_swallow_the_error_of_a_policy() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        try:
            return x.sin()
        except Exception:
            return x.cos()

    with pytest.raises(NoPolicy):
        dc.checkpoint(fn, leaf(6), context_fn=keeps(lambda ctx, op, *args, **kwargs: None))


def test_an_inference_tensor_made_in_a_selective_region_is_exact() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            scores = (W @ W) @ W
            scores.add_(1.0)
            order = int(scores.sum(0).argmax())
        return (x[:, order] * 2.0).sin().exp()

    is_exact(fn, 4, 6, context_fn=keeps(lambda ctx, op, *args, **kwargs: True))
    is_exact(fn, 4, 6, context_fn=MM, early_stop=False)


def test_a_pinned_inference_tensor_is_exact() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            order = dc.pin((W @ W).sum(0).topk(2).indices)
            picked = order.tolist()
        return (x[:, picked] * 2.0).sin().exp()

    is_exact(fn, 4, 6)


# How long, and how many bytes


def held(region: Any) -> int:
    """Bytes of what the selective contexts of ``region`` keep, which tells the same of itself."""
    found: dict[int, int] = {}
    for calls in region.kept.calls.values():
        for entry in calls.kept.values():
            for kept in saved_in(entry.out):
                assert type(kept) is SavedOutput
                found.update([storage_of(kept.value)])
    assert sum(found.values()) == region.kept.nbytes
    return sum(found.values())


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    from distckpt.engine import record

    found: list[Any] = []

    class Seen(record.Region):
        def __init__(self) -> None:
            found.append(weakref.ref(self))

    monkeypatch.setattr(record, "Region", Seen)
    return found


EVERYTHING = keeps(lambda ctx, op, *args, **kwargs: True)
BYTES: dict[str, tuple[Fn, Any, int]] = {
    # one product is 4 x 6 floats, 96 bytes
    "needed": (lambda x: (x @ W).sin().exp(), MM, 96),
    "after the last save": (lambda x: x.sin().exp() @ W, MM, 0),
    "one of two": (lambda x: ((x @ W).sin() @ W) * 3.0, MM, 96),
    "passed on the way to a later save": (lambda x: (x @ W) @ W, MM, 96),
    "consumers that save nothing": (lambda x: (x.exp() @ W + 1.0).sum() * 2.0, MM, 0),
    "a loss for the log at the end": (lambda x: (x.sin(), (x @ W).sin().mean().item())[0], MM, 0),
    "everything": (lambda x: (x @ W).sin().exp(), EVERYTHING, 3 * 96),
}


@pytest.mark.parametrize("case", BYTES)
def test_a_kept_output_that_no_replay_reaches_is_let_go_when_the_record_ends(
    case: str, regions: list[Any]
) -> None:
    fn, context_fn, size = BYTES[case]
    x = leaf(4, 6)
    out = dc.checkpoint(fn, x, context_fn=context_fn)
    region = regions[0]()
    assert (0 if region is None else held(region)) == size
    del region
    assert torch.equal(*torch.autograd.grad(out.sum(), x), *torch.autograd.grad(fn(x).sum(), x))
    is_exact(fn, 4, 6, context_fn=context_fn)
    is_exact(fn, 4, 6, context_fn=context_fn, early_stop=False)


def test_a_replay_that_runs_to_its_end_finds_what_it_kept(regions: list[Any]) -> None:
    dc_out = dc.checkpoint(lambda x: x.sin().exp() @ W, leaf(4, 6), context_fn=MM, early_stop=False)
    assert held(regions[0]()) == 96
    del dc_out


@pytest.mark.parametrize("flavour", ["dc", "compat"])
@pytest.mark.parametrize(
    "policy", [[aten.mm.default], lambda ctx, op, *args, **kwargs: True], ids=["list", "all"]
)
def test_a_selective_step_leaves_nothing_for_the_collector(flavour: str, policy: Any) -> None:
    call = dc.checkpoint if flavour == "dc" else functools.partial(dc.compat.checkpoint, use_reentrant=False)

    def step() -> None:
        x = leaf(4, 6)
        call(
            lambda x: (x @ W).max(1).values.sin().exp(),
            x,
            context_fn=keeps(policy) if callable(policy) else MM,
        ).sum().backward()

    assert cycles(step) == 0


def test_a_pin_leaves_nothing_for_the_collector() -> None:
    def step() -> None:
        x = leaf(4, 6)

        def fn(x: torch.Tensor) -> torch.Tensor:
            pinned = dc.pin({"order": x[0].topk(2), "rest": [x.sin(), (None, 3)]})
            return (x[:, pinned["order"].indices].sum(1, True) * pinned["rest"][0]).exp()

        dc.checkpoint(fn, x).sum().backward()

    assert cycles(step) == 0


def cycles(step: Callable[[], None]) -> int:
    """How many objects a step leaves that only the collector frees."""
    for _ in range(3):
        step()
    while gc.collect():  # what earlier tests left may take more than one pass
        pass
    gc.disable()
    try:
        step()
        return gc.collect()
    finally:
        gc.enable()


def test_what_depends_on_the_operator_alone_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from distckpt.policy import operators

    monkeypatch.setattr(operators, "_operators", {})
    asked: list[Any] = []
    monkeypatch.setattr(operators, "has_ordered_effect", lambda op: bool(asked.append(op)))
    for context_fn in (MM, EVERYTHING, keeps(lambda ctx, op, *args, **kwargs: False)):
        for _ in range(3):
            gradient(lambda x: ((x @ W).sin() @ W).sin().sin(), leaf(4, 6), context_fn=context_fn)
    assert sorted(map(str, asked)) == ["aten.mm.default", "aten.sin.default"]


def test_a_policy_function_is_asked_in_every_call() -> None:
    answers = iter([True, False, True])
    asked: list[Any] = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> bool:
        asked.append(op)
        return op is aten.mm.default and next(answers)

    is_exact(lambda x: (((x @ W).sin() @ W).sin() @ W).exp(), 4, 6, context_fn=keeps(policy))
    assert asked.count(aten.mm.default) == 3


def test_one_pair_of_contexts_for_several_regions_is_exact() -> None:
    """Each region keeps for itself, also one inside the other."""

    def program(region: Region) -> Any:
        pair = MM()
        x = leaf(4, 6)
        selective = functools.partial(region, context_fn=lambda: pair) if region is not plain else region

        def block(x: torch.Tensor) -> torch.Tensor:
            return (x @ W).sin().exp()

        a = selective(block, x)
        b = selective(lambda x: selective(block, x @ W).sin(), x * 2.0)
        return [*torch.autograd.grad(b.sum(), x), *torch.autograd.grad(a.sum(), x)]

    from tests.engine.exact import plain, same_bits

    assert all(same_bits(a, b) for a, b in zip(program(plain), program(dc.checkpoint), strict=True))


def test_a_record_function_in_one_of_record_and_replay_is_no_operator_of_the_region() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        if not dc.is_recomputing():
            with torch.profiler.record_function("only here"):
                x = x * 1.0
        else:
            x = x * 1.0
        with torch.profiler.record_function("in both"):
            return (x @ W).sin().exp()

    is_exact(fn, 4, 6, context_fn=EVERYTHING)


def test_released_outputs_are_computed_again(regions: list[Any]) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return (x @ W).sin().exp()

    x = leaf(4, 6)
    out = dc.checkpoint(fn, x, context_fn=MM)
    region = regions[0]()
    assert region.kept.nbytes == 96
    region.kept.release()
    assert region.kept.nbytes == 0
    (found,) = torch.autograd.grad(out.sum(), x)
    (wanted,) = torch.autograd.grad(fn(x).sum(), x)
    assert torch.equal(found, wanted)
