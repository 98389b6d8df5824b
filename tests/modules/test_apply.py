"""dc.apply: modules become regions in place, and nothing else about them changes."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from distckpt.engine import is_recomputing
from distckpt.engine.stats import counters
from distckpt.errors import AlreadyRegion, BadOption, ModuleGone, NeverCalled, NoMatch, Rebound
from distckpt.modules import apply, regions
from tests.modules.models import Block, Model, same, step


def fingerprint(model: nn.Module) -> Any:
    """What must not change: classes, names, state, and every entry of every module's ``__dict__``."""
    return (
        [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()],
        [name for name, _ in model.named_parameters()],
        list(model.state_dict()),
        repr(model),
    )


@pytest.mark.parametrize(
    "globs", ["layers.*", ["layers.0", "layers.2"], "", "**.attn", ("layers.*", "**.attn")]
)
def test_gradients_outputs_and_buffers_equal_plain_to_the_bit(globs: Any) -> None:
    plain, model = Model(), Model()
    apply(model, globs)
    for _ in range(2):
        assert same(step(plain), step(model))


def test_each_chosen_module_is_replayed_once_per_backward() -> None:
    model = Model(layers=3)
    runs: list[bool] = []
    for layer in model.layers:
        layer.attn.register_forward_pre_hook(lambda *_: runs.append(is_recomputing()))
    apply(model, "layers.*")
    regions_before, replays_before = counters.regions, counters.replays
    step(model)
    assert (counters.regions - regions_before, counters.replays - replays_before) == (3, 3)
    assert runs == [False, False, False, True, True, True]


def test_class_names_state_dict_and_repr_stay() -> None:
    model = Model()
    before = fingerprint(model)
    handle = apply(model, "layers.*")
    assert fingerprint(model)[1:] == before[1:]
    assert all(type(layer) is Block and isinstance(layer, Block) for layer in model.layers)
    assert handle.names == ("layers.0", "layers.1", "layers.2")
    Model().load_state_dict(model.state_dict())


def test_remove_restores_exactly() -> None:
    model = Model()
    before = fingerprint(model)
    handle = apply(model, "layers.*")
    handle.remove()
    assert fingerprint(model) == before
    regions_before = counters.regions
    assert same(step(model), step(Model()))
    assert counters.regions == regions_before
    handle.remove()
    apply(model, "layers.*").remove()


def test_the_handle_is_a_context_manager() -> None:
    model = Model()
    with apply(model, "layers.*") as handle:
        assert len(handle) == 3
    assert fingerprint(model) == fingerprint(Model())


def test_remove_puts_back_a_forward_that_was_on_the_instance() -> None:
    model, plain = Model(), Model()
    for one in (model, plain):
        layer = one.layers[1]
        layer.forward = partial(Block.forward, layer, scale=1.0)  # as accelerate does
        layer.forward.keywords.pop("scale")
    original = model.layers[1].forward
    handle = apply(model, "layers.*")
    assert same(step(model), step(plain))
    assert list(inspect.signature(model.layers[1].forward).parameters) == ["x", "scale", "name"]
    handle.remove()
    assert model.layers[1].forward is original


def test_a_forward_put_over_ours_survives_remove_without_a_region() -> None:
    model = Model()
    handle = apply(model, "layers.0")
    layer = model.layers[0]
    seen: list[int] = []
    ours = layer.forward
    layer.forward = lambda *args, **kwargs: (seen.append(1), ours(*args, **kwargs))[1]
    handle.remove()
    regions_before = counters.regions
    step(model)
    assert seen == [1]
    assert counters.regions == regions_before


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_carry_regions_of_their_own(clone: Callable[[Model], Model]) -> None:
    model = Model()
    handle = apply(model, "layers.*", determinism_check="bitwise")
    other = clone(model)
    handle.remove()
    del model
    gc.collect()
    regions_before = counters.regions
    assert same(step(other), step(Model()))
    assert counters.regions - regions_before == 3
    assert inspect.signature(other.layers[0].forward) == inspect.signature(Block().forward)
    mine = regions(other)
    assert mine.names == ("layers.0", "layers.1", "layers.2")
    mine.remove()
    assert fingerprint(other) == fingerprint(Model())


