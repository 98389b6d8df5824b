"""Every code block of docs/integrations.md runs, against the real library, and trains to the bits of a plain run."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import distckpt as dc
from distckpt.engine.stats import counters
from tests.integrations.models import THEIR_WARNINGS, VOCABULARY, batch, build, same, without_cache

pytestmark = [pytest.mark.filterwarnings(text) for text in THEIR_WARNINGS]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"


def blocks() -> dict[str, str]:
    """The python blocks by their heading; a second one under the same heading has ``, 2`` after it."""
    found: dict[str, str] = {}
    for part in re.split(r"^##+ ", PAGE.read_text(), flags=re.M)[1:]:
        heading = part.splitlines()[0]
        for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", part, re.M | re.S)):
            found[heading if i == 0 else f"{heading}, {i + 1}"] = block
    return found


def run(name: str, **namespace: Any) -> dict[str, Any]:
    names = {"dc": dc, "torch": torch, "__name__": "recipe", **namespace}
    exec(compile(blocks()[name], f"{PAGE.name}: {name}", "exec"), names)
    return names


def gradients(model: Any, loss_of: Callable[[Any], torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    """The loss and every gradient of one step from fixed seeds, and how many regions ran."""
    before = counters.regions
    torch.manual_seed(5)
    loss = loss_of(model)
    torch.manual_seed(9)
    loss.backward()
    named = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    return {
        "loss": loss.detach(),
        **{k: g for k, g in named.items() if g is not None},
    }, counters.regions - before


def llama() -> Any:
    pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    return without_cache(build("llama"))


def optimizer_of(model: Any) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def loss_of(model: Any) -> torch.Tensor:
    return model(**batch()).loss


def transformers() -> tuple[Any, Any, Any]:
    model = llama()
    run("transformers", model=model)
    return llama(), model, loss_of


def hook() -> tuple[Any, Any, Any]:
    model = llama()
    run("Their own hook", model=model)
    return llama(), model, loss_of


def trainer() -> None:
    pytest.importorskip("accelerate", reason="the extra 'hf' is not installed")
    from tests.integrations.test_trainer import DATA, trainer

    model = llama()
    arguments = trainer(llama(), Path(), activation_checkpointing=True).args
    before = counters.regions
    run("Trainer", model=model, arguments=arguments, data=DATA)
    assert counters.regions > before
    return None


def plugin() -> tuple[Any, Any, Any]:
    pytest.importorskip("accelerate", reason="the extra 'hf' is not installed")
    model = llama()
    with one_process():
        found = run("accelerate")
        found["plugin"].transformer_cls_names_to_wrap = ["LlamaDecoderLayer"]
        found["plugin"].set_auto_wrap_policy(
            model
        )  # prepare() itself shards on two ranks, in test_accelerate.py
    return llama(), model, loss_of


def prepare() -> tuple[Any, Any, Any]:
    accelerate = pytest.importorskip("accelerate", reason="the extra 'hf' is not installed")
    model = llama()
    with one_process():
        found = run(
            "accelerate, 2",
            model=model,
            accelerator=accelerate.Accelerator(cpu=True),
            optimizer=optimizer_of(model),
        )
    return llama(), found["model"], loss_of


def peft() -> tuple[Any, Any, Any]:
    peft = pytest.importorskip("peft", reason="the extra 'integrations' is not installed")
    torch.manual_seed(1)
    model = run("peft", model=llama())["model"].train()
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(llama(), config).train(), model, loss_of


def lightning() -> tuple[Any, Any, Any]:
    pytest.importorskip("lightning", reason="the extra 'integrations' is not installed")
    module = run("Lightning")["Module"](llama())
    module.configure_model()
    return llama(), module.model, lambda model: model(**batch()).loss


def fabric() -> tuple[Any, Any, Any]:
    pytest.importorskip("lightning", reason="the extra 'integrations' is not installed")
    from lightning.fabric import Fabric

    model = llama()
    fabric = Fabric(accelerator="cpu", devices=1)
    found = run("Lightning, 2", model=model, fabric=fabric, optimizer=optimizer_of(model))
    assert found["model"] is not model
    return llama(), model, loss_of


def diffusers() -> tuple[Any, Any, Any]:
    diffusers = pytest.importorskip("diffusers", reason="the extra 'integrations' is not installed")

    def unet() -> Any:
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
            dropout=0.3,
        ).train()

    model, x = unet(), torch.randn(2, 3, 8, 8)
    run("diffusers", model=model)
    return unet(), model, lambda model: model(x, 7).sample.square().mean()


def torchtune() -> tuple[Any, Any, Any]:
    with quiet():
        pytest.importorskip(
            "torchtune.training", reason="torchtune is not part of any extra", exc_type=ImportError
        )
        from torchtune.models.llama3 import llama3  # type: ignore

        def model() -> Any:
            torch.manual_seed(0)
            sizes = {"num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 32}
            return llama3(vocab_size=VOCABULARY, attn_dropout=0.3, **sizes).train()

        ours = model()
        run("torchtune", model=ours)
    return model(), ours, lambda model: model(batch()["input_ids"]).float().square().mean()


class Blocks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = (8, 2, 16, 0.3)
        self.layers = torch.nn.ModuleDict(
            {str(i): torch.nn.TransformerEncoderLayer(*layer) for i in range(3)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def torchtitan() -> tuple[Any, Any, Any]:
    with quiet():
        pytest.importorskip(
            "torchtitan.distributed.activation_checkpoint",
            reason="torchtitan is not part of any extra",
            exc_type=ImportError,
        )
        model, x = Blocks(), torch.randn(5, 2, 8)
        kind = run("torchtitan")["DistckptAC"]
        kind(kind.Config()).apply(model)
    return Blocks(), model, lambda model: model(x).square().mean()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """For the imports of what is not part of `make test`, where nobody keeps the list of warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """accelerate keeps its state for the process, and sets the environment for its children: neither may leak."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import patch_environment

    AcceleratorState._reset_state(reset_partial_state=True)
    with patch_environment(ACCELERATE_USE_FSDP="false", FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def library() -> None:
    with pytest.MonkeyPatch.context() as patch:
        room = sys.modules["distckpt.modules.apply"]  # `distckpt.modules.apply` is the function
        patch.setattr(room, "_libraries", {})
        run("A library of your own")
        assert room._libraries == {"my_models": "my_models.distckpt_support"}
    return None


RECIPES: dict[str, Callable[[], Any]] = {
    "transformers": transformers,
    "Their own hook": hook,
    "Trainer": trainer,
    "accelerate": plugin,
    "accelerate, 2": prepare,
    "peft": peft,
    "Lightning": lightning,
    "Lightning, 2": fabric,
    "diffusers": diffusers,
    "torchtune": torchtune,
    "torchtitan": torchtitan,
    "A library of your own": library,
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_of_this_page_is_exact(name: str) -> None:
    outcome = RECIPES[name]()
    if outcome is None:  # looked at by itself
        return
    plain, ours, loss = outcome
    keys = list(plain.state_dict())
    expected, none = gradients(plain, loss)
    got, opened = gradients(ours, loss)
    assert none == 0
    assert opened >= 3
    assert same(got, expected)
    assert list(ours.state_dict()) == keys


def test_every_block_of_the_page_is_run() -> None:
    assert set(blocks()) == set(RECIPES)


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    defined = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert named
    assert named <= defined
