"""No library may reach for the network: every model here has random weights."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any of them is imported
