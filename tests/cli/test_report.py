"""What a report looks like: no line too wide, no word cut, colour on a terminal only."""

from __future__ import annotations

import io

import pytest

from distckpt.cli.report import Finding, Section, lines, show
from distckpt.errors import BadEnvironment

LONG = " ".join(f"{10**n}" for n in range(30))
SECTION = Section(
    "Things",
    (
        Finding("ok", "first", "short"),
        Finding("off", "second", LONG, f"do {LONG}"),
        Finding("warn", "a subject that is much longer than the others", LONG),
        Finding.failed("fourth", BadEnvironment("what", why="why", fix="fix")),
    ),
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_are_at_most_88_columns_and_no_number_is_cut() -> None:
    text = [line for _, line in lines(SECTION)]
    assert max(map(len, text)) <= 88
    words = " ".join(text).split()
    assert all(words.count(number) == 3 for number in LONG.split())


def test_a_number_that_is_wider_than_the_page_is_not_cut_either() -> None:
    number = "9" * 120
    assert any(number in line for _, line in lines(Section("", (Finding("ok", "x", number),))))


def test_a_failure_says_what_why_fix_and_its_code() -> None:
    text = [line for _, line in lines(SECTION)][-2:]
    assert text[0].startswith("  FAIL  fourth")
    assert text[0].endswith("what (why)  [DC703]")
    assert text[1] == "        -> fix"


def test_a_file_gets_plain_text() -> None:
    stream = io.StringIO()
    show(lines(SECTION), stream)
    assert "\x1b" not in stream.getvalue()
    assert "  FAIL  fourth" in stream.getvalue()


def test_a_terminal_gets_colour_unless_no_color_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="colour needs the cli extra: pip install -e '.[cli]'")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured, plain = Terminal(), Terminal()
    show(lines(SECTION), coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    show(lines(SECTION), plain)
    assert "\x1b[" in coloured.getvalue()
    assert "\x1b" not in plain.getvalue()
    assert len(coloured.getvalue().splitlines()) == len(plain.getvalue().splitlines())


def test_without_rich_a_terminal_gets_the_same_text_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    show(lines(SECTION), stream)
    assert "\x1b" not in stream.getvalue()
    assert "FAIL" in stream.getvalue()
