"""Selective regions of ``dc.checkpoint`` with torch-shaped contexts: exact, also where torch's are not."""

from __future__ import annotations

import functools
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import distckpt as dc
from distckpt.errors import BufferChanged, NoPolicy, OffloadRefused, SavedOutputChanged
from tests import processes
from tests.engine.exact import Region, exact, leaf

aten = torch.ops.aten
Policy = dc.CheckpointPolicy
MATMULS = [aten.mm.default, aten.addmm.default]


def contexts(policy: Any, **options: Any) -> Callable[[], Any]:
    return functools.partial(dc.create_selective_checkpoint_contexts, policy, **options)


def same_as_plain(program: Callable[[Any], list[torch.Tensor]]) -> None:
    """``program`` with ``dc.checkpoint`` for its regions, and with calls that ignore the options, to the bit."""
    torch.manual_seed(0)
    expected = program(lambda fn, *args, **options: fn(*args))
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(expected, program(dc.checkpoint), strict=True))


def hooks(pack: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)


def twice(out: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    return [torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for _ in range(2)]


def work(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = torch.native_dropout((x @ w).relu().sin(), 0.3, True)[0]
    return (y @ w).exp().sin() @ w


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func] += 1
        return func(*args, **(kwargs or {}))


def saves(*ops: Any) -> Callable[..., Any]:
    return lambda ctx, op, *args, **kwargs: Policy.MUST_SAVE if op in ops else Policy.PREFER_RECOMPUTE


def random_policy(seed: int) -> Callable[..., Any]:
    chosen = random.Random(seed)
    verbs = [
        Policy.MUST_SAVE,
        Policy.PREFER_SAVE,
        Policy.MUST_RECOMPUTE,
        Policy.PREFER_RECOMPUTE,
        True,
        False,
    ]
    return lambda ctx, op, *args, **kwargs: chosen.choice(verbs)


POLICIES: dict[str, Callable[[], Any]] = {
    "nothing": list,
    "matmuls": lambda: MATMULS,
    "cheap ones": lambda: [aten.sin.default, aten.relu.default],
    "random ones": lambda: saves(aten.native_dropout.default),
    "everything": lambda: lambda ctx, op, *a, **k: Policy.MUST_SAVE,
    **{f"any {seed}": functools.partial(random_policy, seed) for seed in range(5)},
}
policies = pytest.mark.parametrize("name", POLICIES)


@policies
@pytest.mark.parametrize("early_stop", [True, False])
def test_any_policy_is_exact(name: str, early_stop: bool) -> None:
    def program(region: Region) -> Any:
        x, w = leaf(4, 4), leaf(4, 4, seed=2)
        out = region(work, x, w)
        out.sum().backward()
        return out, x.grad, w.grad

    exact(program, context_fn=contexts(POLICIES[name]()), early_stop=early_stop)


@policies
def test_a_second_backward_of_a_selective_region_is_exact(name: str) -> None:
    def program(region: Region) -> Any:
        x, w = leaf(4, 4), leaf(4, 4, seed=2)
        out = region(work, x, w).sum()
        return [g for _ in range(3) for g in torch.autograd.grad(out, (x, w), retain_graph=True)]

    exact(program, context_fn=contexts(POLICIES[name]()))


@policies
def test_a_double_backward_of_a_selective_region_is_exact(name: str) -> None:
    def program(region: Region) -> Any:
        x, w = leaf(4, 4), leaf(4, 4, seed=2)
        (g,) = torch.autograd.grad(region(work, x, w).sum(), x, create_graph=True)
        return g, *torch.autograd.grad(g.pow(2).sum(), (x, w))

    exact(program, context_fn=contexts(POLICIES[name]()))


@policies
def test_partial_backwards_of_a_selective_region_are_exact(name: str) -> None:
    def program(region: Region) -> Any:
        x, w = leaf(4, 4), leaf(4, 4, seed=2)
        out = region(work, x, w).sum()
        one = torch.autograd.grad(out, w, retain_graph=True)
        two = torch.autograd.grad(out, x)
        return *one, *two

    exact(program, context_fn=contexts(POLICIES[name]()))


@policies
def test_a_selective_region_inside_and_around_others_is_exact(name: str) -> None:
    def program(region: Region) -> Any:
        x, w = leaf(4, 4), leaf(4, 4, seed=2)
        inside = dc.checkpoint if region.__name__ != "plain" else region
        out = region(lambda a, b: inside(work, work(a, b), b), inside(work, x, w), w)
        out.sum().backward()
        return out, x.grad, w.grad

    def named(fn: Any, *args: Any, **kwargs: Any) -> Any:
        return dc.checkpoint(fn, *args, context_fn=contexts(POLICIES[name]()), **kwargs)

    from tests.engine.exact import plain, same_bits

    torch.manual_seed(0)
    want = program(plain)
    torch.manual_seed(0)
    found = program(named)
    assert all(same_bits(a, b) for a, b in zip(want, found, strict=True))


def test_saved_operators_do_not_run_again_and_the_others_do() -> None:
    x, w = leaf(4, 4), leaf(4, 4, seed=2)
    out = dc.checkpoint(work, x, w, context_fn=contexts(MATMULS)).sum()
    with Count() as count:
        out.backward()
    assert count.ops[aten.sin.default] == 2  # recomputed
    with Count() as plain:
        work(x, w).sum().backward()
    assert count.ops[aten.mm.default] == plain.ops[aten.mm.default] - 3  # the forward's three are kept


def test_a_kept_random_operator_leaves_the_generator_where_the_forward_did() -> None:
    """The draws after it would be other ones in the replay otherwise."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        mask = torch.rand_like(x) > 0.5
        return F.dropout((x * mask).sin(), 0.5).exp() * torch.rand(()).item()

    def program(region: Region) -> Any:
        x = leaf(64)
        out = region(fn, x)
        out.sum().backward()
        return out, x.grad

    exact(program, context_fn=contexts(saves(aten.rand_like.default)), early_stop=False)


def test_registered_generators_follow_kept_operators_too() -> None:
    def program(region: Region) -> Any:
        router = torch.Generator().manual_seed(3)

        def fn(x: torch.Tensor) -> torch.Tensor:
            a = torch.bernoulli(torch.full((64,), 0.5), generator=router)
            b = torch.bernoulli(torch.full((64,), 0.5), generator=router)
            return (x * a).sin() * b * x

        x = leaf(64)
        with dc.rng.register("router", router):
            out = region(fn, x)
            out.sum().backward()
        return out, x.grad, torch.rand(2, generator=router)

    first = iter([True])
    exact(
        program,
        context_fn=contexts(lambda ctx, op, *a, **k: op is aten.bernoulli.default and next(first, False)),
    )


OPTIONS = [{}, {"early_stop": False}, {"determinism_check": "fingerprint"}, {"determinism_check": "bitwise"}]


@pytest.mark.parametrize("kept", [aten.mm.default, aten.rand.generator, aten.sin.default])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["generator", "source that runs operators"])
def test_reading_a_registered_stream_is_no_operator_of_a_selective_region(
    kept: Any, option: dict[str, Any], kind: str
) -> None:
    def program(region: Region) -> Any:
        router = torch.Generator().manual_seed(3)
        x, w = leaf(8, 8), leaf(8, 8, seed=2)

        def fn(x: torch.Tensor) -> torch.Tensor:
            return ((x @ w) * torch.rand(8, generator=router)).sin() @ w * torch.rand(8, generator=router)

        if kind == "generator":
            registration = dc.rng.register("router", router)
        else:  # mm runs in its reader
            eye = torch.eye(1)
            registration = dc.rng.register_source(
                "router", lambda: (torch.mm(eye, eye), router.get_state())[1], router.set_state
            )
        with registration:
            out = region(fn, x)
            torch.rand(2, generator=router)
            out.sum().backward()
        return out, x.grad, w.grad, torch.rand(2, generator=router)

    exact(program, context_fn=contexts(saves(kept)), **option)


def test_selective_regions_under_autocast_are_exact() -> None:
    """Cached weight casts make the operator count of forward and replay differ (pytorch#193338)."""

    def program(region: Region) -> Any:
        torch.manual_seed(1)
        layer = torch.nn.Linear(4, 4)
        x = leaf(2, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
            out = region(lambda t: layer(layer(t).sin()), y).float()
        out.sum().backward()
        return out, x.grad, layer.weight.grad

    exact(program, context_fn=contexts(saves(*MATMULS)))


def test_changing_a_kept_output_in_place_is_refused_unless_allowed() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x @ w
        y.mul_(2.0)
        return y.sin().exp()

    x, w = leaf(4, 4), leaf(4, 4, seed=2)
    out = dc.checkpoint(fn, x, w, context_fn=contexts(MATMULS))
    with pytest.raises(SavedOutputChanged) as caught:
        out.sum().backward()
    assert caught.value.code == "DC121"


def test_keeping_an_output_that_a_composite_operator_changes_is_refused() -> None:
    """Dropout on the CPU is an in-place Bernoulli draw, divided in place."""
    out = dc.checkpoint(F.dropout, leaf(64), context_fn=contexts(lambda ctx, op, *a, **k: Policy.MUST_SAVE))
    with pytest.raises(SavedOutputChanged):
        out.sum().backward()


@pytest.mark.parametrize("verb", ["MUST_CPU_OFFLOAD", "PREFER_CPU_OFFLOAD"])
def test_an_offload_policy_is_refused_and_not_silently_recomputed(verb: str) -> None:
    if not hasattr(Policy, verb):
        pytest.skip("this torch has no such policy")
    with pytest.raises(OffloadRefused) as caught:
        dc.checkpoint(
            work, leaf(4, 4), leaf(4, 4), context_fn=contexts(lambda ctx, op, *a, **k: getattr(Policy, verb))
        )
    assert caught.value.code == "DC122"


def test_a_replay_that_runs_an_unknown_operator_is_refused() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x @ w
        return (y.cos() if dc.is_recomputing() else y.sin()).exp()

    out = dc.checkpoint(fn, leaf(4, 4), leaf(4, 4), context_fn=contexts(MATMULS))
    with pytest.raises(dc.CheckpointError) as caught:
        out.sum().backward()
    assert caught.value.code in ("DC101", "DC102", "DC120")


@pytest.mark.parametrize("wrong", [[aten.mm], ["aten.mm"], [torch.mm]])
def test_a_list_with_something_else_than_operators_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="OpOverload"):
        dc.create_selective_checkpoint_contexts(wrong)


def test_what_is_neither_a_function_nor_a_list_is_refused() -> None:
    with pytest.raises(TypeError):
        dc.create_selective_checkpoint_contexts({aten.mm.default})  # type: ignore[arg-type]


def test_the_policy_is_asked_once_per_operator_and_sees_its_output() -> None:
    asked: list[tuple[Any, bool, bool]] = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append((op, ctx.is_recompute, isinstance(ctx.op_output, torch.Tensor)))
        return Policy.PREFER_RECOMPUTE

    x = leaf(4)
    dc.checkpoint(lambda t: t.sin().exp(), x, context_fn=contexts(policy)).sum().backward()
    assert asked == [(aten.sin.default, False, True), (aten.exp.default, False, True)]


def test_kept_outputs_are_freed_with_the_graph() -> None:
    import gc
    import weakref

    kept: list[weakref.ref[Any]] = []

    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x @ w
        kept.append(weakref.ref(y.untyped_storage()))
        return y.sin().exp()

    gc.collect()
    gc.disable()
    try:
        x, w = leaf(4, 4), leaf(4, 4, seed=2)
        out = dc.checkpoint(fn, x, w, context_fn=contexts(MATMULS)).sum()
        out.backward()
        del out
        gc.collect()
        assert all(ref() is None for ref in kept)
    finally:
        gc.enable()


def test_users_saved_tensor_hooks_see_what_a_selective_region_keeps() -> None:
    seen: list[torch.Size] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        seen.append(t.shape)
        return t

    x, w = leaf(4, 4), leaf(4, 6, seed=2)
    for respects, expected in ((None, 1), (True, 1), (False, 0)):
        seen.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = dc.checkpoint(
                lambda a, b: (a @ b).sin().exp(),
                x,
                w,
                context_fn=contexts(MATMULS),
                respect_saved_tensors_hooks=respects,
            )
        assert seen.count(torch.Size([4, 6])) - 1 == expected  # the input w has that shape too
        out.sum().backward()


def test_what_a_region_keeps_does_not_pass_through_an_outer_replay_that_must_run_to_its_end() -> None:
    """A gradient of RReLU taken inside replays twice; the second replay's hooks are the engine's, not a user's."""

    def program(region: Any) -> list[torch.Tensor]:
        def fn(x: torch.Tensor) -> torch.Tensor:
            y = region(torch.sin, x, context_fn=contexts([aten.sin.default]))
            (g,) = torch.autograd.grad(F.rrelu(y, 0.1, 0.4, training=True).sum(), x)
            return g * x

        x = leaf(6)
        out = region(fn, x * 2.0)
        return [out, *torch.autograd.grad(out.sum(), x)]

    same_as_plain(program)


def test_replays_of_a_nested_region_are_no_operators_of_the_selective_one() -> None:
    """The record replays the nested region twice, the replay under a session once: nothing may be counted by that."""

    def program(region: Any) -> list[torch.Tensor]:
        def inner(x: torch.Tensor) -> torch.Tensor:
            y = x.sin().exp().sum()
            return x + sum(torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))

        def outer(x: torch.Tensor) -> torch.Tensor:
            return region(inner, x).sin().exp()

        x = leaf(6)
        out = region(outer, x * 2.0, context_fn=contexts([aten.sin.default]))
        with dc.session():
            return list(torch.autograd.grad(out.sum(), x))

    same_as_plain(program)


@pytest.mark.parametrize("pack", [torch.clone, lambda t: t], ids=["copying", "identity"])
def test_a_kept_output_under_users_hooks_comes_back_without_history(pack: Any) -> None:
    """A hook put on it in one replay made the next replay lose its own."""

    def hooked(x: torch.Tensor) -> torch.Tensor:
        y = x * 1.0
        y.register_hook(lambda g: g * 0.5)
        return y

    def program(region: Any) -> list[torch.Tensor]:
        def fn(x: torch.Tensor) -> torch.Tensor:
            y = region(lambda t: hooked(t.sin()), x.sin()).sum()
            return torch.autograd.grad(y, x, create_graph=True)[0]

        x = leaf(6)
        with hooks(pack):
            out = region(fn, x, context_fn=contexts([aten.mul.Tensor]), early_stop=False)
        return twice(out, x)

    same_as_plain(program)


@pytest.mark.parametrize(
    "through",
    [lambda t: t, lambda t: t.data, lambda t: aten._unsafe_view(t, [2, 3])],
    ids=["itself", "data", "unsafe view"],
)
@pytest.mark.parametrize("pack", [torch.clone, lambda t: t], ids=["copying", "identity"])
def test_a_kept_output_under_users_hooks_that_was_changed_in_place_is_refused(
    pack: Any, through: Any
) -> None:
    """By the forward when the hooks hand it through, by the first replay when they copy it."""

    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        through(y).mul_(0.5)
        return y.exp()

    x = leaf(6)
    with hooks(pack):
        out = dc.checkpoint(fn, x, context_fn=contexts([aten.sin.default]))
    with pytest.raises(SavedOutputChanged):
        twice(out, x)


def test_users_hooks_may_hand_out_a_new_tensor_each_time() -> None:
    def written(array: Any) -> torch.Tensor:
        return torch.zeros(array.shape, dtype=torch.tensor(array).dtype).copy_(torch.tensor(array))

    def program(region: Any) -> list[torch.Tensor]:
        x, w = leaf(4, 4), leaf(4, 4, seed=2)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), written):
            out = region(work, x, w, context_fn=contexts(MATMULS))
        return twice(out, w)

    same_as_plain(program)


