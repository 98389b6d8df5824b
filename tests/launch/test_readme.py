"""What the README's first screen promises is what happens."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import distckpt as dc
from launch.measure import LiveBytes
from tests.launch.job import ROOT

README = (ROOT / "README.md").read_text()


def test_the_first_example_prints_what_the_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    example, printed = re.findall(r"^```(?:python|text)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[:2]
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_the_first_example_keeps_as_few_bytes_as_the_readme_says() -> None:
    def run(checkpointed: bool) -> tuple[float, list[torch.Tensor]]:
        torch.manual_seed(0)
        layers = (nn.TransformerEncoderLayer(128, 4, batch_first=True) for _ in range(6))
        model = nn.Sequential(*layers)
        if checkpointed:
            dc.apply(model, "*")
        x = torch.randn(8, 128, 128)
        with LiveBytes(model.state_dict(), x) as live:
            before = live.now()
            y = model(x)
            kept = live.now() - before
        y.square().mean().backward()
        # Without gradients a forward leaves its output alone, and that is not kept for backward's sake.
        kept -= y.untyped_storage().nbytes()
        return kept / 1e6, [p.grad for p in model.parameters() if p.grad is not None]

    promised = re.search(r"\*\*([\d.]+) MB before, ([\d.]+) MB after\*\*", README)
    assert promised
    (before, plain), (after, ours) = run(False), run(True)
    assert (f"{before:.1f}", f"{after:.1f}") == promised.groups()
    assert len(plain) == len(ours) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
