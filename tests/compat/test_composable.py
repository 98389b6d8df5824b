"""composable_checkpoint: torch's composable API over our engine."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._composable import checkpoint as torchs
from torch.distributed._composable.contract import _get_registry

from distckpt.compat.wrapper import composable_checkpoint
from distckpt.engine.stats import counters
from distckpt.errors import AlreadyRegion
from distckpt.modules import apply


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return self.body(x).sin() * scale


def step(model: nn.Module, **kwargs: Any) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(3, 4, requires_grad=True)
    model.zero_grad()
    out = model(x, **kwargs)
    torch.manual_seed(2)
    out.sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_gradients_equal_plain_to_the_bit_and_it_is_our_engine() -> None:
    before = counters.regions, counters.replays
    model = Net()
    assert composable_checkpoint(model) is model
    assert same(step(model, scale=2.0), step(Net(), scale=2.0))
    assert (counters.regions - before[0], counters.replays - before[1]) == (1, 1)


def test_names_class_and_state_stay() -> None:
    model = composable_checkpoint(Net())
    assert type(model) is Net
    assert list(model.state_dict()) == list(Net().state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in Net().named_modules()]


def test_use_reentrant_is_not_implemented() -> None:
    with pytest.raises(
        NotImplementedError, match="use_reentrant=True is not supported in composable checkpoint"
    ):
        composable_checkpoint(Net(), use_reentrant=True)
    composable_checkpoint(Net(), use_reentrant=False)


def test_unknown_keywords_are_an_error() -> None:
    with pytest.raises(ValueError, match="Unexpected keyword arguments: foo,bar"):
        composable_checkpoint(Net(), foo=1, bar=2)


@pytest.mark.parametrize("first", [composable_checkpoint, torchs])
@pytest.mark.parametrize("second", [composable_checkpoint, torchs])
def test_twice_is_an_error_whoever_came_first(first: Any, second: Any) -> None:
    model = first(Net())
    with pytest.raises(AssertionError, match="checkpoint has already been applied"):
        second(model)


def test_dc_apply_sees_it_and_the_other_way_round() -> None:
    with pytest.raises(AlreadyRegion):
        apply(composable_checkpoint(Net()), "")
    model = Net()
    apply(model, "")
    with pytest.raises(AlreadyRegion):
        composable_checkpoint(model)


def test_the_module_is_in_torchs_registry_of_composable_apis() -> None:
    model = composable_checkpoint(Net())
    assert list(_get_registry(model) or ()) == ["checkpoint"]
    state = composable_checkpoint.state(model)
    assert state.enable_hook
    assert state._ac_generator is None
    assert composable_checkpoint.state(Net()) is None


def test_options_reach_the_engine() -> None:
    entered: list[str] = []

    def contexts() -> tuple[Any, Any]:
        entered.append("pair")
        return nullcontext(), nullcontext()

    step(composable_checkpoint(Net(), context_fn=contexts))
    assert entered == ["pair"]
    unseeded = composable_checkpoint(Net(), preserve_rng_state=False)
    assert not same(step(unseeded), step(Net()))
    with pytest.raises(ValueError, match="determinism_check"):
        composable_checkpoint(Net(), determinism_check="nonsense")


def test_an_error_in_the_forward_leaves_nothing_behind() -> None:
    class Fails(Net):
        def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
            if scale < 0:
                raise RuntimeError("foo")
            return super().forward(x, scale=scale)

    model = composable_checkpoint(Fails())
    with pytest.raises(RuntimeError, match="foo"):
        model(torch.ones(1, 4, requires_grad=True), scale=-1.0)
    assert same(step(model), step(Net()))


def test_copies_and_pickles_keep_it() -> None:
    model = composable_checkpoint(Net())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = counters.regions
        assert same(step(other), step(Net()))
        assert counters.regions == before + 1


def test_replicate_and_checkpoint_compose_on_one_rank(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed._composable import replicate

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = replicate(composable_checkpoint(Net()))
        assert sorted(_get_registry(model) or ()) == ["checkpoint", "replicate"]
        assert same(step(model), step(Net()))
    finally:
        dist.destroy_process_group()
