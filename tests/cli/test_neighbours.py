"""Libraries that conflict are found without importing them, and what they patch is found when they are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch.utils.checkpoint

from distckpt.cli import environment as here


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The distributions that seem to be installed, by name."""
    found: dict[str, str] = {}
    monkeypatch.setattr(here, "installed", found.get)
    return found


@pytest.fixture
def accelerate(installed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source of an accelerate that drops the random state, on the path; returns the line's file."""
    installed["accelerate"] = "1.15.0"
    package = tmp_path / "accelerate"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemError('imported')")
    file = package / "utils" / "fsdp_utils.py"
    file.write_text("\n\nlayer = checkpoint_wrapper(layer, preserve_rng_state=False)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "accelerate", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return file


def read(environment: dict[str, str] | None = None, home: Path | None = None) -> list[tuple[str, str]]:
    environment = {"HF_HOME": str(home or "/nowhere"), **(environment or {})}
    return [(f.status, f.text) for f in here.neighbour_findings(environment)]


def test_nothing_here_is_known_to_conflict(installed: dict[str, str]) -> None:
    assert read() == [("ok", "no library here is known to conflict")]


def test_accelerates_own_checkpointing_is_a_failure_where_it_is_on(accelerate: Path, tmp_path: Path) -> None:
    ((status, text),) = read()
    assert status == "ok"
    assert "fsdp_utils.py:3" in text
    ((status, text),) = read({"FSDP_ACTIVATION_CHECKPOINTING": "true"})
    assert status == "fail"
    assert "dropout gradients are wrong" in text
    assert "fsdp_utils.py:3" in text
    home = tmp_path / "home"
    (home / "accelerate").mkdir(parents=True)
    config = home / "accelerate" / "default_config.yaml"
    config.write_text("fsdp_config:\n  fsdp_activation_checkpointing: false\n")
    assert [status for status, _ in read(home=home)] == ["ok"]
    config.write_text("fsdp_config:\n  fsdp_activation_checkpointing: true  # faster\n")
    ((status, text),) = read(home=home)
    assert status == "fail"
    assert str(config) in text


def test_an_accelerate_that_keeps_the_random_state_is_no_conflict(accelerate: Path) -> None:
    accelerate.write_text("layer = checkpoint_wrapper(layer)\n")
    assert [status for status, _ in read({"FSDP_ACTIVATION_CHECKPOINTING": "true"})] == ["ok"]


@pytest.mark.parametrize(
    ("version", "flag"), [("5.23.0", "activation_checkpointing"), ("4.57.1", "gradient_checkpointing")]
)
def test_the_trainers_switch_is_named_as_this_transformers_calls_it(
    installed: dict[str, str], version: str, flag: str
) -> None:
    installed["transformers"] = version
    ((status, text),) = read()
    assert (status, text) == (
        "ok",  # advice: nothing here says that it is on
        f"leave TrainingArguments({flag}=) at False where you use dc.apply: it replaces our function",
    )


def test_a_library_known_to_patch_torch_is_named_before_it_does(installed: dict[str, str]) -> None:
    installed["unsloth"] = "2026.1"
    (found,) = here.neighbour_findings({"HF_HOME": "/nowhere"})
    assert (found.status, found.subject) == ("warn", "unsloth 2026.1")
    assert found.fix is not None
    assert found.fix.endswith("distckpt doctor --import unsloth")


PATCHER = """
import functools
import torch.utils.checkpoint as torchs
original = torchs.checkpoint
@functools.wraps(original)
def checkpoint(*args, **kwargs): return original(*args, **kwargs)
torchs.checkpoint = checkpoint
"""


def test_what_an_imported_library_patches_is_a_failure(
    installed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "patches_torch.py").write_text(PATCHER)
    monkeypatch.syspath_prepend(str(tmp_path))
    # with functools.wraps the replacement calls itself torch's, so the file that it is from decides
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", torch.utils.checkpoint.checkpoint)
    (found,) = here.neighbour_findings({"HF_HOME": "/nowhere"}, ["patches_torch"])
    monkeypatch.delitem(sys.modules, "patches_torch")
    assert (found.status, found.subject, found.code) == ("fail", "patches_torch", "DC705")
    assert "replaces torch.utils.checkpoint.checkpoint" in found.text


def test_a_module_that_cannot_be_imported_is_a_failure(installed: dict[str, str]) -> None:
    found = here.neighbour_findings({"HF_HOME": "/nowhere"}, ["no_such_module"])
    assert found[0].status == "fail"
    assert "No module named 'no_such_module'" in found[0].text


def test_our_own_installation_is_no_conflict(installed: dict[str, str]) -> None:
    import distckpt as dc

    with dc.compat.install():
        assert here.patched() == []
    assert here.patched() == []
