"""The entry point: arguments in, exit code out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distckpt.cli.arguments import Usage, parse

if TYPE_CHECKING:
    from distckpt.errors import CliError

OK, PROBLEM, USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (None: the process's own) ask for.

    Returns:
        0, or 1 when a problem was found, or 2 for a command that cannot be carried out. ``distckpt run`` passes on
        what its script raises, ``SystemExit`` among it.
    """
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
    except Usage as usage:
        return _refuse(usage)
    # Torch says this when it is imported; nothing of ours needs numpy.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    if options.command == "run":
        from distckpt.cli.run import prepare
        from distckpt.errors import CliError

        try:
            script = prepare(options)
        except CliError as error:
            return _refuse(error)
        return script.run()
    from distckpt.cli.doctor import doctor

    return doctor(options)


def _refuse(error: CliError | Usage) -> int:
    print(f"distckpt: {error.line()}", file=sys.stderr, flush=True)
    return USAGE
