"""The command line of the training job: options in, exit code out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch.distributed as dist

from distckpt.cli.errors import CliError
from distckpt.cli.launched import place
from launch.errors import LaunchError
from launch.parallel import World, agree, joined

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
            return _job(arguments, world)
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
    folder = options.resume
    found = None if folder is None else agree(lambda: state.find(folder, options, world))
    loop.train(options, text, world, report, found)
    return OK
