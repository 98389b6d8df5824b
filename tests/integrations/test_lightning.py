"""Lightning: ``dc.apply`` in ``configure_model`` for the Trainer, before ``setup`` for Fabric."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import distckpt as dc
from distckpt.engine.stats import counters

L: Any = pytest.importorskip("lightning", reason="the extra 'integrations' is not installed")

pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

from tests.integrations.models import LAYERS, THEIR_WARNINGS, batch, build, without_cache  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(text) for text in THEIR_WARNINGS]

STEPS = 2


class Module(L.LightningModule):
    def __init__(self, regions: bool) -> None:
        super().__init__()
        self.model = without_cache(build("gpt2"))
        self.regions = regions

    def configure_model(self) -> None:
        if self.regions:
            dc.apply(self)

    def training_step(self, inputs: Any, index: int) -> torch.Tensor:
        return self.model(**inputs).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(regions: bool) -> tuple[list[torch.Tensor], list[str], int]:
    module = Module(regions)
    keys = list(module.state_dict())
    data = torch.utils.data.DataLoader([batch(seed) for seed in range(STEPS)], batch_size=None)
    before = counters.regions
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=STEPS, accelerator="cpu", devices=1, logger=False, **quiet)
    torch.manual_seed(11)
    trainer.fit(module, data)
    assert list(module.state_dict()) == keys
    return [p.detach() for p in module.parameters()], keys, counters.regions - before


def test_the_trainer_trains_to_the_same_bits_with_regions_from_configure_model() -> None:
    expected, keys, none = fitted(regions=False)
    got, same_keys, opened = fitted(regions=True)
    assert (none, opened) == (0, STEPS * LAYERS["gpt2"])
    assert keys == same_keys
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def fabric_step(regions: bool, precision: Any) -> tuple[list[Any], int]:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model = without_cache(build("gpt2"))
    if regions:
        dc.apply(model)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = counters.regions
    torch.manual_seed(5)
    loss = model(**batch()).loss
    torch.manual_seed(9)
    fabric.backward(loss)
    optimizer.step()
    return [p.detach() for p in model.parameters()], counters.regions - before


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_steps_to_the_same_bits(precision: Any) -> None:
    expected, none = fabric_step(False, precision)
    got, opened = fabric_step(True, precision)
    assert (none, opened) == (0, LAYERS["gpt2"])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
