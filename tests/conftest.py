"""Settings every test shares. Fakes and helpers live beside the tests that use them."""

from __future__ import annotations

import importlib.util
import os

# Before torch is imported anywhere: two workers on two cores gain nothing from more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `pytest -m cuda` runs where only torch and pytest are installed.
collect_ignore_glob = [] if importlib.util.find_spec("hypothesis") else ["composition/*"]
