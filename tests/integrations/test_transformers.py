"""dc.apply and dc.checkpoint on transformers models: exact, found by themselves, and nothing of theirs changed."""

from __future__ import annotations

import copy
import functools
import gc
import io
import sys
import weakref
from typing import Any

import pytest
import torch

import distckpt as dc
from distckpt.engine.stats import counters
from distckpt.errors import AlreadyRegion, InputChanged, UnknownModel
from distckpt.modules import regions

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

from distckpt.errors import BothSwitches, OldFormat  # noqa: E402
from tests.integrations.models import LAYERS, NAMES, batch, build, same, step, without_cache  # noqa: E402
from tests.processes import run  # noqa: E402


def attributes(model: torch.nn.Module) -> dict[str, Any]:
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in module.__dict__.items()
        if key
        not in ("training", "_output_capturing_hooks_installed")  # transformers sets it in its first forward
    }


@pytest.mark.parametrize("name", NAMES)
def test_apply_without_a_glob_finds_the_layers_and_gradients_are_bit_equal(name: str) -> None:
    model = without_cache(build(name))
    keys, expected = list(model.state_dict()), step(model)
    handle = dc.apply(model)
    assert len(handle) == LAYERS[name]
    before = counters.regions
    assert same(step(model), expected)
    assert counters.regions - before == LAYERS[name]
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_that_models_make_by_default_is_left_out_of_the_regions(name: str) -> None:
    model = build(name)
    expected = step(without_cache(build(name)))
    dc.apply(model)
    assert same(step(model), expected)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_through_the_supported_hook_is_bit_equal(name: str) -> None:
    model = without_cache(build(name))
    expected = step(model)
    function = functools.partial(dc.checkpoint, determinism_check="bitwise")
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    before = counters.regions
    assert same(step(model), expected)
    assert counters.regions - before == LAYERS[name]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_that_was_enabled_before_the_installation_reaches_our_engine(reentrant: bool) -> None:
    model = without_cache(build("llama"))
    expected = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    before = counters.regions
    assert same(step(model), expected)
    assert counters.regions == before
    with dc.compat.install():
        assert same(step(model), expected)
    assert counters.regions - before == LAYERS["llama"]


def test_tensors_that_arrive_inside_a_partial_are_inputs_of_the_region() -> None:
    model = build("llama")
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=dc.checkpoint)
    hidden = torch.randn(2, 16, 32, requires_grad=True)
    position = model.model.rotary_emb(hidden, torch.arange(16)[None])
    out = model.model.layers[0](hidden, position_embeddings=position, attention_mask=None)
    position[0].mul_(2)
    with pytest.raises(InputChanged):
        out.sum().backward()


def test_layers_are_found_inside_a_module_of_the_users() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("llama")

    assert dc.apply(Wrapped()).names == tuple(f"inner.model.layers.{i}" for i in range(3))


@pytest.mark.parametrize(
    "glob", ["model.layers.*", "model.layers.*.self_attn", ["model.layers.1", "**.mlp"], "model", ""]
)
def test_a_glob_leaves_the_cache_out_as_well(glob: Any) -> None:
    expected = step(without_cache(build("llama")))
    model = build("llama")
    dc.apply(model, glob)
    assert same(step(model), expected)


def test_remove_gives_the_model_back_as_it_was() -> None:
    for name in NAMES:
        model = build(name)
        step(model)
        before = attributes(model)
        handle = dc.apply(model)
        assert model.is_activation_checkpointing
        assert attributes(model).keys() != before.keys()
        handle.remove()
        after = attributes(model)
        assert after.keys() == before.keys()
        assert all(after[key] is before[key] or after[key] == before[key] for key in before)
        assert not model.is_activation_checkpointing


def test_copies_and_pickles_carry_the_regions_and_can_take_them_off() -> None:
    model = without_cache(build("mixtral"))
    expected = step(without_cache(build("mixtral")))
    plain = attributes(model).keys()
    dc.apply(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)  # before its first step, after which transformers' own hooks do not pickle
    buffer.seek(0)
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        before = counters.regions
        assert same(step(copied), expected)
        assert counters.regions - before == LAYERS["mixtral"]
        regions(copied).remove()
        assert attributes(copied).keys() == plain
        assert not copied.is_activation_checkpointing
    assert model.is_activation_checkpointing


