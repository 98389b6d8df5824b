"""coord.fully_shard in a world of one: what it does, what it says, and what it refuses with the model untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
)
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import Shard

import distckpt as dc
from distckpt._torch_dist import UNITS_IN_REPLAYS, fsdp_state, fully_shard_options, parameter_groups
from distckpt.errors import (
    AlreadyRegion,
    AlreadySharded,
    BadOption,
    CannotShard,
    GatherOutsideBackward,
    NoMatch,
    SharedAcrossUnits,
    UnitsInsideRegion,
    UnknownOption,
    UnknownUnit,
)
from distckpt.modules import apply, regions
from distckpt.ranks import Coordinator, fsdp
from distckpt.ranks.fsdp import UnitGuard, guard_units
from tests.ranks.sharded import FLAT, NESTED, Model, by_hand, local, unfinished

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.usefixtures("alone"),
]
needs_units_in_replays = pytest.mark.skipif(not UNITS_IN_REPLAYS, reason="refused on this torch")


def picture(model: nn.Module) -> list[Any]:
    """Everything that sharding or a region would change."""
    return [
        (
            name,
            type(m),
            "forward" in m.__dict__,
            len(m._forward_pre_hooks),
            len(m._forward_hooks),
            fsdp_state(m),
        )
        for name, m in model.named_modules()
    ] + [(name, id(p)) for name, p in model.named_parameters()]


def units_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]


def test_each_named_module_is_a_unit_and_a_region_and_the_root_comes_last(coord: Coordinator) -> None:
    model = Model(2)
    handle = coord.fully_shard(model, units="stack.layers.*")
    assert handle.units == ("stack.layers.0", "stack.layers.1", "")
    assert handle.regions == regions(model).names == ("stack.layers.0", "stack.layers.1")
    assert handle.nested == {}
    assert units_of(model) == ["", "stack.layers.0", "stack.layers.1"]
    assert repr(handle) == (
        "Sharded(units: stack.layers.0, stack.layers.1, the root; regions: stack.layers.0, stack.layers.1)"
    )


def test_removing_takes_the_regions_off_and_leaves_the_units(coord: Coordinator) -> None:
    model = Model(2)
    with coord.fully_shard(model, "stack.layers.*") as handle:
        assert len(regions(model)) == 2
    handle.remove()
    assert len(regions(model)) == 0
    assert handle.regions == ()
    assert units_of(model) == ["", "stack.layers.0", "stack.layers.1"]
    assert repr(handle).endswith("regions: none)")


def test_regions_none_makes_none(coord: Coordinator) -> None:
    model = Model(2)
    assert coord.fully_shard(model, "stack.layers.*", regions=None).regions == ()
    assert len(regions(model)) == 0


def test_regions_are_chosen_apart_from_units(coord: Coordinator) -> None:
    model = Model(2)
    handle = coord.fully_shard(model, "stack.layers.*", regions=["stack.layers.*.attn", "head"])
    assert handle.regions == ("stack.layers.0.attn", "stack.layers.1.attn", "head")


def test_units_are_made_from_the_inside_out_whatever_the_order_of_the_globs(coord: Coordinator) -> None:
    model = Model(2)
    handle = coord.fully_shard(model, ["stack.layers.*", "stack.layers.*.attn"], regions=None)
    assert handle.units == (
        "stack.layers.0.attn",
        "stack.layers.0",
        "stack.layers.1.attn",
        "stack.layers.1",
        "",
    )
    for name in ("0.attn", "1.attn"):
        (group,) = parameter_groups(fsdp_state(model.stack.layers.get_submodule(name)))
        assert len(group.fsdp_params) == 2


def test_a_tuple_makes_one_unit_of_several_modules(coord: Coordinator) -> None:
    model = Model(2)
    handle = coord.fully_shard(model, ["stack.layers.*", ("norm", "head")], regions=None)
    assert handle.units[-2] == "norm+head"
    assert fsdp_state(model.norm) is fsdp_state(model.head)


def test_naming_the_model_itself_as_a_unit_says_nothing_new(coord: Coordinator) -> None:
    handle = coord.fully_shard(Model(2), ["", "stack.layers.*"])
    assert handle.units == ("stack.layers.0", "stack.layers.1", "")
    assert "" not in handle.regions


@needs_units_in_replays
def test_a_region_with_units_inside_it_is_reported(coord: Coordinator) -> None:
    model = Model(2)
    apply(model, "stack.layers.1")  # put on before, and counted too
    handle = coord.fully_shard(model, NESTED, regions="stack")
    assert handle.nested["stack.layers.1"] == ("stack.layers.1.attn", "stack.layers.1.mlp")
    assert len(handle.nested["stack"]) == 6
    assert "stack has 6 units inside" in repr(handle)


def test_a_region_around_units_is_refused_where_torch_would_gather_them_twice(
    coord: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fsdp, "UNITS_IN_REPLAYS", False)
    model = Model(2)
    before = picture(model)
    with pytest.raises(UnitsInsideRegion, match=r"'stack' has FSDP2 units inside it: stack\.layers\.0"):
        coord.fully_shard(model, "stack.layers.*", regions="stack")
    assert picture(model) == before
    coord.fully_shard(model, "stack.layers.*")


def test_every_option_of_torchs_reaches_every_unit(coord: Coordinator) -> None:
    mesh = init_device_mesh("cpu", (1,))
    model = Model(2)
    ignored = {model.embed.weight}
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    handle = coord.fully_shard(
        model,
        "stack.layers.*",
        mesh=mesh,
        mp_policy=precision,
        ignored_params=ignored,
        reshard_after_forward=True,
        shard_placement_fn=lambda p: Shard(0),
        determinism_check="fingerprint",
        overrides={
            "stack.layers.1": {"reshard_after_forward": False},
            "": {"mp_policy": MixedPrecisionPolicy()},
        },
    )
    assert set(handle.options["stack.layers.0"]) <= set(fully_shard_options())
    assert handle.options["stack.layers.0"]["reshard_after_forward"] is True
    assert handle.options["stack.layers.1"]["reshard_after_forward"] is False
    assert handle.options[""]["mp_policy"] == MixedPrecisionPolicy()
    assert fsdp_state(model.stack.layers[0])._mp_policy == precision
    assert type(model.embed.weight) is nn.Parameter
    (group,) = parameter_groups(fsdp_state(model.stack.layers[0]))
    assert group.mesh_info.mesh is mesh
    (region,) = {r.options.determinism_check for r in (m.forward.__self__ for m in model.stack.layers)}
    assert region == "fingerprint"


@pytest.mark.skipif(
    "param_dtype_override_fn" not in MixedPrecisionPolicy.__dataclass_fields__, reason="torch before 2.15"
)
def test_functions_that_look_parameters_up_are_given_the_models_own(coord: Coordinator) -> None:
    model = Model(2)
    names = {
        parameter: name for name, parameter in model.named_parameters()
    }  # a KeyError for any other tensor

    def precision(parameter: nn.Parameter) -> torch.dtype | None:
        return torch.float32 if "norm" in names[parameter] else None

    options: Any = {"param_dtype": torch.bfloat16, "param_dtype_override_fn": precision}
    policy = MixedPrecisionPolicy(**options)
    model = gathered(coord, model, mp_policy=policy, shard_placement_fn=lambda p: names[p] and None)
    block = model.stack.layers[1]
    assert (block.mlp.weight.dtype, block.norm.weight.dtype) == (torch.bfloat16, torch.float32)


def gathered(coord: Coordinator, model: nn.Module, **options: Any) -> Any:
    """``model``, sharded, with the parameters as a forward finds them."""
    coord.fully_shard(model, "stack.layers.*", **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    return model


def test_without_a_mesh_the_world_is_one_dimension_of_the_coordinators_type(coord: Coordinator) -> None:
    handle = coord.fully_shard(Model(1), "stack.layers.*")
    (mesh,) = {options["mesh"] for options in handle.options.values()}
    assert (mesh.device_type, mesh.shape) == ("cpu", (1,))


def test_units_sharded_before_inside_a_unit_stay(coord: Coordinator) -> None:
    model = Model(2)
    torch_fully_shard(model.stack.layers[0].mlp)
    coord.fully_shard(model, "stack.layers.*", regions="stack.layers.*.attn")
    assert "stack.layers.0.mlp" in units_of(model)


def test_the_state_dict_has_the_same_keys(coord: Coordinator) -> None:
    keys = list(Model(2).state_dict())
    model = Model(2)
    coord.fully_shard(model, "stack.layers.*")
    assert list(model.state_dict()) == keys


REFUSED = {
    "an unknown unit glob": (UnknownUnit, {"units": "stack.layer.*"}, "'stack.layers'"),
    "an unknown glob among others": (UnknownUnit, {"units": ["stack.layers.*", "tail"]}, "'tail'"),
    "an unknown glob in a tuple": (UnknownUnit, {"units": [("norm", "tail")]}, "'tail'"),
    "only a container": (UnknownUnit, {"units": "stack.layers"}, r"stack.layers.\*"),
    "an override of no unit": (UnknownUnit, {"overrides": {"norm": {}}}, "'norm' names no unit"),
    "an unknown region glob": (NoMatch, {"regions": "tail"}, "'tail'"),
    "an unknown option": (UnknownOption, {"reshard": True}, "reshard_after_forward.*determinism_check"),
    "an unknown option in an override": (
        UnknownOption,
        {"overrides": {"stack.layers.0": {"early_stop": False}}},
        r"where: overrides\['stack.layers.0'\]",
    ),
    "a policy": (BadOption, {"policy": "matmuls"}, "policy="),
    "a plan": (BadOption, {"plan": "plan.json"}, "plan="),
    "a bad region option": (BadOption, {"determinism_check": "no such level"}, "no such level"),
    "a bad number to reshard to": (CannotShard, {"reshard_after_forward": 3}, "factor of 1"),
    "a mesh of three dimensions": (CannotShard, {"mesh": "three"}, "1D or 2D"),
    "a module in two units": (
        CannotShard,
        {"units": ["norm", ("norm", "head")]},
        "in the unit 'norm' as well",
    ),
    "units that overlap": (
        CannotShard,
        {"units": [("stack.layers.0.mlp", "stack.layers.1"), ("stack.layers.0", "stack.layers.1.mlp")]},
        "lies partly inside",
    ),
    "a placement that does not divide": (CannotShard, {"shard_placement_fn": lambda p: Shard(7)}, "Shard"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_the_model_untouched(coord: Coordinator, name: str) -> None:
    error, given, text = REFUSED[name]
    if given.get("mesh") == "three":
        given = {"mesh": init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("a", "b", "c"))}
    model = Model(2)
    before = picture(model)
    with pytest.raises(error, match=text):
        coord.fully_shard(model, **{"units": "stack.layers.*", **given})
    assert picture(model) == before
    coord.fully_shard(model, "stack.layers.*")  # and nothing stands in the way of doing it right


def test_a_scalar_parameter_is_refused_by_name_before_anything_is_sharded(coord: Coordinator) -> None:
    model = Model(2)
    model.stack.layers[1].scale = nn.Parameter(torch.tensor(1.0))
    before = picture(model)
    with pytest.raises(CannotShard, match=r"'stack.layers.1'[\s\S]*stack.layers.1.scale"):
        coord.fully_shard(model, "stack.layers.*")
    assert picture(model) == before


def test_a_parameter_of_two_units_is_refused_and_a_tuple_is_the_way_out(coord: Coordinator) -> None:
    model = Model(2)
    model.head.weight = model.embed.weight
    before = picture(model)
    with pytest.raises(SharedAcrossUnits, match=r"'embed.weight'[\s\S]*'head.weight'"):
        coord.fully_shard(model, ["stack.layers.*", "head"])
    assert picture(model) == before
    handle = coord.fully_shard(model, ["stack.layers.*", ("embed", "head")], regions=None)
    assert "embed+head" in handle.units
    assert model.head.weight is model.embed.weight


def test_a_module_of_two_units_is_refused(coord: Coordinator) -> None:
    model = Model(2)
    model.stack.layers[1].attn = model.stack.layers[0].attn
    with pytest.raises(SharedAcrossUnits, match="attn"):
        coord.fully_shard(model, "stack.layers.*")


def test_a_unit_that_is_sharded_already_is_refused(coord: Coordinator) -> None:
    model = Model(2)
    torch_fully_shard(model.stack.layers[1])
    before = picture(model)
    with pytest.raises(AlreadySharded, match=r"'stack.layers.1' is distributed already, by fully_shard"):
        coord.fully_shard(model, "stack.layers.*")
    assert picture(model) == before


def test_sharding_twice_is_refused(coord: Coordinator) -> None:
    model = Model(2)
    coord.fully_shard(model, "stack.layers.*")
    before = picture(model)
    with pytest.raises(AlreadySharded, match="the model is distributed already"):
        coord.fully_shard(model, "stack.layers.*.attn", regions=None)
    assert picture(model) == before


def test_a_unit_inside_something_distributed_is_refused(coord: Coordinator) -> None:
    model = Model(2)
    model.stack = FullyShardedDataParallel(
        model.stack, device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.NO_SHARD
    )
    with pytest.raises(AlreadySharded, match=r"'stack' .* by FullyShardedDataParallel[\s\S]*around the unit"):
        coord.fully_shard(model, "stack.**.layers.*")
    ddp = nn.parallel.DistributedDataParallel(Model(1))
    with pytest.raises(AlreadySharded, match=r"the model .* by DistributedDataParallel"):
        coord.fully_shard(ddp, "module.stack.layers.*")


def test_a_region_where_one_is_already_is_refused_with_nothing_sharded(coord: Coordinator) -> None:
    model = Model(2)
    apply(model, "stack.layers.1")
    before = picture(model)
    with pytest.raises(AlreadyRegion):
        coord.fully_shard(model, "stack.layers.*")
    assert picture(model) == before
    coord.fully_shard(model, "stack.layers.*", regions=None)
    assert regions(model).names == ("stack.layers.1",)


def test_without_a_process_group_it_says_how_to_get_one(
    coord: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(CannotShard, match="init_process_group"):
        coord.fully_shard(Model(1), "stack.layers.*")


def test_a_failure_that_no_rehearsal_saw_says_what_is_left(
    coord: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distckpt.ranks import fsdp_units

    model = Model(2)
    model.stack.layers[1].scale = nn.Parameter(torch.tensor(1.0))
    monkeypatch.setattr(fsdp_units, "rehearse", lambda units: None)
    with pytest.raises(CannotShard, match=r"build the model again[\s\S]*the unit 'stack.layers.0'"):
        coord.fully_shard(model, "stack.layers.*")
    assert len(regions(model)) == 0


@needs_units_in_replays
def test_a_unit_that_a_replay_outside_backward_calls_is_an_error(coord: Coordinator) -> None:
    model = Model(2)
    coord.fully_shard(model, "stack.layers.*", regions="stack")
    with dc.session() as session:
        loss = model(torch.randn(2, 8)).sum()
        with pytest.raises(GatherOutsideBackward, match=r"'stack.layers.0'"):
            session.replay()
        session.release()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


class FrozenFirst(nn.Module):
    """Two units in one region; the first is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.a.requires_grad_(False)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).sin())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dc.checkpoint(self.run, x)


