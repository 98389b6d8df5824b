"""transformers' Trainer: regions from a callback survive its switch, and settings that cannot both hold are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import distckpt as dc
from distckpt.engine.stats import counters
from distckpt.modules import regions

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
pytest.importorskip("accelerate", reason="the extra 'hf' is not installed")

from distckpt.errors import BothSwitches  # noqa: E402
from distckpt.integrations.transformers import DistckptCallback  # noqa: E402
from tests.integrations.models import LAYERS, THEIR_WARNINGS, VOCABULARY, build, without_cache  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(text) for text in THEIR_WARNINGS]

STEPS = 2
DATA = [
    {"input_ids": torch.arange(i, i + 16) % VOCABULARY, "labels": torch.arange(i, i + 16) % VOCABULARY}
    for i in range(8)
]


def trainer(model: Any, folder: Path, callback: Any = None, **arguments: Any) -> Any:
    given = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        **arguments,
    )
    return transformers.Trainer(model, given, train_dataset=DATA, callbacks=[callback] if callback else None)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(folder: Path, callback: Any = None, before: bool = False, **arguments: Any) -> tuple[Any, int]:
    """The model after training, and how many regions ran."""
    model = without_cache(build("llama"))
    if before:
        dc.apply(model)
    start = counters.regions
    work = trainer(model, folder, callback, **arguments)
    work.train()
    return model, counters.regions - start


@pytest.mark.parametrize("switch", [{}, {"activation_checkpointing": True}, {"gradient_checkpointing": True}])
def test_the_callback_survives_the_trainers_own_switch(tmp_path: Path, switch: dict[str, bool]) -> None:
    plain, none = trained(tmp_path)
    model, opened = trained(tmp_path, DistckptCallback(determinism_check="bitwise"), **switch)
    assert (none, opened) == (0, STEPS * LAYERS["llama"])
    after, expected = weights(model), weights(plain)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert not len(regions(model))
    assert not model.is_activation_checkpointing


def test_regions_that_were_applied_before_train_exactly(tmp_path: Path) -> None:
    model, opened = trained(tmp_path, before=True)
    assert opened == STEPS * LAYERS["llama"]
    after, expected = weights(model), weights(trained(tmp_path)[0])
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_apply_and_the_trainers_switch_are_an_error_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(BothSwitches, match="give the Trainer a DistckptCallback") as caught:
        trained(tmp_path, before=True, activation_checkpointing=True)
    assert caught.value.code == "DC603"


def test_arguments_of_the_trainers_checkpointing_that_would_be_ignored_are_an_error(tmp_path: Path) -> None:
    for ignored in ({"every_n_layers": 2}, {"use_reentrant": True}):
        with pytest.raises(BothSwitches, match=next(iter(ignored))):
            trainer(
                build("llama"),
                tmp_path,
                DistckptCallback(),
                activation_checkpointing=True,
                activation_checkpointing_kwargs=ignored,
            )
    same_as_ours = {"use_reentrant": False}
    trainer(
        build("llama"),
        tmp_path,
        DistckptCallback(),
        activation_checkpointing=True,
        activation_checkpointing_kwargs=same_as_ours,
    )


def test_fsdps_own_checkpointing_and_the_callback_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Arguments:
        fsdp_config: ClassVar[dict[str, bool]] = {"activation_checkpointing": True}

    with pytest.raises(BothSwitches, match="FSDP"):
        DistckptCallback().on_init_end(Arguments(), None, None)
    Arguments.fsdp_config = {}
    DistckptCallback().on_init_end(Arguments(), None, None)
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(BothSwitches, match="FSDP"):
        DistckptCallback().on_init_end(Arguments(), None, None)


def test_training_again_after_a_failure_makes_the_regions_again(tmp_path: Path) -> None:
    class Fails(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyError("once")

    model = without_cache(build("llama"))
    callback, fails = DistckptCallback(), Fails()
    work = trainer(model, tmp_path, callback)
    work.add_callback(fails)
    with pytest.raises(KeyError):
        work.train()
    work.remove_callback(fails)
    before = counters.regions
    work.train()
    assert counters.regions - before == STEPS * LAYERS["llama"]
    assert not len(regions(model))
