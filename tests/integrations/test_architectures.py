"""Every text architecture of transformers that can be built small: exact, or refused with a code."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import distckpt as dc
from distckpt.errors import UnknownModel

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

from tests.integrations.models import BATCH, same, step, without_cache  # noqa: E402

# Whatever of these a configuration has. The rest keeps its defaults, dropout among them.
SMALL: dict[str, Any] = {
    **dict.fromkeys(["vocab_size"], 97),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"], 32),
    **dict.fromkeys(["intermediate_size", "hidden_dim", "ffn_dim", "d_ff"], 64),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 64),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_experts_per_tok", "expand"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "v_head_dim", "state_size", "kv_lora_rank", "q_lora_rank"], 8),
    **dict.fromkeys(["rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim"], 4),
    **dict.fromkeys(["max_position_embeddings", "n_positions"], 64),
    **dict.fromkeys(["n_group", "topk_group", "eos_token_id"], 1),
    **dict.fromkeys(["pad_token_id", "bos_token_id"], 0),
    "embedding_size": 16,
    "attention_dropout": 0.2,
}


def small(name: str, auto: Any) -> Any:
    """A small model, or None where the settings do not fit or the model does not repeat itself without us."""
    try:
        known = transformers.AutoConfig.for_model(name).to_dict()
        config = transformers.AutoConfig.for_model(name, **{k: v for k, v in SMALL.items() if k in known})
        with torch.device("meta"):
            if sum(p.numel() for p in auto.from_config(config).parameters()) > 3_000_000:
                return None
        torch.manual_seed(0)
        model = without_cache(auto.from_config(config)).train()
        return model if same(step(model, **tokens()), step(model, **tokens())) else None
    except Exception:
        return None


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 97, BATCH, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_text_architecture_is_exact_or_refused() -> None:
    from transformers.models.auto import modeling_auto as auto

    kinds = {
        transformers.AutoModelForCausalLM: auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        transformers.AutoModelForMaskedLM: auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        transformers.AutoModelForSeq2SeqLM: auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    exact, refused, wrong = [], [], []
    for kind, names in kinds.items():
        for name in names:
            model = small(name, kind)
            if model is None:
                continue
            expected = step(model, **tokens())
            try:
                dc.apply(model)
            except UnknownModel:
                refused.append(name)
                continue
            for module in model.modules():
                if hasattr(getattr(module, "config", None), "use_cache"):
                    module.config.use_cache = True
            (exact if same(step(model, **tokens()), expected) else wrong).append(name)
    print(f"{len(exact)} exact, {len(refused)} refused: {', '.join(refused)}")
    assert not wrong
    assert len(exact) > 100
