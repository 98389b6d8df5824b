"""compat.install(): torch's names are ours, in code that nobody touched, until it is taken back."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as torchs
from distckpt_backends.errors import DistckptError
from torch import nn

import distckpt.compat.checkpoint  # noqa: F401
from distckpt import compat
from distckpt.compat.install import install
from distckpt.engine.stats import counters

_numbers = itertools.count()


@pytest.fixture
def third_party(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], types.ModuleType]]:
    """Imports a module with the given source, as a library that knows nothing of us."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def make(source: str) -> types.ModuleType:
        name = f"third_party_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        made.append(name)
        return importlib.import_module(name)

    yield make
    for name in made:
        sys.modules.pop(name, None)


def snapshot() -> dict[tuple[str, str], Any]:
    """Every global of every module that is one of torch's or our names."""
    names = {*torchs.__all__, "_checkpoint_without_reentrant_generator"}
    wanted = {
        id(getattr(module, name)) for module in (torchs, compat) for name in names if hasattr(module, name)
    }
    return {
        (name, key): value
        for name, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType)
        for key, value in list(vars(module).items())
        if id(value) in wanted
    }


def regions_of(call: Callable[[], torch.Tensor]) -> int:
    before = counters.regions
    call().sum().backward()
    return counters.regions - before


def test_every_public_name_resolves_to_ours_and_back() -> None:
    before = {name: getattr(torchs, name) for name in torchs.__all__}
    with install():
        theirs = {name for name in torchs.__all__ if getattr(torchs, name) is not getattr(compat, name)}
        # Before torch 2.13 the enum lacks members, and torch's compilers know their own only.
        assert theirs <= {"CheckpointPolicy"}
        assert not theirs or not hasattr(torchs.CheckpointPolicy, "MUST_CPU_OFFLOAD")
        assert torchs.checkpoint is compat.checkpoint
    assert {name: getattr(torchs, name) for name in torchs.__all__} == before


def test_undo_restores_every_name_of_every_module() -> None:
    before = snapshot()
    handle = install()
    assert snapshot() != before
    handle.remove()
    assert snapshot() == before


def test_code_that_bound_a_name_before_uses_our_engine(
    third_party: Callable[[str], types.ModuleType],
) -> None:
    library = third_party(
        "from torch.utils.checkpoint import checkpoint as ck\n"
        "import torch.utils.checkpoint as module\n"
        "def early(f, x): return ck(f, x, use_reentrant=False)\n"
        "def attribute(f, x): return module.checkpoint(f, x, use_reentrant=False)\n"
    )
    x = torch.randn(3, requires_grad=True)
    for name in ("early", "attribute"):
        call = getattr(library, name)
        assert regions_of(lambda call=call: call(torch.sin, x)) == 0
        with install():
            assert regions_of(lambda call=call: call(torch.sin, x)) == 1
        assert regions_of(lambda call=call: call(torch.sin, x)) == 0


def test_a_module_imported_meanwhile_goes_back_to_torch_too(
    third_party: Callable[[str], types.ModuleType],
) -> None:
    with install():
        library = third_party("from torch.utils.checkpoint import checkpoint, CheckpointError")
        assert library.checkpoint is compat.checkpoint
    assert library.checkpoint is torchs.checkpoint
    assert library.CheckpointError is torchs.CheckpointError


def test_code_that_asked_for_ours_keeps_it(third_party: Callable[[str], types.ModuleType]) -> None:
    before = third_party("from distckpt.compat import checkpoint")
    with install():
        meanwhile = third_party("from distckpt.compat import checkpoint")
    assert before.checkpoint is meanwhile.checkpoint is compat.checkpoint


def test_torchs_wrappers_and_composable_api_use_our_engine() -> None:
    from torch.distributed import _composable
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    x = torch.randn(2, 4, requires_grad=True)
    with install():
        wrapped = checkpoint_wrapper(nn.Linear(4, 4))
        composed = _composable.checkpoint(nn.Linear(4, 4))
        assert regions_of(lambda: wrapped(x)) == 1
        assert regions_of(lambda: composed(x)) == 1


def test_an_existing_composable_module_changes_engine_without_being_touched() -> None:
    from torch.distributed._composable import checkpoint

    module = checkpoint(nn.Linear(4, 4))
    x = torch.randn(2, 4, requires_grad=True)
    with install():
        assert regions_of(lambda: module(x)) == 1
    assert regions_of(lambda: module(x)) == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_partial_made_before_reaches_our_engine(reentrant: bool) -> None:
    held = functools.partial(torchs.checkpoint, use_reentrant=reentrant)
    x = torch.randn(3, requires_grad=True)
    with install():
        out = held(torch.sin, x)
        assert "torch.utils.checkpoint" not in type(out.grad_fn).__module__
        assert reentrant or regions_of(lambda: held(torch.sin, x)) == 1
        out.sum().backward()