def test_a_region_in_a_copy_runs_the_copy() -> None:
    model = Model()
    apply(model, "layers.*")
    other = copy.deepcopy(model)
    step(other)
    assert all(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_torch_save_keeps_the_regions() -> None:
    model = Model()
    apply(model, "layers.*")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert same(step(torch.load(file, weights_only=False)), step(Model()))


def test_state_dict_still_loads_with_weights_only() -> None:
    model = Model()
    apply(model, "layers.*")
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert list(torch.load(file, weights_only=True)) == list(Model().state_dict())


def test_a_shallow_copy_whose_original_is_gone_is_an_error() -> None:
    block = Block()
    apply(block, "")
    other = copy.copy(block)
    del block
    with pytest.raises(ModuleGone, match=r"\[DC304\]"):
        other(torch.randn(4, 8))
    apply(other, "")
    regions_before = counters.regions
    other(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert counters.regions == regions_before + 1


def test_the_model_is_freed_without_the_garbage_collector() -> None:
    model = Model()
    handle = apply(model, "layers.*")
    ref = weakref.ref(model.layers[0])
    gc.disable()
    try:
        step(model)
        del model
        assert ref() is None
    finally:
        gc.enable()
    handle.remove()


def test_a_backward_may_outlive_the_model() -> None:
    x = torch.randn(4, 8, requires_grad=True)

    def loss() -> torch.Tensor:
        model = Model()
        apply(model, "layers.*")
        return model(x).sum()

    loss().backward()
    assert x.grad is not None


def test_the_modules_own_hooks_run_once_and_those_below_also_in_the_replay() -> None:
    model = Model(layers=1)
    apply(model, "layers.*")
    layer, seen = model.layers[0], []
    layer.register_forward_pre_hook(lambda *_: seen.append("own pre"))
    layer.register_forward_hook(lambda *_: seen.append("own post"))
    layer.attn.register_forward_pre_hook(lambda *_: seen.append("below" + " again" * is_recomputing()))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    step(model)
    assert seen == ["own pre", "below", "own post", "below again", "backward"]


def test_a_pre_hook_that_changes_the_input_is_applied_once() -> None:
    def halve(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0] * 0.5, *args[1:]

    plain, model = Model(), Model()
    for one in (plain, model):
        one.layers[0].register_forward_pre_hook(halve)
    apply(model, "layers.*")
    for one in (plain, model):
        one.layers[1].register_forward_pre_hook(halve)
    assert same(step(plain), step(model))


def test_calling_forward_directly_is_a_region_too() -> None:
    block = Block()
    apply(block, "")
    regions_before = counters.regions
    block.forward(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert counters.regions == regions_before + 1


def test_forward_keeps_its_signature_name_and_docs() -> None:
    block = Block()
    bound = block.forward
    apply(block, "")
    assert inspect.signature(block.forward) == inspect.signature(bound)
    assert (block.forward.__name__, block.forward.__qualname__) == ("forward", bound.__qualname__)
    assert inspect.ismethod(block.forward)


def test_no_match_changes_nothing_and_names_near_matches() -> None:
    model = Model()
    with pytest.raises(NoMatch, match=r"(?s)\[DC301\].*'layers.0'"):
        apply(model, ["layers.*", "layer.*"])
    assert fingerprint(model) == fingerprint(Model())


def test_wrapping_twice_is_an_error_and_changes_nothing() -> None:
    model = Model()
    apply(model, "layers.1")
    with pytest.raises(AlreadyRegion, match=r"\[DC302\].*'layers.1'"):
        apply(model, "layers.*")
    assert regions(model).names == ("layers.1",)


def test_a_module_under_torchs_wrapper_or_composable_api_is_not_wrapped_again() -> None:
    from torch.distributed._composable import checkpoint
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Model()
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    checkpoint(model.layers[1])
    for glob in ("layers.0", "layers.0._checkpoint_wrapped_module", "layers.1"):
        with pytest.raises(AlreadyRegion, match=r"\[DC302\]"):
            apply(model, glob)


def test_a_container_without_forward_is_passed_over_or_an_error() -> None:
    model = Model()
    with pytest.raises(NeverCalled, match=r"\[DC303\].*layers \(ModuleList\)"):
        apply(model, "layers")
    assert "layers" not in apply(model, "**").names


def test_a_shared_module_is_one_region_under_either_name() -> None:
    model = Model()
    model.layers[2] = model.layers[0]
    assert apply(model, "layers.2").names == ("layers.2",)
    with pytest.raises(AlreadyRegion):
        apply(model, "layers.0")
    regions_before = counters.regions
    step(model)
    assert counters.regions - regions_before == 2


def test_options_reach_the_region_and_are_checked_at_once() -> None:
    model = Model()
    with pytest.raises(BadOption, match="DC109"):
        apply(model, "layers.*", determinism_check="exact")
    with pytest.raises(BadOption, match="has no option policy"):
        apply(model, "layers.*", policy="all")  # type: ignore[call-arg]

    class Drifting(nn.Module):
        factor = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.factor += 1.0
            return (x * self.factor).sin()

    drifting = Drifting()
    apply(drifting, "", determinism_check="bitwise")
    with pytest.raises(RuntimeError, match="DC103"):
        drifting(torch.ones(3, requires_grad=True)).sum().backward()


def test_errors_name_the_module_by_its_dotted_name() -> None:
    class Drifting(nn.Module):
        width = 3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.width -= 1
            return x[: self.width].sin()

    model = nn.Sequential(nn.Identity(), Drifting())
    apply(model, "1")
    with pytest.raises(RuntimeError, match="region 1 "):
        model(torch.ones(3, requires_grad=True)).sum().backward()


def test_under_no_grad_it_is_a_plain_call() -> None:
    model = Model()
    apply(model, "layers.*")
    regions_before = counters.regions
    with torch.no_grad():
        model(torch.randn(4, 8))
    assert counters.regions == regions_before


def test_a_forward_that_was_cut_off_its_region_says_so() -> None:
    model = Model()
    apply(model, "")
    model.forward = MethodType(model.forward.__func__, model)  # type: ignore[attr-defined]
    with pytest.raises(Rebound, match="layers and not of the model itself") as caught:
        step(model)
    assert caught.value.code == "DC604"
