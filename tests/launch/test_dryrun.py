"""The dry run: every rank kind of a large job, built on one machine, with the numbers that a real one has."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

pytest.importorskip("tyro", reason="launch/ needs the cli extra: pip install -e '.[cli]'")

from launch import drykinds, dryrun
from launch.drykinds import PARALLEL, Kind, Layout, Stage, blocks, kinds, order, owned_bytes
from launch.measure import LiveBytes
from launch.model import GPT

SMALL = Layout(
    parallel="fsdp",
    ranks=512,
    stages=1,
    micro_batches=1,
    layers=2,
    width=32,
    heads=4,
    context=16,
    batch=2,
    dropout=0.1,
)
PIPED = replace(SMALL, parallel="pp+fsdp", ranks=12, stages=3, micro_batches=4, layers=4)


@pytest.fixture(scope="module")
def found() -> dict[str, list[Kind]]:
    """Kinds by how the job is parallel."""
    layouts = {
        "fsdp": replace(SMALL, ranks=48),
        "ddp": replace(SMALL, parallel="ddp"),
        "tp": replace(SMALL, parallel="tp", ranks=4),
        "pp": replace(SMALL, parallel="pp", ranks=3, stages=3, micro_batches=4, layers=4),
        "pp+fsdp": PIPED,
    }
    assert set(layouts) == set(PARALLEL)
    return {name: kinds(layout) for name, layout in layouts.items()}


def whole(layers: int = 2) -> int:
    """Bytes of the unsharded model's parameters."""
    model = GPT(layers=layers, width=32, heads=4, context=16, dropout=0.1)
    return sum(p.numel() * 4 for p in model.parameters())


def test_every_rank_is_of_exactly_one_kind(found: dict[str, list[Kind]]) -> None:
    sizes = {"fsdp": 48, "ddp": 512, "tp": 4, "pp": 3, "pp+fsdp": 12}
    for name, size in sizes.items():
        assert sorted(rank for kind in found[name] for rank in kind.ranks) == list(range(size)), name


def test_parameters_of_all_ranks_add_up_to_the_model(found: dict[str, list[Kind]]) -> None:
    def total(name: str) -> int:
        return sum(kind.parameters * len(kind.ranks) for kind in found[name])

    assert total("fsdp") == whole()
    assert total("pp") == total("pp+fsdp") == whole(4)
    assert total("ddp") == 512 * whole()
    # tensor parallelism cuts the four linear layers of a block, but for the biases of those that come back together
    cut = 2 * (3 * 32 * 33 + 32 * 32 + 4 * 32 * 33 + 4 * 32 * 32) * 4
    assert total("tp") == cut + 4 * (whole() - cut)


def test_units_and_regions_are_built(found: dict[str, list[Kind]]) -> None:
    def built(name: str) -> list[tuple[int, int, int]]:
        return [(kind.stage, kind.units, kind.regions) for kind in found[name]]

    assert set(built("fsdp")) == {(0, 3, 2)}
    assert built("ddp") == built("tp") == [(0, 0, 2)]
    assert built("pp") == [(0, 0, 2), (1, 0, 1), (2, 0, 1)]
    assert sorted(set(built("pp+fsdp"))) == [(0, 3, 2), (1, 2, 1), (2, 2, 1)]


def test_a_region_saves_its_input_and_nothing_else(found: dict[str, list[Kind]]) -> None:
    one = 2 * 16 * 32 * 4  # batch x context x width floats
    for name in ("pp", "pp+fsdp"):
        for kind in found[name]:
            if kind.stage < 2:  # the last stage saves its loss too
                assert kind.saved == kind.regions * one
                assert kind.unsaved > 10 * kind.saved


def test_sharding_parameters_changes_nothing_of_what_is_saved(found: dict[str, list[Kind]]) -> None:
    def saved(name: str) -> set[tuple[int, int, int]]:
        return {(kind.stage, kind.saved, kind.unsaved) for kind in found[name]}

    assert saved("fsdp") == saved("ddp")
    assert saved("pp+fsdp") == saved("pp")


