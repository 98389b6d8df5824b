"""The house: what `make floors` prints must stay as it is, or get better."""

from __future__ import annotations

import ast

from tests import floors


def test_no_imports_make_a_circle_those_inside_functions_counted() -> None:
    assert floors.circles() == []


def test_an_import_inside_a_function_counts_and_one_for_type_checkers_does_not() -> None:
    assert "distckpt.cli.doctor" in set(floors.imports("distckpt.cli.main"))
    assert "distckpt.errors" not in set(floors.imports("distckpt.__main__"))
    assert set(floors.imports("distckpt")) == {"distckpt_backends.errors"}


def test_a_name_of_a_class_or_function_means_one_thing() -> None:
    assert floors.twins(ast.ClassDef) == {}
    # torch's calling convention, on both surfaces
    assert set(floors.twins(ast.FunctionDef)) == {"checkpoint", "checkpoint_sequential"}
