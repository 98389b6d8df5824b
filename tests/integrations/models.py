"""Tiny models of the libraries, with random weights and dropout on. Nothing is downloaded."""

from __future__ import annotations

import os
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"

# What the libraries warn about for reasons of their own; everything else is an error here too.
THEIR_WARNINGS = (
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",  # the Trainer's old flag, which we test
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft asks transformers by the old name
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",  # Lightning, of torch
    "ignore:.*does not have many workers",  # Lightning, on machines with many cores
    "ignore:GPU available but not used",
)

VOCABULARY = 97
BATCH = (2, 16)
NAMES = ("llama", "gpt2", "bert", "t5", "mixtral", "qwen3_moe")
LAYERS = {"llama": 3, "gpt2": 3, "bert": 3, "t5": 4, "mixtral": 2, "qwen3_moe": 2}


def batch(seed: int = 3) -> dict[str, torch.Tensor]:
    """Token ids of shape BATCH, also as labels."""
    tokens = torch.randint(0, VOCABULARY, BATCH, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens}


def build(name: str) -> Any:
    """A model in training mode, the same weights at each call."""
    import transformers as t

    common: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4}
    causal: dict[str, Any] = {
        **common,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "attention_dropout": 0.2,
    }
    torch.manual_seed(0)
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**causal, num_hidden_layers=3)).train()
    if name == "gpt2":
        tokens = {"bos_token_id": 0, "eos_token_id": 0}
        config = t.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=32, **tokens)
        return t.GPT2LMHeadModel(config).train()
    if name == "bert":
        bert = t.BertConfig(**common, num_hidden_layers=3, intermediate_size=64, max_position_embeddings=64)
        return t.BertForMaskedLM(bert).train()
    if name == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        return t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
        ).train()
    if name == "mixtral":
        mixtral = t.MixtralConfig(
            **causal,
            num_hidden_layers=2,
            num_local_experts=4,
            router_jitter_noise=0.1,
            output_router_logits=True,
        )
        return t.MixtralForCausalLM(mixtral).train()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**causal, **experts, num_hidden_layers=2)).train()


def without_cache(model: Any) -> Any:
    """``model`` with its key-value cache off: with a cache attention gets its keys in another memory layout, so that
    the same model has other bits with and without one."""
    for module in model.modules():  # T5's stacks have configurations of their own
        if hasattr(module, "config"):
            module.config.use_cache = False
    return model


def step(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    """The loss and every gradient of one step from fixed seeds."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(**(inputs or batch())).loss
    torch.manual_seed(9)  # a replay that leaned on the current random state would show
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal names, equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
