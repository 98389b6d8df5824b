"""Everything that is worth knowing about one GPU, in one command that installs nothing and ends within nine minutes.

    python3 benchmarks/gpu.py                     from a bare tree: torch and pytest are enough
    python3 benchmarks/gpu.py --device cpu        the same parts, small, where there is no GPU; writes nothing

The CUDA tests, the cost of a region on tensors of the GPU, one GPT block in bf16 eagerly and as a CUDA graph, and the
peak memory of a small GPT's step, counted and as CUDA's allocator saw it. Each beside torch.utils.checkpoint in the
same run. The result is benchmarks/results/gpu-<name>.json, written again after each part: a part that fails is told
with its error, and the others go on. ``python benchmarks/docs.py`` shows it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]  # a bare tree, nothing installed

import torch
from engines import Engine, load
from gpt_block import SIZES, Block, Size, run_cpu, run_cuda
from gpt_block import show as show_block
from overhead import CALLS, run_no_grad, run_variant
from overhead import show as show_overhead
from report import table, write
from torch import nn

from launch.measure import LiveBytes

LIMIT = 9 * 60.0  # seconds for everything
TESTS = 4 * 60.0  # of them for the tests
BLOCKS = {"cuda": 12, "cpu": 3}
MEMORY_SIZES = {"cuda": Size(1024, 16, 1024, 8), "cpu": Size(64, 4, 64, 2)}


class Model(nn.Module):
    """A GPT without vocabulary: blocks, a norm and a head that reduces to one number."""

    def __init__(self, size: Size, blocks: int, engine: Engine | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(size, dropout=0.1) for _ in range(blocks))
        self.norm = nn.LayerNorm(size.width)
        self.engine = engine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reduce (batch, length, width) to a loss."""
        for block in self.blocks:
            x = block(x) if self.engine is None else self.engine.region(block, x)
        return self.norm(x).float().square().mean()


def tests(device: str, seconds: float) -> dict[str, Any]:
    """Run the tests that are marked for CUDA, in a process of their own; return their counts.

    Raises:
        RuntimeError: a test failed, or they did not end in time.
    """
    paths = [] if device == "cuda" else ["tests/backends/test_cuda.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *paths]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"the tests did not end within {seconds:.0f} s") from error
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    if done.returncode != 0:
        raise RuntimeError(f"{counts}: {', '.join(failed) or done.stdout[-500:] + done.stderr[-500:]}")
    print(", ".join(f"{n} {word}" for word, n in counts.items()))
    return {"counts": counts}


def overhead(device: str, seconds: float) -> dict[str, Any]:
    """Measure what a region costs over the plain call, on tensors of the device: wall clock, and launches only."""
    engines = [load(name) for name in ("torch", "dc", "compat")]
    rounds = 40 if device == "cuda" else 1
    calls = CALLS if device == "cuda" else dict.fromkeys(CALLS, 2)
    rows: list[dict[str, Any]] = []
    for name in ("default", "rng off", "selective, list"):
        for ops in (1, 10, 50):
            row = run_variant(name, ops, engines, rounds, calls[ops], device)
            if row is not None:
                rows.append(row)
    rows.append(run_no_grad(engines, rounds, calls[1]))
    print(show_overhead(rows))
    return {"rounds": rounds, "rows": rows}


def block(device: str, seconds: float) -> dict[str, Any]:
    """Time one GPT block in bf16, eagerly and captured, and compare its gradients to the bit."""
    engines = {"none": None, **{name: load(name) for name in ("torch", "dc", "compat")}}
    size = SIZES["cuda"] if device == "cuda" else Size(32, 2, 32, 2)
    rows = run_cuda(engines, size, 15) if device == "cuda" else run_cpu(engines, size, 1)
    print(show_block(rows))
    return {"size": vars(size), "rows": rows}


def memory(device: str, seconds: float) -> dict[str, Any]:
    """Peak bytes of one step: live storages, counted after every operator, beside what the allocator reports."""
    size, blocks = MEMORY_SIZES[device], BLOCKS[device]
    rows = []
    for name in ("none", "torch", "dc"):
        counted = _step_peak(None if name == "none" else load(name), size, blocks, device, count=True)
        allocated = _step_peak(None if name == "none" else load(name), size, blocks, device, count=False)
        rows.append({"engine": name, "counted": counted, "allocated": allocated})
    lines = [
        [r["engine"], f"{r['counted'] / 2**20:.1f}"]
        + (
            [f"{r['allocated'] / 2**20:.1f}", f"{r['allocated'] / r['counted']:.3f}"]
            if r["allocated"]
            else ["", ""]
        )
        for r in rows
    ]
    print(table(["engine", "live bytes MiB", "allocator MiB", "allocator / counted"], lines))
    return {"size": vars(size), "blocks": blocks, "rows": rows}


def _step_peak(engine: Engine | None, size: Size, blocks: int, device: str, *, count: bool) -> int | None:
    torch.manual_seed(0)
    model = Model(size, blocks, engine).to(device, torch.bfloat16)
    x = torch.randn(size.batch, size.length, size.width, device=device, dtype=torch.bfloat16)
    for _ in range(2):  # the first step makes the libraries' workspaces
        model.zero_grad()
        if count:
            with LiveBytes(list(model.parameters()), x) as live:
                model(x).backward()
            peak = live.peak
        elif device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            model(x).backward()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            return None  # only a GPU's allocator keeps a peak
    return peak


PARTS: dict[str, Callable[[str, float], dict[str, Any]]] = {
    "memory": memory,
    "block": block,
    "overhead": overhead,
    "tests": tests,
}


def name_of(device: str) -> str:
    """The device's name for a file: ``h100-80gb-hbm3``."""
    full = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", full.lower().replace("nvidia", "")).strip("-")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, comma separated: {', '.join(PARTS)}")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU here: torch {torch.__version__} finds none. --device cpu runs the same parts, small.")
        return 2
    began, results, failed = time.monotonic(), {}, []
    for part in options.only.split(","):
        print(f"\n## {part}", flush=True)
        left = LIMIT - (time.monotonic() - began)
        try:
            results[part] = PARTS[part](device, min(left, TESTS))
        except Exception as error:  # the others are still worth having
            traceback.print_exc()
            results[part] = {"error": f"{type(error).__name__}: {error}"[:500]}
            failed.append(part)
        results[part]["seconds"] = round(time.monotonic() - began, 1)
        if device == "cuda" and not options.no_write:
            path = write(f"gpu-{name_of(device)}", "python3 benchmarks/gpu.py", {"parts": results})
            print(f"wrote {path.name}")
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
