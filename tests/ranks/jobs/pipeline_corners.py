"""What may be inside a stage or happen around a step: two ranks, one finding per corner."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining.schedules import OVERLAP_F_B

import distckpt as dc
from distckpt.engine.stats import counters
from distckpt.ranks import Coordinator
from tests.ranks.jobs.pipeline import WIDTH, Block, Part, batch, equal, pipeline, results, step, told
from tests.ranks.spawn import leave, report

COUNT = 4
ALL = "1 micro-batch"
ROOMS = (3000, 6000, 12_000)  # bytes: for an inner region alone, for some of both kinds, for all of one block


class Normed(nn.Module):
    """A block whose forward changes buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.inner(x))


class Stack(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Nested(nn.Module):
    """A block with a region inside, made by a function call with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.on = False
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def part(y: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
            return self.second(y) * scale

        x = self.first(x)
        scale = x.mean().sigmoid()
        return dc.checkpoint(part, x, scale=scale) if self.on else part(x, scale=scale)


class Growing(nn.Module):
    """A block that saves more in every later forward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.calls = 0
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not dc.is_recomputing():
            self.calls += 1
        times = dc.pin(self.calls)
        for _ in range(times):
            x = self.block(x).sin()
        return x


def after_first_step(schedule: Any, stages: dict[int, Any]) -> list[torch.Tensor]:
    """Results of two steps, with the buffers, after one that torch begins with a run on memory it did not fill."""
    step(schedule, stages, COUNT)
    for stage in stages.values():
        stage.submod.zero_grad()
        for module in stage.submod.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.reset_running_stats()
    found = results(schedule, stages, COUNT, steps=2)
    return found + [b.clone() for s in stages.values() for b in s.submod.buffers()]


class Tied(nn.Module):
    """One weight in two places. (Torch's split backward fails when other weights lie between them.)"""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(nn.functional.dropout(self.mix(x), 0.1).tanh())


class Frozen(Stack):
    """The first block has no gradients to compute."""

    def __init__(self) -> None:
        super().__init__(Block)
        self.blocks[0].requires_grad_(False)


def attached(name: str, make: Any, glob: str = "blocks.*", **options: Any) -> dict[str, Any]:
    expected = after_first_step(*pipeline(name, COUNT, make))
    schedule, stages = pipeline(name, COUNT, make)
    for stage in stages.values():
        for module in stage.submod.modules():
            if isinstance(module, Nested):
                module.on = True
    plan = dict.fromkeys(range(next(iter(stages.values())).num_stages), glob)
    with Coordinator().attach(schedule, plan=plan, **{"ahead": ALL, **options}) as handle:
        found = after_first_step(schedule, stages)
        return {"equal": equal(expected, found), "report": told(handle)}


class Around(nn.Module):
    """A block around a block that is a region by the plan."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inside, self.last = Block(), Block(), Block()
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inside(self.first(x)))


def inside(name: str, **options: Any) -> dict[str, Any]:
    """How often a region inside a region runs in a step."""
    schedule, stages = pipeline(name, COUNT, lambda: Stack(Around))
    plan = dict.fromkeys(range(next(iter(stages.values())).num_stages), ("blocks.*", "blocks.*.inside"))
    with Coordinator().attach(schedule, plan=plan, **options):
        step(schedule, stages, COUNT)
        blocks = [block for stage in stages.values() for block in stage.submod.blocks]
        for block in blocks:
            block.inside.runs = 0
        step(schedule, stages, COUNT)
        return {"runs": [block.inside.runs for block in blocks]}


def growing() -> dict[str, Any]:
    """Every micro-batch of the first step has larger values than the one before."""
    expected = results(*pipeline("GPipe", COUNT, lambda: Stack(Growing)), COUNT, steps=1)
    schedule, stages = pipeline("GPipe", COUNT, lambda: Stack(Growing))
    with Coordinator().attach(schedule, plan={0: "blocks.*", 1: "blocks.*"}, ahead=20_000) as handle:
        same = equal(expected, results(schedule, stages, COUNT, steps=1))
        return {"equal": same, "report": told(handle)}


def evaluation() -> dict[str, Any]:
    """A step without backward between two with."""
    schedule, stages = pipeline("1F1B", COUNT)
    with Coordinator().attach(schedule, plan={0: "blocks.*", 1: "blocks.*"}, ahead=ALL) as handle:
        step(schedule, stages, COUNT)
        x, target = batch(COUNT)
        before = counters.replays
        last = any(s.is_last for s in stages.values())
        losses: list[torch.Tensor] = []
        more = {"target": target, "losses": losses} if last else {}
        with torch.no_grad():
            schedule.eval(*((x,) if 0 in stages else ()), **more)
        found = {"replays": counters.replays - before, "report": told(handle)}
        found["open"] = sum(len(s._distckpt_stage.sessions) for s in stages.values())
        step(schedule, stages, COUNT)
        found["after"] = told(handle)
        return found


def stages_alone() -> dict[str, Any]:
    """The schedule is not known, so the order is not: one replay all the same."""
    expected = results(*pipeline("InterleavedZeroBubble", COUNT), COUNT, steps=1)
    schedule, stages = pipeline("InterleavedZeroBubble", COUNT)
    with Coordinator().attach(
        list(stages.values()), plan=dict.fromkeys(range(4), "blocks.*"), ahead=ALL
    ) as handle:
        same = equal(expected, results(schedule, stages, COUNT, steps=1))
        return {"equal": same, "report": told(handle)}


def unseen_wait() -> dict[str, Any]:
    """A step that waits where nobody looks, as a later torch may."""
    schedule, stages = pipeline("1F1B", COUNT)
    with Coordinator().attach(schedule, plan={0: "blocks.*", 1: "blocks.*"}, ahead=ALL) as handle:
        del schedule._step_microbatches
        results(schedule, stages, COUNT, steps=1)
        return {"report": told(handle)}


def removed() -> dict[str, Any]:
    """After remove() nothing of ours is left, and attaching again works."""
    schedule, stages = pipeline("1F1B", COUNT)
    everything = [schedule, *stages.values(), *(m for s in stages.values() for m in s.submod.modules())]
    before = [set(vars(thing)) for thing in everything]
    handle = Coordinator().attach(schedule, plan={0: "blocks.*", 1: "blocks.*"}, ahead=ALL)
    on = [set(vars(thing)) for thing in everything] != before
    handle.remove()
    handle.remove()
    off = [set(vars(thing)) for thing in everything] == before
    with Coordinator().attach(schedule, ahead=ALL):
        step(schedule, stages, COUNT)
    return {"on": on, "off": off}


class Breaks(Block):
    """A block that fails in the backward of a forward to come."""

    def __init__(self) -> None:
        super().__init__()
        self.until = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        if self.until and out.requires_grad and not dc.is_recomputing():
            self.until -= 1
            if not self.until:
                out.register_hook(self.fail)
        return out

    def fail(self, _grad: torch.Tensor) -> None:
        raise ValueError("told to fail")


def failed_step() -> dict[str, Any]:
    """The last backward fails on the first rank, when the other one has sent everything; the next step is whole."""

    def make() -> nn.Module:
        return Stack(Breaks)

    schedule, stages = pipeline("GPipe", 2, make)
    step(schedule, stages, 2)  # torch runs the stages once before its first step
    for stage in stages.values():
        stage.submod.zero_grad()
    expected = results(schedule, stages, 2, steps=1)
    schedule, stages = pipeline("GPipe", 2, make)
    with Coordinator().attach(schedule, plan={0: "blocks.*", 1: "blocks.*"}, ahead=ALL):
        found: dict[str, Any] = {"raised": None}
        step(schedule, stages, 2)
        if 0 in stages:
            stages[0].submod.blocks[1].until = 2
        try:
            step(schedule, stages, 2)
        except RuntimeError as error:
            found["raised"] = str(error.__cause__)
        found["open"] = sum(len(s._distckpt_stage.sessions) for s in stages.values())
        for stage in stages.values():
            stage.submod.zero_grad(set_to_none=True)
        dist.barrier()
        found["equal"] = equal(expected, results(schedule, stages, 2, steps=1))
        return found


def own_computation() -> dict[str, Any]:
    """Somebody registered a function for two computations at once."""
    schedule, stages = pipeline("DualPipeV", COUNT)
    if not hasattr(schedule, "register_custom_function"):
        return {"skipped": True}
    expected = results(*pipeline("DualPipeV", COUNT), COUNT, steps=1)
    by_index = {s.stage_index: s for s in stages.values()}

    def overlap(action: Any, context: Any) -> None:
        """The forward first, then the backward, with waits that nobody looks into."""
        forward, backward = action.sub_actions
        run = context.schedule_ref
        stage = by_index[forward.stage_index]
        index = forward.microbatch_index
        for work in run.fwd_recv_ops.pop((stage.stage_index, index), []):
            work.wait()
        out = stage.forward_one_chunk(index, context.arg_mbs[index], context.kwarg_mbs[index])
        run._maybe_compute_loss(stage, out, context.target_mbs, index)
        if stage.stage_index + 1 in by_index:
            by_index[stage.stage_index + 1].set_local_fwd_input(out, index)
        stage = by_index[backward.stage_index]
        index = backward.microbatch_index
        for work in run.bwd_recv_ops.pop((stage.stage_index, index), []):
            work.wait()
        run.backward_counter[stage.stage_index] += 1
        full = backward.computation_type.name == "FULL_BACKWARD"
        stage.backward_one_chunk(index, loss=run._maybe_get_loss(stage, index), full_backward=full)
        if stage.stage_index - 1 in by_index:
            by_index[stage.stage_index - 1].set_local_bwd_input(stage.get_local_bwd_output(index), index)

    schedule.register_custom_function(OVERLAP_F_B, overlap)
    with Coordinator().attach(schedule, plan=dict.fromkeys(range(4), "blocks.*"), ahead=ALL) as handle:
        same = equal(expected, results(schedule, stages, COUNT, steps=1))
        return {"equal": same, "report": told(handle)}


def function_regions() -> dict[str, Any]:
    """Regions that a stage makes itself, by torch's name too."""

    class Calls(Part):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.blocks
            if not self.on:
                return second(first(x))
            return dc.compat.checkpoint(second, dc.checkpoint(lambda y: first(y), x), use_reentrant=False)

        on = False

    expected = results(*pipeline("InterleavedZeroBubble", COUNT, Calls), COUNT, steps=1)
    schedule, stages = pipeline("InterleavedZeroBubble", COUNT, Calls)
    for stage in stages.values():
        stage.submod.on = True
    with Coordinator().attach(schedule, ahead=ALL) as handle:
        same = equal(expected, results(schedule, stages, COUNT, steps=1))
        return {"equal": same, "report": told(handle)}


def main() -> None:
    dist.init_process_group("gloo")
    found = {
        "buffers": attached("1F1B", lambda: Stack(Normed)),
        "buffers, split": attached("InterleavedZeroBubble", lambda: Stack(Normed)),
        "nested": attached("1F1B", lambda: Stack(Nested)),
        "nested, split": attached("InterleavedZeroBubble", lambda: Stack(Nested)),
        "nested, limited": attached("GPipe", lambda: Stack(Nested), ahead="5 KiB"),
        **{
            f"inside, {name}, {ahead}": inside(name, ahead=ahead)
            for name in ("GPipe", "InterleavedZeroBubble")
            for ahead in (None, ALL, *ROOMS)
        },
        "growing": growing(),
        "tied, split": attached("InterleavedZeroBubble", lambda: Stack(Tied)),
        "frozen, split": attached("InterleavedZeroBubble", Frozen),
        "evaluation": evaluation(),
        "stages alone": stages_alone(),
        "unseen wait": unseen_wait(),
        "removed": removed(),
        "failed step": failed_step(),
        "own computation": own_computation(),
        "function regions": function_regions(),
    }
    report(found)
    leave()


if __name__ == "__main__":
    main()
