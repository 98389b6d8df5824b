"""What people write by mistake, or as they write it elsewhere: it works, or one coded sentence says what to write."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import distckpt as dc
from distckpt.engine import diagnose
from distckpt.engine.stats import counters


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).sin())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.heads = nn.ModuleDict({"k": Block()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.heads["k"](x)


ALL = ("layers.0", "layers.1", "layers.2", "heads.k")
LAYERS = ALL[:3]


def work(x: torch.Tensor) -> torch.Tensor:
    return x.sin().exp()


def takes_any(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return x.sin()


def generator(x: torch.Tensor) -> Any:
    yield x.sin()


async def coroutine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


async def stream(x: torch.Tensor) -> Any:
    yield x.sin()


def leaf() -> torch.Tensor:
    return torch.linspace(0.1, 1.0, 3).requires_grad_()


def refused(call: Callable[[], Any], code: str, *words: str) -> None:
    with pytest.raises(dc.DistckptError) as caught:
        call()
    assert caught.value.code == code
    assert caught.value.fix
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (lambda m: Block, ALL),
        (lambda m: (Block, "layers.0.a"), ("layers.0", "layers.0.a", *ALL[1:])),
        (lambda m: m.layers, LAYERS),
        (lambda m: m.heads, ("heads.k",)),
        (lambda m: [m.layers, "heads.*"], ALL),
        (lambda m: list(m.layers)[1:], LAYERS[1:]),
        (lambda m: m.layers[1], ("layers.1",)),
        (lambda m: lambda module: isinstance(module, Block), ALL),
        (lambda m: lambda name, module: name.endswith(".1"), ("layers.1",)),
        (lambda m: functools.partial(lambda name, module, end: name.endswith(end), end="1"), ("layers.1",)),
        (lambda m: ("layers.*", "heads.*"), ALL),
        (lambda m: {"layers.2"}, ("layers.2",)),
        (lambda m: (name for name in ["layers.2"]), ("layers.2",)),
    ],
    ids=[
        *("class", "classes", "list", "dict", "mixed", "slice", "module"),
        *("predicate", "named-predicate", "partial", "tuple", "set", "generator"),
    ],
)
def test_modules_are_chosen_in_every_form_that_people_write(choice: Any, names: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, x = Model(), leaf()
    want = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    with dc.apply(model, choice(model), use_reentrant=False) as applied:
        assert applied.names == names
        before = counters.regions
        got = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
        assert counters.regions - before >= len(names)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def wrap_policy(module: nn.Module, recurse: bool) -> bool:
    return True


@pytest.mark.parametrize(
    ("choice", "code"),
    [
        ([], "DC301"),
        ((), "DC301"),
        (nn.ModuleList(), "DC301"),
        (nn.Conv2d, "DC301"),
        (nn.Linear(3, 3), "DC301"),
        (lambda module: False, "DC301"),
        (nn.ModuleList, "DC303"),
        (3, "DC306"),
        ([3], "DC306"),
        (b"layers.*", "DC306"),
        (int, "DC306"),
        ({"layers.*": "save"}, "DC306"),
        (torch.ones(3), "DC306"),
        (lambda a, b, c: True, "DC306"),
        (wrap_policy, "DC306"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_choice_of_nothing_or_in_no_known_form_is_refused_and_changes_nothing(
    choice: Any, code: str
) -> None:
    model = Model()
    refused(lambda: dc.apply(model, choice), code)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_model_comes_first() -> None:
    model: Any = Model()
    refused(
        lambda: dc.apply("layers.*", model), "DC305", "the model comes first", 'dc.apply(model, "layers.*")'
    )
    refused(lambda: dc.apply(Block, "layers.*"), "DC305")  # type: ignore[arg-type]


def test_apply_says_which_option_was_meant() -> None:
    model: Any = Model()
    refused(lambda: dc.apply(model, Block, preserve_rng=False), "DC109", "did you mean preserve_rng_state?")
    refused(lambda: dc.apply(model, Block, use_reentrent=False), "DC109", "did you mean use_reentrant?")
    refused(lambda: dc.apply(model, Block, use_reentrant=True), "DC109", "never a reentrant region")


@pytest.mark.parametrize("given", [{}, {"debug": True}], ids=["plain", "with an option"])
def test_what_is_no_function_is_refused_with_what_to_write(given: Any) -> None:
    x: Any = leaf()
    refused(lambda: dc.checkpoint(None, x, **given), "DC136", "dc.checkpoint(fn, x, key=value)")
    refused(lambda: dc.checkpoint(work(x), **given), "DC136", "dc.checkpoint(model, x)")
    refused(lambda: dc.checkpoint(x, work, **given), "DC136", "the function comes first")
    refused(lambda: dc.checkpoint([work, work], x, **given), "DC136", "checkpoint_sequential")


def test_a_function_alone_runs_at_once_as_in_torch() -> None:
    x = leaf()
    before = counters.regions
    out = dc.checkpoint(lambda: work(x))
    assert counters.regions == before + 1
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(work(x).sum(), x)[0])


def test_a_decorator_without_brackets_is_told_about_them() -> None:
    for fn in (work, Block(), Block.forward, functools.partial(torch.add, other=1)):
        if isinstance(fn, functools.partial):
            with pytest.raises(TypeError):  # a builtin: no signature to look at, so torch's own words
                dc.checkpoint(fn)
        else:
            refused(lambda fn=fn: dc.checkpoint(fn), "DC137", "@dc.checkpoint()")


def test_a_type_error_of_the_function_itself_passes_as_it_is() -> None:
    def fails() -> None:
        raise TypeError("mine")

    for call in (
        lambda: dc.checkpoint(fails),
        lambda: dc.checkpoint(work, leaf(), 3),
        lambda: dc.checkpoint(work, y=0),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        assert not isinstance(caught.value, dc.DistckptError)


@pytest.mark.parametrize("name", ["preserve_rng", "use_reentrent", "determinism_chek", "contxt_fn"])
def test_a_near_miss_of_an_option_gets_a_did_you_mean(name: str) -> None:
    refused(lambda: dc.checkpoint(work, leaf(), **{name: False}), "DC109", "did you mean")
    refused(lambda: dc.checkpoint(**{name: False}), "DC109", "did you mean")
    refused(lambda: dc.checkpoint_sequential([work], 1, leaf(), **{name: False}), "DC109", "did you mean")


def test_a_name_of_the_functions_own_is_no_near_miss() -> None:
    def early(x: torch.Tensor, early_stops: int = 0) -> torch.Tensor:
        return x.sin() * early_stops

    with pytest.raises(TypeError, match="early_stopss"):
        dc.checkpoint(early, leaf(), early_stopss=1)
    dc.checkpoint(early, leaf(), early_stops=1)


def test_a_near_miss_that_the_function_would_swallow_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="did you mean the option use_reentrant=") as caught:
        dc.checkpoint(takes_any, leaf(), use_reentrent=False)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="early_stop="):
        dc.checkpoint(takes_any, leaf(), early_stopp=False, debug=False)


def test_names_that_are_short_or_far_or_taken_do_not_warn() -> None:
    def takes(x: torch.Tensor, use_reentrants: int, **kwargs: Any) -> torch.Tensor:
        return x.sin()

    @functools.wraps(takes)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return takes(*args, **kwargs)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dc.checkpoint(
            takes_any, leaf(), names=1, debugg=1, preserve_rng=1, attention_mask=None, position_ids=None
        )
        dc.checkpoint(takes, leaf(), use_reentrants=1)
        dc.checkpoint(wrapped, leaf(), use_reentrants=1)


def test_edits_are_counted_letter_by_letter() -> None:
    assert [
        diagnose._edits("early_stop", other) for other in ("early_stop", "erly_stop", "early_stp_", "x")
    ] == [
        0,
        1,
        2,
        10,
    ]


@pytest.mark.parametrize("fn", [generator, coroutine, stream], ids=lambda fn: fn.__name__)
def test_a_generator_or_coroutine_function_is_refused(fn: Any) -> None:
    refused(lambda: dc.checkpoint(fn, leaf()), "DC138", fn.__name__)
    refused(lambda: dc.checkpoint(fn, leaf(), early_stop=False), "DC138")
    refused(lambda: dc.checkpoint()(fn), "DC138")
    module = nn.Module()
    module.forward = lambda x: fn(x)  # type: ignore[method-assign]
    with dc.apply(module, ""):
        refused(lambda: module(leaf()), "DC138")
    x = leaf()  # and the next region is not disturbed
    out = dc.checkpoint(work, x)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(work(x).sum(), x)[0])


@pytest.mark.parametrize("segments", ["2", 2.0, None, True])
def test_segments_are_a_whole_number(segments: Any) -> None:
    refused(lambda: dc.checkpoint_sequential([work, work], segments, leaf()), "DC109", "whole number")


def test_a_sequence_is_what_checkpoint_sequential_runs() -> None:
    refused(lambda: dc.checkpoint_sequential(work, 1, leaf()), "DC136", "dc.checkpoint(fn, x)")


def test_options_of_the_wrong_type_say_what_to_write() -> None:
    wrong: list[dict[str, Any]] = [{"name": 3}, {"context_fn": 3}, {"debug": "yes"}]
    for options in wrong:
        refused(lambda options=options: dc.checkpoint(work, leaf(), **options), "DC109", "fix:")
