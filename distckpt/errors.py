"""``dc.errors``: every coded error, from whichever room it comes. ``docs/errors.md`` has a section for each code."""

# ruff: noqa: F403
from distckpt_backends.errors import *

from distckpt.cli.errors import *
from distckpt.compat.errors import *
from distckpt.engine.errors import *
from distckpt.integrations.errors import *
from distckpt.modules.errors import *
from distckpt.policy.errors import *
from distckpt.ranks.errors import *
from distckpt.ranks.fsdp_errors import *
from distckpt.ranks.pipeline.errors import *
from distckpt.ranks.streams_errors import *
