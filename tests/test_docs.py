"""The documents say what the code has: every error code has its section, every rule names tests that exist."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import distckpt as dc

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [p for top in ("distckpt", "backends", "launch") for p in sorted((ROOT / top).rglob("*.py"))]
BASE = "DC000"


def codes_in_source() -> dict[str, str]:
    """Code to class name, for every error class."""
    found: dict[str, str] = {}
    pattern = re.compile(r'^class (\w+)\([^)]*code="(DC\d+)"', re.M)
    for path in SOURCES:
        for name, code in pattern.findall(path.read_text()):
            assert code not in found, f"{code} is used twice: {found.get(code)} and {name}"
            found[code] = name
    return found


def sections() -> dict[str, str]:
    """Code to the text of its section."""
    text = (ROOT / "docs" / "errors.md").read_text()
    parts = re.split(r"^## (DC\d+)$", text, flags=re.M)[1:]
    assert len(parts[::2]) == len(set(parts[::2]))
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_code_has_its_section_and_every_section_its_code() -> None:
    assert set(codes_in_source()) == set(sections())


def test_no_code_in_the_source_is_without_a_class() -> None:
    known = {BASE, *codes_in_source()}
    for path in SOURCES:
        assert set(re.findall(r"DC\d{3}\b", path.read_text())) <= known, path


@pytest.mark.parametrize("code", sorted(sections()))
def test_a_section_says_what_why_and_how_to_fix_it_and_names_its_class(code: str) -> None:
    text = sections()[code]
    assert all(part in text for part in ("**What.**", "**Why.**", "**Fix.**"))
    assert f"`{codes_in_source()[code]}`" in text or f"`{codes_in_source()[code]}," in text


def test_the_page_names_every_kind_of_error_that_can_be_caught() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    kinds = {name for name, kind in vars(dc.errors).items() if getattr(kind, "code", None) == BASE}
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == kinds - {"DistckptError"}


def test_every_test_that_a_rule_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "semantics.md").read_text()))
    assert len(named) > 30
    defined = {
        name
        for path in [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "tests").rglob("pair_*.py")]
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert named - defined == set()


def test_every_rule_names_a_test() -> None:
    rules = re.split(r"^\*\*(\d+)\. ", (ROOT / "docs" / "semantics.md").read_text(), flags=re.M)[1:]
    numbers, texts = rules[::2], rules[1::2]
    assert [int(n) for n in numbers] == list(range(1, len(numbers) + 1))
    for number, text in zip(numbers, texts, strict=True):
        assert "`test_" in text, f"rule {number} names no test"


def test_the_tutorials_blocks_run_in_order_and_print_what_the_page_says() -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text()
    names: dict[str, object] = {"__name__": "tutorial"}
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```)?", page, re.S | re.M)
    assert len(blocks) > 5
    for number, (code, printed) in enumerate(blocks, 1):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, f"tutorial, block {number}", "exec"), names)
        assert out.getvalue() == printed, f"block {number}"


def test_the_readmes_recipes_run_as_printed(tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text()
    names: dict[str, object] = {"__name__": "readme"}
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'backends'}",
        "OMP_NUM_THREADS": "1",
    }
    files = []
    for code, printed in re.findall(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```)?", page, re.S | re.M):
        file = re.match(r"# (\w+\.py)(?:: torchrun (.*))?\n", code)
        if file is None:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, "README", "exec"), names)
            assert out.getvalue() == printed
            continue
        files.append(file[1])
        (tmp_path / file[1]).write_text(code)
        if "transformers" in code and find_spec("transformers") is None:
            continue
        how = ["-m", "torch.distributed.run", *file[2].split()] if file[2] else [file[1]]
        command = [sys.executable, *how]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert files == ["train.py", "ranks.py"]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the site needs the docs extra: `make docs` installs it")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "tutorial" / "index.html").is_file()


def test_every_link_of_the_readme_and_the_pages_leads_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http://", "https://")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
