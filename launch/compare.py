"""The comparison: one training three times, keeping everything, with torch's checkpoint and with distckpt."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from launch.measure import Memory, memory
from launch.modes import MODES
from launch.options import Options
from launch.parallel import World, everyone
from launch.report import Report, megabytes, ranks
from launch.trainer import Trainer

WARM = 2  # first steps, not timed


@dataclass(frozen=True)
class Result:
    """What one mode came to; the largest of the ranks where they differ."""

    losses: list[float]
    digest: dict[str, str]
    memory: Memory
    seconds: list[float]  # of each timed step


def compare(options: Options, text: torch.Tensor, world: World, report: Report) -> dict[str, Result]:
    """Train in every mode from the same seed and return what each came to, by mode. Collective.

    The modes take each step in turn, and who goes first moves on, so that a machine that slows down slows
    all of them. Memory is counted in a step of its own after the last one, where it disturbs no clock.
    """
    trainers = [Trainer(options, mode, text, world) for mode in MODES]
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for step in report.steps(0, options.steps, trainers[0].losses):
        turn = step % len(MODES)
        for trainer in trainers[turn:] + trainers[:turn]:
            batch = trainer.batches.next()
            dist.barrier()
            with trainer.own_rng():
                began = time.perf_counter()
                loss = trainer.step(*batch)
                took = time.perf_counter() - began
            trainer.log(loss)
            if step >= WARM or options.steps <= WARM:
                seconds[trainer.mode].append(took)
    results = {}
    for trainer in trainers:
        digest = trainer.digest()
        counted = _largest(memory(trainer, *trainer.batches.next()))
        results[trainer.mode] = Result(trainer.losses, digest, counted, seconds[trainer.mode])
    return results


def _largest(mine: Memory) -> Memory:
    every = [memory for memory in everyone(mine) if isinstance(memory, Memory)]
    return Memory(
        peak=max(m.peak for m in every),
        kept=max(m.kept for m in every),
        runs=max(m.runs for m in every),
        early=max(m.early for m in every),
    )


def exact(results: dict[str, Result], mode: str = "distckpt") -> bool:
    """Whether ``mode`` gave the losses, gradients and parameters of no checkpointing to the bit, on all ranks."""
    return results[mode].digest == results["none"].digest


def show(results: dict[str, Result], options: Options, world: World, report: Report) -> None:
    """Print the loss curve, the table and the verdict."""
    report.curve(0, results["none"].losses)
    reference, torch_ = results["none"], results["torch"]
    rows = {
        "last loss": [f"{r.losses[-1]:.6f}" for r in results.values()],
        "losses, all steps and ranks": [_bits(r, reference, "losses") for r in results.values()],
        "last gradients": [_bits(r, reference, "gradients") for r in results.values()],
        "last parameters": [_bits(r, reference, "parameters") for r in results.values()],
        "peak live tensors": [megabytes(r.memory.peak) for r in results.values()],
        "kept for backward": [megabytes(r.memory.kept) for r in results.values()],
        "block runs in a step": [f"{r.memory.runs}" for r in results.values()],
        "recomputed": [f"{r.memory.runs - reference.memory.runs}" for r in results.values()],
        "step time, median": [f"{median(r.seconds) * 1e3:.0f} ms" for r in results.values()],
        "step time over torch's": [f"{ratio(r, torch_):.3f}" for r in results.values()],
    }
    if options.pipelined:
        rows["replayed before a gradient"] = [f"{r.memory.early}" for r in results.values()]
    title = (
        f"{options.steps} steps, {options.spread()} on {ranks(world.size)}, {options.dtype}, "
        f"{options.layers} blocks of {options.width}, {options.batch} x {options.context} bytes a rank, "
        f"dropout {options.dropout:g}"
    )
    report.table(title, [_HEADS[mode] for mode in results], rows)
    if not exact(results):
        report.say("NOT equal to the bit: see the rows of hashes above.")
        return
    whose = "all three" if exact(results, "torch") else "distckpt and no checkpointing"
    ours = results["distckpt"].memory
    report.say(
        f"equal to the bit: losses, gradients and parameters of {whose}. distckpt keeps "
        f"{reference.memory.kept / max(1, ours.kept):.1f} times less for backward than no checkpointing. "
        f"Against torch.utils.checkpoint: {ours.peak / torch_.memory.peak:.2f} of its peak, "
        f"{ratio(results['distckpt'], torch_):.2f} of its step time."
    )
    if not exact(results, "torch"):
        report.say(
            "torch.utils.checkpoint differs: its replays draw other numbers from named random streams."
        )


_HEADS = {"none": "keep everything", "torch": "torch.utils.checkpoint", "distckpt": "distckpt"}


def ratio(one: Result, other: Result) -> float:
    """The median over the steps of one mode's time over another's in the same step."""
    return median(a / b for a, b in zip(one.seconds, other.seconds, strict=True))


def _bits(result: Result, reference: Result, what: str) -> str:
    mine = result.digest[what]
    return mine if result is reference else f"{mine} {'=' if mine == reference.digest[what] else 'DIFFERS'}"
