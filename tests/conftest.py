"""Settings every test shares. Fakes and helpers live beside the tests that use them."""

from __future__ import annotations

import os

# Before torch is imported anywhere: two workers on two cores gain nothing from more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