@needs_units_in_replays
def test_a_unit_that_is_replayed_after_its_own_backward_is_sharded_again_at_the_end(
    coord: Coordinator,
) -> None:
    model = FrozenFirst()
    coord.fully_shard(model, ["a", "b"], regions=None)
    # The second forward's backward runs first and ends that of `a`. The first one's input needs no gradient, so
    # its replay gathers `a`, and no backward of `a` comes after that.
    loss = model(torch.randn(2, 8)).sum() + model(torch.randn(2, 8, requires_grad=True)).sum()
    loss.backward()
    assert unfinished(model) == []


@needs_units_in_replays
def test_a_unit_whose_backward_never_comes_does_not_take_the_next_forward_for_a_replay(
    coord: Coordinator,
) -> None:
    model = FrozenFirst()
    torch_fully_shard(model.a)  # a root of its own: nobody else's backward would end its state
    guard_units(model)
    for _ in range(2):
        model(torch.randn(2, 8)).sum().backward()
        assert unfinished(model) == []


@needs_units_in_replays
@pytest.mark.parametrize("regions", ["stack.layers.*", "stack"])
def test_after_a_replay_that_raised_fsdps_reset_makes_the_next_step_right(
    coord: Coordinator, regions: str
) -> None:
    gradients = []
    for fails in (False, True):
        model = Model(2)
        coord.fully_shard(model, "stack.layers.*", regions=regions)
        if fails:

            def raise_in_a_replay(module: nn.Module, args: Any) -> None:
                if dc.is_recomputing():
                    raise KeyError("once")

            hook = model.stack.layers[0].mlp.register_forward_pre_hook(raise_in_a_replay)
            with pytest.raises(KeyError):
                model(torch.randn(4, 8)).sum().backward()
            hook.remove()
            model.zero_grad()  # those of gathered parameters: the reset forgets them but does not clear them
            model.reset_iter_state()
            model.zero_grad()
        torch.manual_seed(3)
        model(torch.randn(4, 8)).square().mean().backward()
        assert unfinished(model) == []
        gradients.append([local(p.grad) for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("regions", ["stack.layers.*", "stack"])
def test_compiled_units_stay_whole_graphs(coord: Coordinator, regions: str) -> None:
    if regions == "stack" and not UNITS_IN_REPLAYS:
        pytest.skip("refused on this torch")
    gradients = []
    for compiled in (False, True):
        model = Model(2)
        coord.fully_shard(model, "stack.layers.*", regions=regions)
        model.eval()  # dropout in a compiled graph draws other numbers
        for layer in model.stack.layers if compiled else ():
            layer.compile(backend="aot_eager", fullgraph=True)
        torch.manual_seed(3)
        model(torch.randn(4, 8)).square().mean().backward()
        gradients.append([local(p.grad) for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@needs_units_in_replays
def test_units_sharded_by_hand_are_guarded_once() -> None:
    model = Model(2)
    by_hand(model, FLAT)
    handles = guard_units(model)
    assert len(handles) == 3
    assert guard_units(model) == ()
    for module in (model, *model.stack.layers):
        assert isinstance(next(iter(module._forward_pre_hooks.values())), UnitGuard)  # ahead of FSDP2's
    for handle in handles:
        handle.remove()
    assert len(guard_units(model)) == 3
