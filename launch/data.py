"""Bytes of real text, and a stream of batches whose position can be saved and restored."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

from launch.errors import BadData

LIMIT = 16 * 2**20  # bytes read at most: enough text for any run of this job, and little memory


def read(path: Path | None, context: int) -> torch.Tensor:
    """All text as one uint8 vector, files in name order. `None` reads the standard library's sources.

    Raises BadData if there is nothing to read or less than two sequences of `context` bytes.
    """
    root = Path(sysconfig.get_path("stdlib")) if path is None else path
    if not root.exists():
        raise BadData(f"--data {root} does not exist", fix="give a file or a folder of text")
    pattern = "*.py" if path is None else "**/*"
    files = [root] if root.is_file() else sorted(p for p in root.glob(pattern) if p.is_file())
    text = bytearray()
    for file in files:
        try:
            text += file.read_bytes()[: LIMIT - len(text)]
        except OSError as error:
            raise BadData(f"--data: cannot read {file} ({error.strerror})", fix="make it readable") from error
        if len(text) >= LIMIT:
            break
    if len(text) < 2 * (context + 1):
        raise BadData(
            f"--data {root} has {len(text)} bytes of text, too few for sequences of {context}",
            fix="give more text or a smaller --context",
        )
    return torch.frombuffer(text, dtype=torch.uint8)


class Batches:
    """Random crops of a text. Every rank draws its own, and where it stands is one small tensor."""

    def __init__(self, text: torch.Tensor, *, batch: int, context: int, seed: int, rank: int) -> None:
        self._text = text
        self._batch = batch
        self._context = context
        # Apart from the generator that dropout uses: what a rank reads never depends on how it trains.
        self._generator = torch.Generator().manual_seed(seed * 100_003 + rank + 1)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64, each (batch, context); a target is the next byte."""
        last = len(self._text) - self._context - 1
        starts = torch.randint(last + 1, (self._batch, 1), generator=self._generator)
        crops = self._text[starts + torch.arange(self._context + 1)].long()
        return crops[:, :-1].contiguous(), crops[:, 1:].contiguous()

    def position(self) -> torch.Tensor:
        """Where the stream stands, as an opaque uint8 tensor."""
        return self._generator.get_state()

    def seek(self, position: torch.Tensor) -> None:
        """Go back to where `position()` was taken."""
        self._generator.set_state(position)
