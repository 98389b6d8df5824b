"""Selective regions whose operators are collectives, on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks.jobs.selective import POLICIES, PROGRAMS
from tests.ranks.spawn import run_ranks

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.9"), reason="over gloo torch 2.9 has no exchange of all with all"
)


@pytest.fixture(scope="module")
def found() -> list[Any]:
    return run_ranks("tests.ranks.jobs.selective", 2)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("program", [fn.__name__ for fn in PROGRAMS])
def test_collectives_in_a_selective_region_are_exact(found: list[Any], program: str, policy: str) -> None:
    """Those of c10d write into an argument and their schemas do not say so: skipped, nobody fills it."""
    for rank in found:
        assert {kind: rank[f"{program}, {policy}, {kind}"] for kind in ("dc", "dc, hooks", "compat")} == {
            "dc": True,
            "dc, hooks": True,
            "compat": True,
        }