def test_a_wrapper_applied_before_reaches_our_engine() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wrapped = checkpoint_wrapper(nn.Linear(4, 4))
    x = torch.randn(2, 4, requires_grad=True)
    assert regions_of(lambda: wrapped(x)) == 0
    with install():
        assert regions_of(lambda: wrapped(x)) == 1
    assert regions_of(lambda: wrapped(x)) == 0


def test_a_function_decorated_before_reaches_our_engine() -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15):
        pytest.skip("torch's decorator form came with 2.15")
    held = torchs.checkpoint(use_reentrant=False)(torch.sin)
    x = torch.randn(3, requires_grad=True)
    with install():
        assert regions_of(lambda: held(x)) == 1
    assert regions_of(lambda: held(x)) == 0


def test_an_installation_that_torchs_engine_survives_raises_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, regions = snapshot(), counters.regions
    # As with a torch whose `checkpoint` opens its regions by a function that we do not know.
    monkeypatch.setattr(importlib.import_module("distckpt.compat.install"), "_PRIVATE", ())
    with pytest.raises(DistckptError, match=r"DC209.*checkpoint\(use_reentrant=False\)") as caught:
        install()
    assert "use_reentrant=True" not in str(caught.value)
    assert snapshot() == before
    assert counters.regions == regions
    monkeypatch.undo()
    with install():
        assert torchs.checkpoint is compat.checkpoint
    assert snapshot() == before


def test_an_inner_installation_that_fails_leaves_the_outer_one_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    late = types.ModuleType("late_module")
    late.checkpoint = original = torchs.checkpoint  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "late_module", late)

    def broken(fn: Any, *args: Any, **options: Any) -> Any:
        raise TypeError("another signature")

    with install() as outer:
        late.checkpoint = original  # type: ignore[attr-defined]
        before, names = snapshot(), outer.replaced()
        with monkeypatch.context() as patch:
            patch.setattr(importlib.import_module("distckpt.compat.install"), "original_checkpoint", broken)
            with pytest.raises(DistckptError, match="DC209") as caught:
                install()
        assert isinstance(caught.value.__cause__, TypeError)
        assert snapshot() == before
        assert outer.replaced() == names
    assert torchs.checkpoint is original


def test_the_proof_of_an_installation_runs_under_none_of_the_callers_modes_and_counts_nothing() -> None:
    state, regions = torch.get_rng_state(), counters.regions
    with torch.inference_mode(), torch.device("meta"), compat.set_checkpoint_debug_enabled(True):
        install().remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert counters.regions == regions


def test_installations_nest_and_each_handle_counts_once() -> None:
    original = torchs.checkpoint
    outer, inner = install(), install()
    inner.remove()
    inner.remove()
    assert torchs.checkpoint is compat.checkpoint
    outer.remove()
    assert torchs.checkpoint is original
    assert "removed" in repr(outer)


def test_a_second_installation_reaches_modules_that_came_meanwhile() -> None:
    late = types.ModuleType("late_module")
    late.checkpoint = torchs.checkpoint  # type: ignore[attr-defined]
    with install():
        sys.modules["late_module"] = late
        try:
            with install():
                assert late.checkpoint is compat.checkpoint  # type: ignore[attr-defined]
        finally:
            del sys.modules["late_module"]
    assert late.checkpoint is torchs.checkpoint  # type: ignore[attr-defined]


def test_a_name_rebound_by_others_meanwhile_is_left_to_them(
    third_party: Callable[[str], types.ModuleType],
) -> None:
    library = third_party("from torch.utils.checkpoint import checkpoint")
    with install():
        library.checkpoint = "theirs"
    assert library.checkpoint == "theirs"


def test_a_region_recorded_before_or_after_is_replayed_by_its_own_engine() -> None:
    x = torch.randn(3, requires_grad=True)
    early = torchs.checkpoint(torch.sin, x, use_reentrant=False)
    with install():
        early.sum().backward()
        late = torchs.checkpoint(torch.sin, x, use_reentrant=False)
    late.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * x.detach().cos())


def test_our_errors_are_caught_by_a_handler_bound_to_torchs_class() -> None:
    theirs = torchs.CheckpointError
    runs: list[int] = []

    def shrinks(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return x[len(runs) :].sin()

    with install(), pytest.raises(theirs):
        torchs.checkpoint(shrinks, torch.ones(4, requires_grad=True), use_reentrant=False).sum().backward()


def test_the_compile_stacks_own_globals_are_left_alone() -> None:
    from torch._functorch import partitioners

    before = dict(vars(partitioners))
    with install():
        assert all(vars(partitioners)[name] is value for name, value in before.items())
