"""Hypothesis strategies that draw programs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from . import program as p

UNARY = (
    "sin",
    "cos",
    "tanh",
    "sigmoid",
    "gelu",
    "relu",
    "softmax",
    "square",
    "halve",
    "exp",
    "detach",
    "pin",
)
BINARY = ("add", "sub", "mul", "mm", "where", "same")
DRAWS = ("dropout", "dropout", "noise", "rrelu", "bernoulli", "reseed", "fork", "put back")
LIBRARY = ("gru", "script")
UNSAFE = ("matmul", "view", "chunk", "split")
CAUGHT = ("mm", "view", "index", "late")
VIEWS = ("t", "view", "narrow", "expand", "chunk", "select", "flip")
IN_PLACE = ("mul_", "add_", "relu_", "tanh_", "copy_", "dropout_", "row_")
SELECTIVE = (
    "list: mm",
    "list: sin, mm, addmm",
    "list: draws",
    "list: nothing",
    "policy: alternate",
    "policy: prefer",
)
HOW = ("arg", "arg", "kwarg", "list", "partial", "box", "closure", "cell", "global")
FORMS = ("function", "module", "decorator", "apply", "loop", "functional")
FINISH = (
    "backward",
    "backward",
    "backward twice",
    "subset then backward",
    "each leaf",
    "inputs",
    "outputs one by one",
    "double backward",
    "session",
    "threads",
    "drop",
)
HOOKS = ("hooks", "identity hooks", "fresh hooks")

_index = st.integers(0, 7)


def _leaf_steps(in_place: st.SearchStrategy[bool], draws: tuple[str, ...]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.builds(p.Unary, st.sampled_from(UNARY), _index),
        st.builds(p.Binary, st.sampled_from(BINARY), _index, _index),
        st.builds(p.Linear, _index, st.integers(0, 1)),
        st.builds(p.Draw, st.sampled_from(draws), _index),
        st.one_of(
            st.builds(p.Library, st.sampled_from(LIBRARY), _index),
            st.builds(p.Unsafe, st.sampled_from(UNSAFE), _index, st.integers(0, 1)),
            st.builds(p.Caught, st.sampled_from(CAUGHT), _index),
        ),
        st.builds(p.View, st.sampled_from(VIEWS), _index),
        st.builds(p.InPlace, st.sampled_from(IN_PLACE), _index, in_place),
        st.builds(p.Custom, _index, st.sampled_from((1, 2))),
        st.builds(p.GradHook, _index),
        st.builds(p.BatchNorm, _index),
    )


# the reentrant forward runs without a graph, where changing a value itself means something else than in its
# replay; and its node takes no keyword, so it is handed no generator
_LEAF = {False: _leaf_steps(st.booleans(), (*DRAWS, "generator")), True: _leaf_steps(st.just(True), DRAWS)}
_CONTEXT = st.sampled_from(("autocast", "no autocast", "no_grad", *HOOKS))


def _options(reentrant: bool) -> st.SearchStrategy[p.Options]:
    if reentrant:
        return st.builds(p.Options, reentrant=st.just(True))
    return st.builds(
        p.Options,
        early_stop=st.booleans(),
        preserve_rng=st.just(True),
        determinism=st.sampled_from(("default", "default", "none", "fingerprint", "bitwise")),
        selective=st.one_of(st.none(), st.none(), st.sampled_from(SELECTIVE)),
        reentrant=st.just(False),
        debug=st.sampled_from((False,) * 15 + (True,)),
    )


@st.composite
def _steps(draw: st.DrawFn, depth: int, reentrant: bool, least: int, most: int) -> tuple[p.Step, ...]:
    choices: list[st.SearchStrategy[Any]] = [_LEAF[reentrant]] * 4
    if depth > 0:
        choices.append(st.builds(p.Within, _CONTEXT, _steps(depth - 1, reentrant, 1, 3)))
        choices.append(regions(depth - 1, reentrant))
        if not reentrant:
            inner = st.builds(
                p.InnerGrad,
                _index,
                _steps(min(depth - 1, 1), False, 1, 3),
                st.booleans(),
                st.booleans(),
                st.booleans(),
            )
            choices.append(inner)
    return tuple(draw(st.lists(st.one_of(choices), min_size=least, max_size=most)))


@st.composite
def regions(draw: st.DrawFn, depth: int, reentrant: bool) -> p.Region:
    """Draw one region whose body nests at most ``depth`` deep."""
    # inside a non-reentrant program a reentrant region has no legal reference, so a program is of one mode
    options = draw(_options(reentrant))
    body = draw(_steps(depth, reentrant, 1, 5))
    if not p.draws_random(body) and draw(st.booleans()):
        options = replace(options, preserve_rng=False)
    how = st.just("arg") if reentrant else st.sampled_from(HOW)
    inputs = tuple(draw(st.lists(st.tuples(_index, how), min_size=1, max_size=3)))
    output = draw(st.sampled_from(("tensor", "tuple") if reentrant else ("tensor", "tuple", "dict", "input")))
    form = draw(st.sampled_from(("function", "module") if reentrant else FORMS))
    return p.Region(body, inputs, output, form, options, rebound=draw(st.booleans()))


@st.composite
def gradients_in_selective(draw: st.DrawFn) -> p.Region:
    """Draw a selective region around a region that takes a gradient, which is where most was found."""

    def some(most: int) -> tuple[p.Step, ...]:
        return draw(_steps(1, False, 0, most))

    rrelu = st.builds(p.Draw, st.just("rrelu"), _index)
    last = draw(st.one_of(rrelu, _LEAF[False], regions(1, False)))
    grad = p.InnerGrad(
        draw(_index), (*some(2), last), draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    )
    inner = draw(regions(0, False))
    inner = replace(inner, body=(*some(2), grad, *some(2)), options=replace(inner.options, preserve_rng=True))
    outer = draw(regions(0, False))
    kept = draw(st.sampled_from(SELECTIVE))
    options = replace(outer.options, preserve_rng=True, selective=kept)
    return replace(outer, body=(*some(2), inner, *some(2)), options=options)


@st.composite
def programs(draw: st.DrawFn, depth: int = 3) -> p.Program:
    """Draw a program with at least one region."""
    reentrant = draw(st.sampled_from((False,) * 6 + (True,)))
    before = draw(_steps(0, reentrant, 0, 2))
    kinds = [regions(depth - 1, reentrant)] * 3
    first = draw(st.one_of(kinds if reentrant else [*kinds, gradients_in_selective()]))
    after = draw(_steps(1, reentrant, 0, 3))
    second = draw(st.one_of(st.just(()), st.tuples(regions(1, reentrant))))
    wrap = draw(st.sampled_from((None, None, None, None, "autocast", *HOOKS)))
    body: tuple[p.Step, ...] = (*before, first, *after, *second)
    if wrap is not None:
        body = (p.Within(wrap, body),)
    return p.Program(
        body=body,
        finish=draw(st.sampled_from(("backward", "backward twice") if reentrant else FINISH)),
        subset=draw(st.integers(0, 63)),
        passes=draw(st.sampled_from((1, 1, 2))),
        backward_in_order=draw(st.booleans()),
        second_requires_grad=draw(st.booleans()),
        double=draw(st.sampled_from((False, False, True))),
        seed=draw(st.integers(0, 3)),
    )
