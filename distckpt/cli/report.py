"""What a person reads: sections of findings as text of at most 88 columns, with colour on a terminal only."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO

from distckpt_backends.errors import DistckptError

from distckpt.cli import WIDTH

STATUSES = ("ok", "off", "warn", "fail")
_WORDS = {"ok": "ok", "off": "--", "warn": "warn", "fail": "FAIL"}  # they say the same without colour
_COLOURS = {"ok": "green", "off": "dim", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of a report: ``status`` is one of STATUSES; ``fix`` is what to do about it, ``code`` its section in
    the error pages."""

    status: str
    subject: str
    text: str
    fix: str | None = None
    code: str | None = None

    @classmethod
    def failed(cls, subject: str, error: DistckptError) -> Finding:
        """What an error would have said."""
        text = f"{error.what} ({error.why})" if error.why else error.what
        return cls("fail", subject, text, error.fix, error.code)


@dataclass(frozen=True)
class Section:
    """Findings under a heading."""

    title: str
    findings: tuple[Finding, ...]


def lines(section: Section) -> list[tuple[str, str]]:
    """The section as (status, text) lines; status is "" for those without one. No word is cut, so no number."""
    subjects = [len(f.subject) for f in section.findings]
    wide = min(max(subjects, default=0), 24)
    out = [("", section.title)]
    for finding in section.findings:
        head = f"  {_WORDS[finding.status]:<4}  {finding.subject:<{wide}}  "
        code = f"  [{finding.code}]" if finding.code else ""
        out += [(finding.status, line) for line in wrap(finding.text + code, head, " " * (wide + 10))]
        if finding.fix:
            out += [("", line) for line in wrap(finding.fix, " " * 8 + "-> ", " " * 11)]
    return out


def wrap(text: str, first: str, rest: str) -> list[str]:
    """``text`` broken at spaces only."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def show(rows: Iterable[tuple[str, str]], stream: TextIO | None = None) -> None:
    """Print lines; a line's status word in colour where ``stream`` (None: standard output) is a terminal."""
    into: TextIO = sys.stdout if stream is None else stream
    console = _console(into)
    for status, text in rows:
        word = _WORDS.get(status, "")
        if console is None or not word:
            print(text, file=into)
        else:
            before, _, after = text.partition(word)
            console.print(before, (word, _COLOURS[status]), after)
    into.flush()


class _Console:
    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.text import Text

        self._console = Console(file=stream, highlight=False)
        self._assemble = Text.assemble

    def print(self, *parts: str | tuple[str, str]) -> None:
        self._console.print(self._assemble(*parts), soft_wrap=True)


def _console(stream: TextIO) -> _Console | None:
    if not stream.isatty() or os.environ.get("NO_COLOR"):
        return None
    try:
        return _Console(stream)
    except ModuleNotFoundError:  # the `cli` extra brings rich; without it the same text is plain
        return None
