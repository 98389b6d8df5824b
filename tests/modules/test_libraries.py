"""Libraries: what ``dc.apply`` asks those who define a model, and that it asks nobody else."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

import distckpt as dc
from distckpt.engine.stats import counters
from distckpt.errors import NoMatch, UnknownModel
from distckpt.modules import regions, register_library
from tests.modules.models import Model, same, step

Theirs = type("Theirs", (Model,), {"__module__": "somebody.models"})


def asks_for_plain(module: Any, args: Any, kwargs: Any) -> bool:
    return not module.training


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A library for the package ``somebody``; the list says what it was asked."""
    asked: list[Any] = []
    support: Any = types.ModuleType("somebody_support")
    support.layers = lambda model: (
        asked.append("layers") or [name for name, m in model.named_modules() if type(m).__name__ == "Block"]
    )
    support.check = lambda model: asked.append("check")
    support.settle = lambda model: asked.append(("settle", len(regions(model))))
    support.plain = lambda module: asks_for_plain if type(module) is Theirs else None
    monkeypatch.setitem(sys.modules, "somebody_support", support)
    monkeypatch.setattr(sys.modules["distckpt.modules.apply"], "_libraries", {})
    register_library("somebody", "somebody_support")
    return asked


def test_apply_without_a_glob_takes_the_layers_that_the_models_library_names(calls: list[Any]) -> None:
    model = Theirs()
    plain = step(model)
    handle = dc.apply(model)
    assert handle.names == ("layers.0", "layers.1", "layers.2")
    assert calls == ["layers", "check", ("settle", 3)]
    assert same(step(Theirs()), plain)
    handle.remove()
    assert calls[3:] == [("settle", 0)]
    handle.remove()
    assert len(calls) == 4


def test_a_glob_asks_for_no_layers_but_checks_and_settles(calls: list[Any]) -> None:
    dc.apply(Theirs(), "layers.0")
    assert calls == ["check", ("settle", 1)]


def test_a_model_inside_another_module_is_found(calls: list[Any]) -> None:
    outer = torch.nn.Sequential(torch.nn.Identity(), Theirs())
    assert dc.apply(outer).names == ("1.layers.0", "1.layers.1", "1.layers.2")


def test_a_library_is_not_asked_about_models_of_others(calls: list[Any]) -> None:
    dc.apply(Model(), "layers.*")
    assert calls == []


def test_a_call_that_the_library_wants_plain_opens_no_region(calls: list[Any]) -> None:
    model = Theirs()
    dc.apply(model, "")
    before = counters.regions
    model(torch.randn(2, 8))
    assert counters.regions - before == 1
    model.eval()
    model(torch.randn(2, 8))
    assert counters.regions - before == 1


def test_a_refusal_of_the_library_leaves_the_model_alone(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any) -> None:
        raise NoMatch("no")

    monkeypatch.setattr(sys.modules["somebody_support"], "check", refuse)
    model = Theirs()
    with pytest.raises(NoMatch):
        dc.apply(model)
    assert not len(regions(model))


def test_without_a_library_a_glob_is_asked_for_and_one_is_named(calls: list[Any]) -> None:
    with pytest.raises(UnknownModel, match=r"dc\.apply\(model, 'layers\.\*'\)") as caught:
        dc.apply(Model())
    assert "somebody" in str(caught.value)
    with pytest.raises(UnknownModel):
        dc.apply(torch.nn.Linear(2, 2))
