"""Pipeline stages: sessions keyed by (stage, micro-batch), replays before the gradient arrives."""

from distckpt.ranks.pipeline.attach import Attached as Attached
from distckpt.ranks.pipeline.attach import attach as attach
from distckpt.ranks.pipeline.report import StageReport as StageReport
