"""The command line of the training job: options in, exit code out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch.distributed as dist

from distckpt.cli.environment import place
from distckpt.errors import CliError
from launch.errors import BadCheckpoint, LaunchError
from launch.parallel import World, agree, joined, shared

OK, DIFFERS, BAD_INPUT = 0, 1, 2


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the job that the arguments (None: the process's own) ask for; returns the exit code."""
    try:
        place(os.environ)  # half of torchrun's variables would be a traceback, or a wait for nobody
    except CliError as error:
        print(f"launch/train.py: {error.line()}", file=sys.stderr, flush=True)
        return BAD_INPUT
    with joined() as world:
        try:
            code = _job(arguments, world)
            dist.barrier()  # nobody leaves, and takes a connection along, while others still gather
            return code
        except LaunchError as error:
            if world.first:
                print(f"launch/train.py: {error.line()}", file=sys.stderr, flush=True)
            dist.barrier()  # torchrun stops everyone when the first rank leaves: let the message out before
            return BAD_INPUT
        except SystemExit:  # from the option parser, which has printed why, or the help text
            dist.barrier()
            raise


def _job(arguments: Sequence[str] | None, world: World) -> int:
    try:
        import plotille  # noqa: F401
        import rich  # noqa: F401
        import tyro
    except ModuleNotFoundError as missing:
        raise LaunchError(f"{missing.name} is not installed", fix="pip install -e '.[cli]'") from missing
    from launch import compare, data, loop, state
    from launch.options import Options
    from launch.report import Report

    options = tyro.cli(Options, args=arguments, prog="launch/train.py", console_outputs=world.first)
    options.check()
    report = Report(quiet=not world.first)
    text = agree(lambda: data.read(options.data, options.context))
    if options.compare:
        results = compare.compare(options, text, world, report)
        compare.show(results, options, world, report)
        return OK if compare.exact(results) else DIFFERS
    options = replace(
        options, resume=next((asked for asked in shared(lambda: options.resume) if asked), None)
    )
    found = None if options.resume is None else state.find(options.resume, options, world)
    for damaged in found.damaged if found and world.first else ():
        print(
            f"launch/train.py: [{BadCheckpoint.code}] left out, damaged: {damaged}",
            file=sys.stderr,
            flush=True,
        )
    state.refuse_overwriting(options, found)
    if found is not None and found.step == options.steps:
        report.say(f"{found.folder} has done all {found.step} steps: nothing is left to do")
        return OK
    loop.train(options, text, world, report, found)
    return OK
