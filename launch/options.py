"""The options of the training job, and what makes a set of them impossible."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distckpt.errors import BadAhead
from distckpt.ranks.pipeline.schedule import memory_budget
from launch.errors import BadOption

# What a checkpoint must agree on with the run that resumes it. The rest (steps, paths) may change.
SAME_ON_RESUME = (
    *("parallel", "schedule", "micro_batches", "dtype", "layers", "width", "heads", "context"),
    *("batch", "dropout", "lr", "seed", "data"),
)
V_SCHEDULES = (
    "ZBVZeroBubble",
    "DualPipeV",
)  # a rank has a stage on the way there and its mirror on the way back


@dataclass(frozen=True)
class Options:
    """Train a byte-level GPT on real text, with its blocks recomputed in backward.

    Run it under torchrun, for example: torchrun --standalone --nproc_per_node 2 launch/train.py --compare
    """

    ckpt: Literal["none", "torch", "distckpt"] = "distckpt"
    """Who recomputes the blocks: nobody, torch.utils.checkpoint, or distckpt."""
    parallel: Literal["fsdp", "ddp", "pp", "pp+fsdp", "tp"] = "fsdp"
    """FSDP2 units, DDP, pipeline stages, pipeline stages of FSDP2 units, or tensor parallel."""
    schedule: Literal[
        "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
    ] = "1F1B"
    """The pipeline schedule, with --parallel pp and pp+fsdp."""
    micro_batches: int = 4
    """Micro-batches in a step, with --parallel pp and pp+fsdp; they share --batch."""
    early_replay: bool = True
    """Replay the newest block of a micro-batch while its gradient is on its way."""
    ahead: str | None = None
    """How much may be replayed early: "1 micro-batch", "800 MB", or bytes. Left out: what costs no memory."""
    compare: bool = False
    """Train all three from the same seed, step by step in turn, and print them side by side."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """What the blocks compute in. Parameters, gradients and optimizer state are fp32."""
    steps: int = 60
    """Optimizer steps in total, those before a resume included."""
    data: Path | None = None
    """A file or a folder of text. Left out: the Python standard library's own sources."""
    layers: int = 6
    """Transformer blocks; each is one region."""
    width: int = 128
    """Channels of the residual stream; a multiple of --heads."""
    heads: int = 4
    """Attention heads."""
    context: int = 128
    """Bytes per sequence."""
    batch: int = 8
    """Sequences per rank and step."""
    dropout: float = 0.1
    """Dropout probability, in attention and after each half of a block."""
    lr: float = 1e-3
    """AdamW's learning rate."""
    seed: int = 0
    """Seeds the parameters, the data order and each rank's dropout."""
    save: Path | None = None
    """Folder for checkpoints: model, optimizer, data position and RNG of every rank."""
    save_every: int = 0
    """Save after every N steps; 0 saves once, at the end, if --save is given."""
    resume: Path | None = None
    """Folder that --save wrote, or one step-* folder in it; the newest complete and undamaged one is used."""

    def check(self) -> None:
        """Raise BadOption, with what to write instead, if the job cannot run like this."""
        for name in ("steps", "micro_batches", "layers", "width", "heads", "context", "batch"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise BadOption(f"--{flag} is {getattr(self, name)}", fix="give 1 or more")
        if self.pipelined and self.batch % self.micro_batches:
            raise BadOption(
                f"--batch {self.batch} is no multiple of --micro-batches {self.micro_batches}",
                fix=f"try {max(1, self.batch // self.micro_batches) * self.micro_batches}",
            )
        if self.width % self.heads:
            near = max(self.heads, self.width // self.heads * self.heads)
            raise BadOption(f"--width {self.width} is no multiple of --heads {self.heads}", fix=f"try {near}")
        if self.dtype != "fp32" and "fsdp" not in self.parallel:
            raise BadOption(
                f"--dtype {self.dtype} is FSDP2's to do, and --parallel {self.parallel} has none",
                fix="use --dtype fp32",
            )
        if not 0 <= self.dropout < 1:
            raise BadOption(f"--dropout is {self.dropout}", fix="give a probability, at least 0 and below 1")
        if not 0 < self.lr < math.inf:
            raise BadOption(f"--lr is {self.lr}", fix="give a number above 0")
        if abs(self.seed) > 2**40:
            raise BadOption(f"--seed is {self.seed}", fix="give a number of at most 12 digits")
        self._check_ahead()
        if self.save_every < 0:
            raise BadOption(f"--save-every is {self.save_every}", fix="give steps, or 0 to save at the end")
        if self.save_every and self.save is None:
            raise BadOption("--save-every has nowhere to write", fix="add --save FOLDER")
        if self.compare and (self.save or self.resume):
            raise BadOption("--compare keeps no model", fix="leave out --save and --resume")
        if self.save is not None and self.save.exists() and not self.save.is_dir():
            raise BadOption(f"--save {self.save} is a file", fix="give a folder")

    def _check_ahead(self) -> None:
        if self.ahead is None:
            return
        if not self.pipelined:
            raise BadOption(f"--ahead {self.ahead} is for pipelines", fix="add --parallel pp")
        if self.ckpt != "distckpt" and not self.compare:
            raise BadOption(f"--ahead {self.ahead} is for --ckpt distckpt", fix="leave one of the two out")
        if not self.early_replay:
            raise BadOption(
                f"--ahead {self.ahead} needs replays that are early", fix="leave out --no-early-replay"
            )
        try:
            memory_budget(True, self.ahead_amount)
        except BadAhead as error:
            raise BadOption(
                f"--ahead {self.ahead} is no amount", fix='give "1 micro-batch", a size ("800 MB"), or bytes'
            ) from error

    @property
    def ahead_amount(self) -> int | str | None:
        """``--ahead`` as ``coord.attach`` takes it."""
        return int(self.ahead) if self.ahead is not None and self.ahead.isdecimal() else self.ahead

    @property
    def pipelined(self) -> bool:
        """Whether there is a schedule."""
        return self.parallel in ("pp", "pp+fsdp")

    @property
    def restarts(self) -> bool:
        """Whether the run saves to the folder that it resumes, as a job does that is started again when it fails."""
        return self.save is not None and self.save == self.resume

    def spread(self) -> str:
        """The layout for people: fsdp, or pp with its schedule."""
        return f"{self.parallel} {self.schedule} x{self.micro_batches}" if self.pipelined else self.parallel

    def identity(self) -> dict[str, str]:
        """The options that decide the numbers, as text: what a checkpoint and its resume must share."""
        return {name: str(getattr(self, name)) for name in SAME_ON_RESUME}
