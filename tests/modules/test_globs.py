"""Globs over module names."""

from __future__ import annotations

import pytest

from distckpt.errors import NoMatch
from distckpt.modules.apply import compile_glob, names_matching

NAMES = [
    "",
    "layers",
    "layers.0",
    "layers.0.attn",
    "layers.0.mlp.w1",
    "layers.10",
    "layers.10.attn",
    "attn",
    "head",
]


def matches(glob: str) -> list[str]:
    return [name for name in NAMES if compile_glob(glob).fullmatch(name)]


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("layers.*", ["layers.0", "layers.10"]),
        ("layers.1*", ["layers.10"]),
        ("layers.?", ["layers.0"]),
        ("*.*.attn", ["layers.0.attn", "layers.10.attn"]),
        ("*", ["layers", "attn", "head"]),
        ("h*d", ["head"]),
    ],
)
def test_a_star_stays_within_one_dotted_part(glob: str, expected: list[str]) -> None:
    assert matches(glob) == expected


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("layers.**", ["layers.0", "layers.0.attn", "layers.0.mlp.w1", "layers.10", "layers.10.attn"]),
        ("**.attn", ["layers.0.attn", "layers.10.attn", "attn"]),
        ("layers.**.w1", ["layers.0.mlp.w1"]),
        ("layers.**.attn", ["layers.0.attn", "layers.10.attn"]),
        ("**", NAMES[1:]),
        ("lay**1", ["layers.0.mlp.w1"]),
    ],
)
def test_two_stars_cross_dots(glob: str, expected: list[str]) -> None:
    assert matches(glob) == expected


@pytest.mark.parametrize(
    ("glob", "expected"),
    [("layers.[01]", ["layers.0"]), ("layers.[!1]*", ["layers.0"]), ("layers[.]0", []), ("layers+0", [])],
)
def test_brackets_choose_characters_and_no_dot_and_the_rest_is_literal(
    glob: str, expected: list[str]
) -> None:
    assert matches(glob) == expected


def test_the_empty_glob_is_the_model_itself() -> None:
    assert matches("") == [""]


def test_several_globs_give_each_name_once_in_the_models_order() -> None:
    assert names_matching(["head", "layers.*", "**.10"], NAMES) == ["layers.0", "layers.10", "head"]


def test_each_glob_must_match_something() -> None:
    with pytest.raises(NoMatch, match=r"\[DC301\].*'encoder.\*'"):
        names_matching(["layers.*", "encoder.*"], NAMES)


@pytest.mark.parametrize(
    ("glob", "near"),
    [("layer.*", "'layers.0'"), ("layers.*.mpl", "'layers.0.attn'"), ("Head", "'head'"), ("zzz", "'layers'")],
)
def test_a_glob_without_match_names_near_ones(glob: str, near: str) -> None:
    with pytest.raises(NoMatch) as caught:
        names_matching([glob], NAMES)
    assert near in str(caught.value)
