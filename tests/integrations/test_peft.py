"""peft: LoRA over a frozen base, without ``enable_input_require_grads``."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import distckpt as dc
from distckpt.engine.stats import counters

pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
peft = pytest.importorskip("peft", reason="the extra 'integrations' is not installed")

from tests.integrations.models import LAYERS, THEIR_WARNINGS, build, same, step, without_cache  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(text) for text in THEIR_WARNINGS]


def lora(base: Any) -> Any:
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_dropout=0.3, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(base, config).train()


def base() -> Any:
    return without_cache(build("llama"))


def test_lora_with_a_frozen_base_is_bit_equal_and_needs_no_input_gradients() -> None:
    expected = step(lora(base()))
    model = lora(base())
    keys = list(model.state_dict())
    assert len(dc.apply(model)) == LAYERS["llama"]
    before = counters.regions
    got = step(model)
    assert counters.regions - before == LAYERS["llama"]
    assert same(got, expected)
    assert all("lora" in name for name in got if name != "loss")
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora" not in name)
    assert not model.get_input_embeddings()._forward_hooks
    assert list(model.state_dict()) == keys


def test_regions_may_be_there_before_the_adapters() -> None:
    model = base()
    dc.apply(model)
    assert same(step(lora(model)), step(lora(base())))


def test_the_supported_hook_works_below_adapters() -> None:
    model = lora(base())
    function = functools.partial(dc.checkpoint, determinism_check="bitwise")
    model.get_base_model()._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    before = counters.regions
    assert same(step(model), step(lora(base())))
    assert counters.regions - before == LAYERS["llama"]


def test_adapters_can_be_merged_after_the_regions_are_gone() -> None:
    model = lora(base()).eval()
    handle = dc.apply(model)
    handle.remove()
    assert type(model.merge_and_unload()).__name__ == "LlamaForCausalLM"
