"""The entry point: commands and flags (frozen: a test compares them with what they were), exit code out."""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from distckpt import __version__
from distckpt.cli import WIDTH

if TYPE_CHECKING:
    from distckpt.errors import CliError


class Usage(Exception):
    """The arguments cannot be understood; ``fix`` says what to write instead."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix

    def line(self) -> str:
        """The line that its coded error, ``BadUsage``, would print; that class needs torch."""
        return f"[DC701] {self.what}: {self.fix}"


class _Parser(argparse.ArgumentParser):
    """One line instead of a page when the arguments are wrong."""

    def error(self, message: str) -> NoReturn:
        raise Usage(message, f"see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    columns = min(WIDTH, shutil.get_terminal_size().columns)
    style = functools.partial(argparse.RawDescriptionHelpFormatter, width=columns)
    make: Any = functools.partial(_Parser, formatter_class=style, allow_abbrev=False)
    top = make(
        prog="distckpt",
        description="Activation checkpointing with the same gradients to the bit.",
        epilog="Next: distckpt doctor",
    )
    top.add_argument("--version", action="version", version=f"distckpt {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=make)

    doctor = commands.add_parser(
        "doctor",
        help="check this machine, or under torchrun every rank",
        description="Versions, devices, launch environment, neighbours that conflict, and a replay\n"
        "self-test that compares gradients bit by bit on every device.",
        epilog="Under torchrun every rank takes part and rank 0 prints:\n"
        "  torchrun --nproc_per_node 2 -m distckpt doctor\n\n"
        "Exit code: 0, or 1 when something failed, or 2 for arguments it does not know.",
    )
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    doctor.add_argument(
        "--device",
        action="append",
        default=[],
        metavar="TYPE",
        help="self-test only this device type; may be repeated (default: all that are here)",
    )
    doctor.add_argument("--no-self-test", action="store_true", help="leave the self-test out")
    doctor.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this first, and report what it patches in torch; may be repeated",
    )
    doctor.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long rank 0 waits for the others (default: %(default)g)",
    )

    run = commands.add_parser(
        "run",
        usage="distckpt run [-h] [--json FILE] [--quiet] (SCRIPT | -m MODULE) [ARGS ...]",
        help="run a script with torch.utils.checkpoint's names resolved to ours",
        description="Run an unmodified script with torch.utils.checkpoint's names resolved to ours.",
        epilog="Under torchrun:\n  torchrun --nproc_per_node 2 -m distckpt run train.py ARGS\n\n"
        "The exit code is the script's, or 2 when there is no such script.",
    )
    run.add_argument(
        "--json", metavar="FILE", help="write the counts to FILE, under torchrun to one per rank"
    )
    run.add_argument("--quiet", action="store_true", help="say nothing")
    run.add_argument("-m", dest="module", metavar="MODULE", help="run a module, as python -m does")
    run.add_argument("script", nargs="?", metavar="SCRIPT", help="what to run; all after it is its own")
    return top


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What the arguments ask for: ``command`` and its flags; for ``run`` also ``rest``, the script's own arguments.

    Raises:
        Usage: they cannot be understood.
        SystemExit: help or the version was asked for, and has been printed.
    """
    mine, rest = _split(list(arguments))
    options = parser().parse_args(mine)
    if options.command is None:
        raise Usage("no command given", "distckpt doctor, or distckpt run SCRIPT; see distckpt --help")
    if options.command == "run":
        options.rest = rest
        if options.module is None and options.script is None:
            raise Usage("run has nothing to run", "distckpt run SCRIPT ARGS, or distckpt run -m MODULE ARGS")
    elif options.timeout <= 0:
        raise Usage(f"--timeout is {options.timeout:g}", "give seconds above 0")
    return options


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Ours, and those that belong to the script: all that follow its name."""
    if arguments[:1] != ["run"]:
        return arguments, []
    at = 1
    while at < len(arguments):
        word = arguments[at]
        if word == "-m":
            return arguments[: at + 2], arguments[at + 2 :]
        if word == "--json":
            at += 2
        elif word.startswith("-m"):
            return arguments[: at + 1], arguments[at + 1 :]
        elif word.startswith("-") and word != "-":
            at += 1
        else:
            return arguments[: at + 1], arguments[at + 1 :]
    return arguments, []


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