def test_a_kept_handle_does_not_keep_the_model() -> None:
    model = build("llama")
    handle = dc.apply(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    handle.remove()


def test_generation_uses_its_cache_and_is_what_it_was() -> None:
    model = build("llama").eval()
    prompt = batch()["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **options)
    dc.apply(model)
    assert torch.equal(model.generate(prompt, **options), expected)


def test_in_eval_mode_a_call_that_fills_a_cache_is_a_plain_one() -> None:
    model = build("llama").eval()
    with_cache, without = step(model), step(model, **batch(), use_cache=False)
    dc.apply(model)
    before = counters.regions
    assert same(step(model), with_cache)
    assert counters.regions == before
    assert same(step(model, **batch(), use_cache=False), without)
    assert counters.regions - before == LAYERS["llama"]


def decisions_of_both_runs(model: torch.nn.Module, pinned: bool) -> tuple[list[Any], list[Any]]:
    """What the experts are told in the forward and in the replays, when a replay's routers see other numbers."""
    told: tuple[list[Any], list[Any]] = ([], [])

    def disturb(router: torch.nn.Module, args: tuple[torch.Tensor]) -> Any:
        x = args[0]
        return (x + 0.5 * torch.sin(100 * x.detach()),) if dc.is_recomputing() else None

    def listen(experts: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        told[dc.is_recomputing()].append(args[1].tolist())

    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("Router"):
            module.register_forward_pre_hook(disturb)
            if not pinned:
                module._forward_hooks.clear()
        elif kind.endswith("SparseMoeBlock"):
            module.jitter_noise = 0.0  # it changes the routers' input in place, which `disturb` would hide
        elif kind.endswith("Experts"):
            module.register_forward_pre_hook(listen)
    model(**batch()).loss.backward()
    return told[0], told[1][::-1]  # replays run from the last layer to the first


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_router_decisions_are_pinned(name: str) -> None:
    # Nothing else would notice: transformers' grouped experts have the same shapes whoever gets which token.
    for pinned in (True, False):
        model = without_cache(build(name))
        dc.apply(model)
        recorded, replayed = decisions_of_both_runs(model, pinned)
        assert len(recorded) == len(replayed) == LAYERS[name]
        assert (recorded == replayed) == pinned


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_selective_replays_of_routers_are_exact(name: str) -> None:
    model = without_cache(build(name))
    expected = step(model)
    # Not topk: Mixtral changes its values in place, which is an error (DC121). What it reads is kept instead.
    kept = [torch.ops.aten.mm.default, torch.ops.aten._softmax.default]
    contexts = functools.partial(dc.create_selective_checkpoint_contexts, kept)
    dc.apply(model, context_fn=contexts, determinism_check="bitwise")
    assert same(step(model), expected)


def test_a_model_class_that_nobody_knows_is_refused_with_the_glob_to_give() -> None:
    class Block(torch.nn.Linear):
        pass

    class Mine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block(2, 2) for _ in range(2))

    with pytest.raises(UnknownModel, match=r"dc\.apply\(model, 'blocks\.\*'\)") as caught:
        dc.apply(Mine())
    assert caught.value.code == "DC601"


class OldModel(transformers.PreTrainedModel):
    config_class = transformers.LlamaConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.post_init()

    def _set_gradient_checkpointing(self, module: Any, value: bool = False) -> None:
        module.gradient_checkpointing = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_model_in_the_old_format_is_refused_and_takes_a_glob() -> None:
    model = OldModel(transformers.LlamaConfig())
    with pytest.raises(OldFormat, match="takes no function") as caught:
        dc.apply(model)
    assert caught.value.code == "DC602"
    assert not len(regions(model))
    assert len(dc.apply(model, "layers.*")) == 2


def test_a_model_whose_own_checkpointing_is_on_is_refused_and_left_alone() -> None:
    model = build("llama")
    model.activation_checkpointing_enable()
    before = attributes(model)
    with pytest.raises(AlreadyRegion, match="activation_checkpointing_disable"):
        dc.apply(model)
    assert attributes(model) == before
    model.activation_checkpointing_disable()
    dc.apply(model)


def test_switching_theirs_while_ours_is_on_is_an_error_that_changes_nothing() -> None:
    model = without_cache(build("llama"))
    expected = step(model)
    handle = dc.apply(model)
    with pytest.raises(BothSwitches, match="leave activation_checkpointing"):
        model.activation_checkpointing_enable()
    with pytest.raises(BothSwitches, match="remove"):
        model.activation_checkpointing_disable()
    assert same(step(model), expected)
    handle.remove()
    model.activation_checkpointing_enable()
    model.activation_checkpointing_disable()


def test_importing_distckpt_imports_none_of_the_libraries() -> None:
    code = (
        "import distckpt, distckpt.integrations, sys\n"
        "libraries = {'transformers', 'accelerate', 'peft', 'lightning', 'diffusers'}\n"
        "assert not libraries & set(sys.modules), libraries & set(sys.modules)"
    )
    done = run([sys.executable, "-c", code], limit=120)
    assert done.returncode == 0, done.stderr
