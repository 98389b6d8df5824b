"""Settings every test shares. Fakes and helpers live beside the tests that use them."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Generator

import pytest

from tests import processes

# Before torch is imported anywhere: two workers on two cores gain nothing from more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `pytest -m cuda` runs where only torch and pytest are installed.
collect_ignore_glob = [] if importlib.util.find_spec("hypothesis") else ["composition/*"]


def pytest_collection_finish() -> None:
    """What is here before the first test is no garbage: a collection of a test looks at what the test made alone."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the processes of a failed test printed, and keep it."""
    report = yield
    if report.failed and processes.logs:
        report.sections.append(("what its processes printed", processes.forget(keep=True)))
    elif report.when == "teardown":
        processes.forget(keep=False)
    return report