def test_a_gradient_taken_in_a_replay_does_not_use_up_what_a_retained_graph_needs() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            return torch.autograd.grad((y @ y).sum(), y)[0] * x.sin().exp()

    x = leaf(4, 4)
    out = dc.checkpoint(fn, x, context_fn=contexts([aten.mm.default]), early_stop=False)
    with Count() as count:
        twice(out, x)
    assert count.ops[aten.mm.default] == 0


def test_a_users_unpack_hook_is_no_operator_of_the_region_around() -> None:
    """It runs once per replay of the nested region: twice in the record, once in the replay under a session."""

    def program(region: Any) -> list[torch.Tensor]:
        def inner(x: torch.Tensor) -> torch.Tensor:
            y = x.sin().sum()
            return x + sum(torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))

        def outer(x: torch.Tensor) -> torch.Tensor:
            return region(inner, x).clone().exp()

        x = leaf(6)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
            out = region(outer, x * 2.0, context_fn=contexts([aten.clone.default]))
        with dc.session():
            return list(torch.autograd.grad(out.sum(), x))

    same_as_plain(program)


@pytest.mark.parametrize("kept", [aten.clone.default, aten.copy_.default, aten.detach.default])
def test_rewinding_buffers_is_no_operator_of_the_region_around(kept: Any) -> None:
    def program(region: Any) -> list[torch.Tensor]:
        norm = torch.nn.BatchNorm1d(4)

        def inner(x: torch.Tensor) -> torch.Tensor:
            y = norm(x).sin().sum()
            return x + sum(torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))

        def outer(x: torch.Tensor) -> torch.Tensor:
            return region(inner, x).clone().exp()

        x = leaf(6, 4)
        out = region(outer, x * 2.0, context_fn=contexts([kept]), early_stop=False)
        with dc.session():
            return list(torch.autograd.grad(out.sum(), x))

    same_as_plain(program)


