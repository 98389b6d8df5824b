"""The command line of the training job: options in, exit code out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from launch.errors import LaunchError

OK, DIFFERS, BAD_INPUT = 0, 1, 2


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the job that the arguments (None: the process's own) ask for; returns the exit code."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        import tyro

        from launch.report import Report
    except ModuleNotFoundError as missing:
        return _refuse(f"{missing.name} is not installed: pip install -e '.[cli]'", first)
    from launch import compare, data, loop, state
    from launch.options import Options
    from launch.parallel import agree, joined

    options = tyro.cli(Options, args=arguments, prog="launch/train.py", console_outputs=first)
    try:
        options.check()
        with joined() as world:
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
    except LaunchError as error:
        return _refuse(error.line(), first)


def _refuse(line: str, first: bool) -> int:
    if first:
        print(f"launch/train.py: {line}", file=sys.stderr)
    return BAD_INPUT
