"""Globs: patterns over the dotted names of a model's modules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from distckpt.errors import NoMatch

_TOKEN = re.compile(r"\*\*\.|\*\*|\*|\?|\[!?[^\]]+\]|.", re.DOTALL)


def compile_glob(glob: str) -> re.Pattern[str]:
    """The glob as a pattern for ``fullmatch`` on a dotted name.

    ``*``, ``?`` and ``[...]`` stay within one dotted part. ``**`` crosses parts: ``a.**`` is everything
    below ``a``, ``**.a`` every ``a`` at any depth, ``a.**.b`` every ``b`` below ``a``. The empty glob is the
    model itself.
    """
    pieces: list[str] = []
    for match in _TOKEN.finditer(glob):
        token, starts_part = match.group(), match.start() == 0 or glob[match.start() - 1] == "."
        if token == "**.":
            pieces.append(r"(?:[^.]+\.)*" if starts_part else r".*\.")
        elif token == "**":
            pieces.append(".+" if starts_part else ".*")
        elif token == "*":
            alone = starts_part and glob[match.end() : match.end() + 1] in ("", ".")
            pieces.append("[^.]+" if alone else "[^.]*")
        elif token == "?":
            pieces.append("[^.]")
        elif len(token) > 1:
            pieces.append(_character_class(token))
        else:
            pieces.append(re.escape(token))
    return re.compile("".join(pieces))


def _character_class(token: str) -> str:
    negated = token.startswith("[!")
    body = token[2 if negated else 1 : -1].replace("\\", r"\\").replace("^", r"\^").replace("[", r"\[")
    return rf"(?!\.)[{'^' if negated else ''}{body}]"


def select(globs: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that any of ``globs`` matches, in the order of ``names``.

    Raises:
        NoMatch: one of the globs matches nothing, whatever the others match.
    """
    names = list(names)
    chosen: set[str] = set()
    for glob in globs:
        pattern = compile_glob(glob)
        hits = [name for name in names if pattern.fullmatch(name)]
        if not hits:
            raise _no_match(glob, names)
        chosen.update(hits)
    return [name for name in names if name in chosen]


def _no_match(glob: str, names: list[str]) -> NoMatch:
    near = _near(glob, [name for name in names if name])
    return NoMatch(
        f"the glob {glob!r} matches no module",
        why=f"the nearest of {len(names)} module names: {', '.join(map(repr, near))}" if near else None,
        fix="globs are over the names of model.named_modules(); * stays within one dotted part, ** crosses them",
    )


def _near(glob: str, names: list[str], count: int = 4) -> list[str]:
    """Names close to ``glob``: similar spelling first, then what lies where its beginning leads."""
    close = difflib.get_close_matches(glob, names, n=count, cutoff=0.6)
    parts = glob.split(".")
    for length in range(len(parts) - 1, 0, -1):
        pattern = compile_glob(".".join(parts[:length]))
        parents = {name for name in names if pattern.fullmatch(name)}
        below = [name for name in names if name.rpartition(".")[0] in parents]
        if below:
            return list(dict.fromkeys([*close[:2], *below]))[:count]
    return close or [name for name in names if "." not in name][:count]
