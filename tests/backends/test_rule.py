"""The one device type of a region."""

from __future__ import annotations

import pytest
import torch
from distckpt_backends.rule import others, select
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.mark.parametrize(
    ("types", "chosen", "rest"),
    [
        ([], None, ()),
        (["cpu"], None, ()),
        (["meta", "cpu", "meta"], None, ()),
        (["cpu", "mps", "cpu"], "mps", ()),
        (["meta", "lazy"], "lazy", ()),
        (["xla", "mps", "xla"], "xla", ("mps",)),
        (["xla", "cuda"], "cuda", ("xla",)),
        (["cuda", "xla", "mps", "xla"], "cuda", ("xla", "mps")),
    ],
)
def test_cuda_first_else_the_first_met_and_host_and_meta_never(
    types: list[str], chosen: str | None, rest: tuple[str, ...]
) -> None:
    assert select(types) == chosen
    assert others(types) == rest


@pytest.mark.parametrize("device", ["cuda:1", "mps", "xla:0", "xpu:0"])
def test_a_fake_tensor_counts_by_the_device_it_claims(device: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        claimed = torch.empty(2, device=device)
    assert select([torch.ones(1).device.type, claimed.device.type]) == torch.device(device).type