def test_what_is_saved_equals_a_real_run_without_fakes(found: dict[str, list[Kind]]) -> None:
    import distckpt as dc

    model = GPT(layers=2, width=32, heads=4, context=16, dropout=0.1)
    x = torch.zeros(2, 16, dtype=torch.long)

    def saved() -> int:
        kept = []
        for grad in (False, True):
            with LiveBytes(list(model.parameters()), x) as live, torch.set_grad_enabled(grad):
                out = model(x, x)
                kept.append(live.now())
            del out
        return kept[1] - kept[0]

    unsaved = saved()
    dc.apply(model, "blocks.*")
    (kind,) = found["ddp"]
    # the CPU's attention kernel keeps a few bytes of random state that its fake does not
    assert abs(kind.unsaved - unsaved) <= 64 * 2
    assert kind.saved == saved()


def test_what_an_fsdp_rank_owns_is_what_torch_gives_it() -> None:
    layout = replace(SMALL, ranks=48)
    for rank in (0, 15, 31, 47):
        with drykinds._as_rank(rank, 48):
            mesh = layout.mesh()
            with drykinds.fake_tensors():
                part, _ = drykinds._build(layout, 0, mesh)
                for parameter in part.parameters():
                    assert isinstance(parameter, DTensor)
                    assert parameter.to_local().numel() * 4 == owned_bytes(parameter.shape, 48, rank)


def test_stages_share_the_blocks_and_keep_fewer_micro_batches_towards_the_end(
    found: dict[str, list[Kind]],
) -> None:
    assert [blocks(PIPED, stage) for stage in range(3)] == [2, 1, 1]
    assert [kind.in_flight for kind in found["pp"]] == [3, 2, 1]
    with torch.device("meta"):
        names = [{n.split(".")[0] for n, _ in Stage(PIPED, s).named_parameters()} for s in range(3)]
    assert names == [{"bytes", "places", "blocks"}, {"blocks"}, {"blocks", "norm", "head"}]


def test_the_order_of_a_stage_is_1f1b() -> None:
    text = ["".join(f"{what[0]}{i} " for what, i in order(PIPED, stage)).strip() for stage in range(3)]
    assert text == ["f0 f1 f2 b0 f3 b1 b2 b3", "f0 f1 b0 f2 b1 f3 b2 b3", "f0 b0 f1 b1 f2 b2 f3 b3"]


def test_alike_ranks_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    measure = drykinds._measure
    monkeypatch.setattr(
        drykinds, "_measure", lambda layout, stage: built.append(stage) or measure(layout, stage)
    )
    many = kinds(replace(SMALL, parallel="pp", ranks=512, stages=512, micro_batches=2, layers=512))
    assert built == [0, 1, 510 + 1]
    assert [len(kind.ranks) for kind in many] == [1, 510, 1]


def test_the_table_is_at_most_88_columns_and_names_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "2", "--width", "32", "--context", "16", "--batch", "2"]
    assert dryrun.main(["--ranks", "512", "--parallel", "ddp", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "512 ranks, ddp"
    assert max(map(len, lines)) <= 88
    assert re.fullmatch(r" +0-511 +0 +0 +2 +0\.\d{3}.*", lines[-1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parallel", "zigzag"], "--parallel zigzag is unknown: use one of fsdp, ddp, pp, tp, pp+fsdp"),
        (
            ["--parallel", "pp", "--ranks", "512"],
            "--layers 6 cannot make 512 stages: give --layers 512 or more",
        ),
        (["--parallel", "tp", "--ranks", "8"], "--heads 4 cannot be shared by 8 ranks: give a multiple of 8"),
        (["--parallel", "fsdp", "--stages", "2"], "--stages means nothing to --parallel fsdp"),
        (["--parallel", "pp", "--stages", "2"], "use --parallel pp+fsdp with --stages 2"),
        (
            ["--parallel", "pp+fsdp", "--ranks", "8", "--stages", "3"],
            "--ranks 8 is no multiple of --stages 3",
        ),
        (["--ranks", "0"], "--ranks is 0: give 1 or more"),
        (["--micro-batches", "0", "--parallel", "pp+fsdp"], "--micro-batches is 0: give 1 or more"),
        (["--width", "30"], "--width 30 is no multiple of --heads 4"),
    ],
)
def test_a_job_that_cannot_be_is_one_line_with_the_fix_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dryrun.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("launch/dryrun.py: [DC501] ")
    assert words in err
