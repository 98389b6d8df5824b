"""One training run, from the first step or from a checkpoint."""

from __future__ import annotations

import time

import torch

from launch import state
from launch.options import Options
from launch.parallel import World
from launch.report import Report, ranks
from launch.trainer import Trainer


def train(
    options: Options, text: torch.Tensor, world: World, report: Report, resume: state.Found | None = None
) -> Trainer:
    """Train to `options.steps`, saving on the way as the options say; returns the trainer. Collective."""
    trainer = Trainer(options, options.ckpt, text, world)
    start = 0
    if resume is not None:
        state.load(resume, trainer, world)
        start = resume.step
        report.say(f"resumed {resume.folder} after {start} steps")
    began = time.perf_counter()
    for step in report.steps(start, options.steps, trainer.losses):
        batch = trainer.batches.next()
        with trainer.own_rng():
            loss = trainer.step(*batch)
        trainer.log(loss)
        done = step + 1
        due = done == options.steps or (options.save_every and done % options.save_every == 0)
        if options.save is not None and due:
            folder = state.save(options.save, done, trainer, options, world)
            report.say(f"saved {folder}")
    took = time.perf_counter() - began
    show(trainer, options, world, report, start, took)
    return trainer


def show(
    trainer: Trainer, options: Options, world: World, report: Report, start: int, seconds: float
) -> None:
    """Print the loss curve and what the run came to. Collective."""
    digest = trainer.digest()
    report.curve(start, trainer.losses)
    steps = options.steps - start
    rows = {
        "steps": [f"{start + 1} to {options.steps}"],
        "last loss": [f"{trainer.losses[-1]:.6f}"],
        "bytes a second": [
            f"{steps * options.batch * options.context * trainer.layout.replicas / seconds:,.0f}"
        ],
        "block runs": [f"{trainer.layout.block_runs()}"],
        "losses of these steps": [digest["losses"]],
        "last gradients": [digest["gradients"]],
        "last parameters": [digest["parameters"]],
    }
    title = f"{ranks(world.size)}, {options.spread()}, {options.dtype}, checkpoint: {options.ckpt}"
    report.table(title, ["value"], rows)