def test_a_kept_clone_in_a_nested_region_with_buffers_is_exact() -> None:
    def program(region: Any) -> list[torch.Tensor]:
        norm = torch.nn.BatchNorm1d(4)

        def outer(x: torch.Tensor) -> torch.Tensor:
            return region(lambda t: norm(t).clone().sin(), x).clone().exp()

        x = leaf(6, 4)
        out = region(outer, x * 2.0, context_fn=contexts([aten.clone.default]), early_stop=False)
        return twice(out, x)

    same_as_plain(program)


class Counting(torch.nn.Module):
    """Multiplies by how often it was called."""

    calls: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1.0)
        return (x * self.calls).clone().exp()


def test_the_copy_of_a_changed_buffer_is_no_operator_of_the_region() -> None:
    x, module = leaf(6), Counting(6)
    out = dc.checkpoint(module, x, context_fn=contexts([aten.clone.default]), early_stop=False)
    module(x)
    (got,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(got, torch.autograd.grad(Counting(6)(x).sum(), x)[0])


def test_buffers_that_become_known_to_change_after_the_record_are_exact() -> None:
    """The replay copies them before the nested forward, and the record did not."""

    class Sometimes(torch.nn.Module):
        calls: torch.Tensor
        change = False

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(2048))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.change:
                self.calls.add_(1.0)
            return x.sin()

    x, module = leaf(6), Sometimes()
    out = dc.checkpoint(
        lambda t: dc.checkpoint(module, t).clone().exp(), x, context_fn=contexts([aten.clone.default])
    )
    module.change = True
    with pytest.raises(BufferChanged):
        dc.checkpoint(module, x)
    module.change = False
    (got,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(got, torch.autograd.grad(x.sin().exp().sum(), x)[0])


@pytest.mark.parametrize("kept", [aten.view.default, aten.clone.default, aten.sin.default])
def test_a_pin_in_a_selective_region_is_exact(kept: Any) -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        order = dc.pin(x.abs().topk(3).indices)
        weight = dc.pin(x.sin())
        return (x[order].clone() * weight[:3]).exp().view(3).sin()

    def program(region: Any) -> list[torch.Tensor]:
        x = leaf(6)
        return twice(region(fn, x * 2.0, context_fn=contexts([kept]), early_stop=False), x)

    same_as_plain(program)


def test_a_users_pack_hook_for_what_a_nested_selective_region_keeps_is_no_operator_of_the_one_around() -> (
    None
):
    """The hooks are on in the record only, so the replay of the outer region runs no pack."""

    def program(region: Any) -> list[torch.Tensor]:
        def outer(x: torch.Tensor) -> torch.Tensor:
            y = region(lambda t: t.sin().exp(), x, context_fn=contexts([aten.sin.default]))
            return y.clone().cos() * x.clone()

        x = leaf(6)
        with hooks(torch.clone):
            out = region(outer, x * 2.0, context_fn=contexts([aten.clone.default]), early_stop=False)
        return twice(out, x)

    same_as_plain(program)


def test_a_policy_that_answers_nothing_is_refused_and_recomputes_in_compat() -> None:
    def context_fn() -> Any:
        return dc.create_selective_checkpoint_contexts(lambda ctx, op, *args, **kwargs: None)

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(NoPolicy, match="answered None for aten"):
        dc.checkpoint(lambda x: x.sin().exp(), x, context_fn=context_fn)
    out = dc.compat.checkpoint(lambda x: x.sin().exp(), x, use_reentrant=False, context_fn=context_fn)
    assert torch.equal(*torch.autograd.grad(out.sum(), x), *torch.autograd.grad(x.sin().exp().sum(), x))


@pytest.mark.filterwarnings("ignore")  # Dynamo's own differ from version to version
def test_dynamo_compiles_none_of_what_a_selective_region_runs_per_operator() -> None:
    """Torch wraps the dispatches of a mode so that Dynamo leaves them alone; ours are left alone without a wrapper."""

    @torch._dynamo.disable(recursive=False)
    def eager(y: torch.Tensor) -> torch.Tensor:
        return y.exp()  # runs through the mode while Dynamo looks at every frame that is called

    found: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call_"))
        return graph.forward

    x = leaf(4)
    compiled = torch.compile(lambda x: eager(x.sin()).cos(), backend=backend)
    torch.compiler.reset()
    try:
        dc.checkpoint(compiled, x, context_fn=contexts([aten.exp.default])).sum().backward()
    finally:
        torch.compiler.reset()
    assert set(found) == {"sin", "cos"}  # torch 2.9 compiles the caller once more for the replay


def test_a_selective_region_does_not_load_the_compiler() -> None:
    code = """
import functools, sys, torch, distckpt as dc
x = torch.ones(3, 3, requires_grad=True)
policy = functools.partial(dc.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
dc.checkpoint(lambda x: (x @ x).sin().exp(), x, context_fn=policy).sum().backward()
assert "torch._dynamo" not in sys.modules
"""
    search = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = processes.run([sys.executable, "-c", code], limit=120, environment=search)
    assert done.returncode == 0, done.stderr
