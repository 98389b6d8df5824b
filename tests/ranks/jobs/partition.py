"""Regions whose inputs are divided over the ranks: exact, counted, refused where they must be."""

from __future__ import annotations

import dataclasses
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import dropout

import distckpt as dc
from distckpt.engine.stats import counters
from distckpt.errors import BadPartition, GatherMismatch, InputChanged, InputsDiffer
from distckpt.ranks import partition as room
from distckpt.ranks.coordinator import Coordinator
from distckpt.ranks.partition import Counts, Partition
from tests.engine.exact import same_bits
from tests.ranks.spawn import leave, report

CASES: dict[str, Callable[[], Any]] = {}


def case(fn: Callable[[], Any]) -> Callable[[], Any]:
    CASES[fn.__name__] = fn
    return fn


def made(**options: Any) -> Partition:
    return Coordinator().partition(dist.group.WORLD, **{"min_bytes": 0, **options})


def leaf(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source).to(dtype).requires_grad_()


def block(x: torch.Tensor) -> torch.Tensor:
    return dropout(x.sin(), 0.5).exp().tanh()


def counts(p: Partition) -> dict[str, int]:
    return dataclasses.asdict(p.counts)


def both(program: Callable[[Any], Any], **options: Any) -> dict[str, Any]:
    """Run ``program`` plain and through partitioned regions; say whether all bits agree, and count."""
    p = made(**options)
    torch.manual_seed(0)
    plain = program(lambda fn, *a, **k: fn(*a, **k))
    torch.manual_seed(0)
    replays = counters.replays
    found = program(lambda fn, *a, **k: dc.checkpoint(partition=p)(fn)(*a, **k))
    return {
        "equal": all(map(same_bits, plain, found)) and len(plain) == len(found),
        "replays": counters.replays - replays,
        **counts(p),
    }


def refused(call: Callable[[], Any], error: type[BaseException]) -> str:
    try:
        call()
    except error as e:
        return str(e)
    return "nothing was raised"


def backward(y: torch.Tensor, *xs: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y.float().sum(), xs, **options)


@case
def chain() -> Any:
    """Four regions one after another, a megabyte each."""

    def program(region: Any) -> Any:
        x = leaf(1024, 256)
        y = x
        for _ in range(4):
            y = region(block, y)
        return [y, *backward(y, x)]

    return [both(program), both(program, prefetch=False)]


@case
def odd_sizes() -> Any:
    """Sizes that no number of ranks divides, one byte included."""
    found = []
    for shape in ((1,), (7,), (5, 13), (1001, 3)):

        def program(region: Any, shape: Any = shape) -> Any:
            x = leaf(*shape)
            y = region(block, x)
            return [y, *backward(y, x)]

        found.append(both(program))
    return found


@case
def dtypes() -> Any:
    """Every dtype comes back to the bit, also one that has no gradient."""
    found = {}
    for dtype in (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.complex128,
        torch.int64,
        torch.int8,
        torch.bool,
        torch.float8_e4m3fn,
    ):

        def program(region: Any, dtype: torch.dtype = dtype) -> Any:
            weight = leaf(7, 3)
            extra = (torch.arange(21).reshape(7, 3) % 5).to(dtype)
            if dtype.is_floating_point and dtype.itemsize > 1:
                extra[0, 0] = float("nan")
                extra[0, 1] = -0.0

            def fn(w: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
                e = torch.view_as_real(e).sum(-1) if e.is_complex() else e
                return (w * e.to(torch.float32)).sin().exp()

            y = region(fn, weight, extra)
            return [y, *backward(y, weight)]

        found[str(dtype)] = both(program)["equal"]
    return found


@case
def layouts() -> Any:
    """Strides, gaps and alignment are as they were when the replay runs."""
    base = leaf(12, 10, 4).detach()
    inputs = {
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(1, 2, 0),
        "channels last": leaf(2, 3, 4, 5).detach().to(memory_format=torch.channels_last),
        "slice with an offset": base[3:7],
        "slice with gaps": base[:, 1::3],
        "column": base[:, :, 1],
        "expanded": base[:1].expand(6, 10, 4),
        "expanded column": base[:, :1, 1:2].expand(12, 5, 7),
        "scalar": torch.tensor(3.5),
        "size one": base[2:3, 4:5],
    }
    found = {}
    for name, t in inputs.items():
        seen: list[Any] = []

        def fn(w: torch.Tensor, t: torch.Tensor, seen: list[Any] = seen) -> torch.Tensor:
            seen.append((tuple(t.shape), t.stride(), t.data_ptr() % 64, t.requires_grad, t.tolist()))
            return (w * t.sin().sum()).exp()

        p = made()
        w = leaf(3)
        backward(dc.checkpoint(fn, w, t, partition=p), w)
        found[name] = [seen[0] == seen[1], len(seen), p.counts.tensors]
    overlapping = torch.arange(10.0).as_strided((4, 4), (1, 1))
    p = made()
    w = leaf(3)
    backward(dc.checkpoint(lambda w, t: (w * t.sum()).exp(), w, overlapping, partition=p), w)
    found["overlapping is kept whole"] = p.counts.tensors  # w only
    return found


@case
def same_twice() -> Any:
    """A tensor passed several times is kept once, and is one object again in the replay."""
    seen = []

    def fn(a: torch.Tensor, b: Any, *, c: torch.Tensor) -> torch.Tensor:
        seen.append(a is b["x"][0] and c is a)
        return (a * b["x"][0]).sin() * c

    def program(region: Any) -> Any:
        x = leaf(40)
        y = region(fn, x, {"x": [x]}, c=x)
        return [y, *backward(y, x)]

    return [both(program), seen]


@case
def containers() -> Any:
    """Keywords, containers and partials are reached."""
    import functools

    def fn(scale: torch.Tensor, a: Any, *, key: Any) -> torch.Tensor:
        return (scale * a[0] * a[1]["t"]).sin() * key

    def program(region: Any) -> Any:
        xs = [leaf(30, seed=i) for i in range(4)]
        y = region(functools.partial(fn, xs[0]), (xs[1], {"t": xs[2]}), key=xs[3])
        return [y, *backward(y, *xs)]

    return both(program)


@case
def small_and_parameters() -> Any:
    """Small tensors, parameters and sharded tensors stay whole."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    sharded = distribute_tensor(torch.ones(12, 4), mesh, [Shard(0)])
    parameter = torch.nn.Parameter(torch.ones(100))
    p = Coordinator().partition(mesh["tp"], min_bytes=400)
    x = leaf(100)

    def fn(*ts: Any) -> torch.Tensor:
        total = ts[0].sin()
        for t in ts[1:]:
            t = t.to_local() if hasattr(t, "to_local") else t
            total = total + t.sum()
        return total.exp()

    y = dc.checkpoint(fn, x, leaf(99), parameter, sharded, partition=p)
    backward(y, x)
    return counts(p)


@case
def replicated() -> Any:
    """A DTensor that is whole on every rank is divided and is a DTensor again; so is a collective's late result."""
    from torch.distributed._functional_collectives import all_reduce
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    seen = []

    def fn(w: torch.Tensor, whole: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
        seen.append((type(whole).__name__, whole.requires_grad, late.requires_grad))
        return (w * whole.sin()).to_local().exp() * late.sin()

    def program(region: Any) -> Any:
        x, y = leaf(12, 5), leaf(12, 5, seed=2)
        w = distribute_tensor(torch.ones(12, 5), mesh, [Replicate()])
        whole = DTensor.from_local(x * y.sum(), mesh, [Replicate()])
        late = all_reduce(torch.ones(12, 5) * 0.25, "sum", dist.group.WORLD)
        out = region(fn, w, whole, late)
        return [out, *backward(out, x, y)]

    both_ways = both(program)
    sharded = distribute_tensor(torch.ones(12, 4), mesh, [Shard(0)])
    p = made()
    v = leaf(4)
    backward(dc.checkpoint(lambda v, s: v.sin() * s.to_local().sum(), v, sharded, partition=p), v)
    return [both_ways, seen, p.counts.tensors]


@case
def nested() -> Any:
    """A partitioned region in a partitioned region, and inside a plain one."""

    def program(region: Any) -> Any:
        def outer(x: torch.Tensor) -> torch.Tensor:
            return region(block, region(block, x.cos()).sin()).exp()

        x = leaf(64, 3)
        y = region(outer, region(outer, x))
        return [y, *backward(y, x)]

    return both(program)


@case
def retained() -> Any:
    """Two backwards through one graph: a gather each, and both exact."""

    def program(region: Any) -> Any:
        x = leaf(64)
        y = region(block, region(block, x))
        return [y, *backward(y, x, retain_graph=True), *backward(y, x)]

    return both(program)


@case
def partial_backward() -> Any:
    """A gather that no replay takes is dropped when the backward ends; the next one starts anew."""
    p = made()
    a, b = leaf(64), leaf(64, seed=2)
    left = dc.checkpoint(block, a, partition=p)
    right = dc.checkpoint(block, b, partition=p)
    found = [backward(right, b, retain_graph=True)[0]]
    first = counts(p)
    found += backward(left, a)
    torch.manual_seed(5)
    return [first, counts(p), len(found)]


@case
def session() -> Any:
    """Replays fired early gather one by one; nobody knows what comes next, so nothing runs ahead."""
    p = made()
    torch.manual_seed(0)
    x = leaf(64)
    with dc.session() as s:
        y = dc.checkpoint(block, dc.checkpoint(block, x, partition=p), partition=p)
    replayed = s.replay()
    found = backward(y, x)
    s.release()
    torch.manual_seed(0)
    z = block(block(x))
    return [replayed, same_bits(found[0], backward(z, x)[0]), counts(p)]


@case
def memory() -> Any:
    """The input itself is not kept alive by the region, and the gathered one not beyond its use."""
    p = made()
    x = leaf(4096)
    middle = x * 1.0
    seen = []

    def fn(t: torch.Tensor) -> torch.Tensor:
        seen.append(weakref.ref(t))
        return t.cos().exp()

    y = dc.checkpoint(fn, middle, partition=p)
    del middle
    gc.collect()
    freed = seen[0]() is None
    backward(y, x, retain_graph=True)
    gc.collect()
    return [freed, seen[1]() is None, counts(p)]


@case
def hooks() -> Any:
    """A user's saved-tensor hooks see the chunk instead of the input, and nothing is gathered ahead."""
    sizes: list[int] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.dtype is torch.uint8:
            sizes.append(t.numel())
        return t.clone()

    def program(region: Any) -> Any:
        x = leaf(64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = region(block, region(block, x))
        return [y, *backward(y, x)]

    return [both(program), sizes]


@case
def changed_in_place() -> Any:
    """A partitioned input that changes before the replay is refused, without a gather."""
    p = made()
    x = leaf(64)
    middle = x * 1.0
    y = dc.checkpoint(lambda t: t.cos().exp(), middle, partition=p)
    with torch.no_grad():
        middle.add_(1)
    return [refused(lambda: backward(y, x), InputChanged), counts(p)]


@case
def after_a_failure() -> Any:
    """A replay that fails half-way through its inputs leaves a region that can replay."""
    p = made()
    x = leaf(64)
    fails = [False]

    class Fussy(dict):
        def __setitem__(self, key: Any, value: Any) -> None:
            if isinstance(value, torch.Tensor) and fails[0]:
                raise ZeroDivisionError
            super().__setitem__(key, value)

    both_inputs = Fussy()
    dict.__setitem__(both_inputs, "t", leaf(8, seed=3))
    y = dc.checkpoint(lambda d, a: (a * d["t"].sum()).sin().exp(), both_inputs, x, partition=p)
    fails[0] = True
    message = refused(lambda: backward(y, x, retain_graph=True), ZeroDivisionError)
    fails[0] = False
    found = backward(y, x)[0]
    plain = backward((x * both_inputs["t"].sum()).sin().exp(), x)[0]
    return [message, same_bits(found, plain), counts(p)]


@case
def checks() -> Any:
    """What differs over the ranks is named on every rank; or left alone; or, where promised, not looked at."""
    rank = dist.get_rank()
    x, odd = leaf(64), leaf(64, seed=rank)
    found: dict[str, Any] = {}
    fn: Any = lambda a, b: (a * b).sin().exp()  # noqa: E731
    p = made()
    found["values"] = refused(lambda: dc.checkpoint(fn, x, odd, partition=p), InputsDiffer)
    found["again"] = refused(lambda: dc.checkpoint(fn, x, odd, partition=p), InputsDiffer)
    found["form"] = refused(lambda: dc.checkpoint(torch.sin, leaf(4 + rank), partition=p), InputsDiffer)
    found["number"] = refused(
        lambda: dc.checkpoint(lambda *ts: ts[0], *[x] * 1, *[leaf(8)] * rank, partition=p), InputsDiffer
    )
    found["none here"] = refused(
        lambda: dc.checkpoint(lambda *ts: ts[0], *[x] * rank, 1.0, partition=p), InputsDiffer
    )
    p = made(check="leave")
    torch.manual_seed(0)
    y = dc.checkpoint(fn, x, odd, partition=p)
    found["left alone"] = [
        all(map(same_bits, backward(y, x, odd), backward(fn(x, odd), x, odd))),
        counts(p),
    ]
    for check, expected in (("first", 2), ("always", 4), ("never", 0)):
        p = made(check=check)
        module = torch.nn.Linear(4, 4)
        for batch in (3, 3, 5, 3):  # two forms
            dc.checkpoint(module, leaf(batch, 4), partition=p)
        found[check] = [p.counts.checks, expected]
    return found


@case
def other_region() -> Any:
    """Ranks that replay different regions are told so, and do not compute with each other's inputs."""
    found = {}
    host = room._is_host
    for late in (False, True):
        room._is_host = lambda tags, late=late: not late  # as on a device, whose tags are read at the end
        p = made(prefetch=False)
        x = leaf(64)
        ys = [dc.checkpoint(block, x + i, partition=p) for i in range(2)]
        p.counts = Counts()  # yours to reset, on one rank or all
        found[str(late)] = refused(
            lambda ys=ys, x=x: backward(ys[min(1, dist.get_rank())], x), GatherMismatch
        )
    room._is_host = host
    return found


@case
def options() -> Any:
    """Bad options and groups."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "tp"))
    alone = dist.new_group([0])
    found = {
        "check": refused(lambda: made(check="sometimes"), BadPartition),
        "bytes": refused(lambda: made(min_bytes=-1), BadPartition),
        "mesh": refused(lambda: Coordinator().partition(mesh), BadPartition),
        "group": refused(lambda: Coordinator().partition("tp"), BadPartition),
        "pickle": refused(lambda: pickle.dumps(made()), BadPartition),
        "not in it": refused(lambda: Coordinator().partition(alone), BadPartition),
    }
    made_for_gpus = made()
    made_for_gpus.device_types = ("cuda",)
    found["device"] = refused(lambda: dc.checkpoint(block, leaf(4), partition=made_for_gpus), BadPartition)
    single = Coordinator().partition(mesh["dp"], min_bytes=0)
    x = leaf(8)
    backward(dc.checkpoint(block, x, partition=single), x)
    found["alone"] = counts(single)
    return found


@case
def module_regions() -> Any:
    """``dc.apply`` takes the option, and a copied model keeps it."""
    import copy

    p = made()
    model = torch.nn.Sequential(
        *(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(3))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(leaf(*parameter.shape))
    x = leaf(4, 8)
    plain = backward(model(x), x, *model.parameters())
    dc.apply(model, "*", partition=p)
    twin = copy.deepcopy(model)
    return [
        all(map(same_bits, plain, backward(model(x), x, *model.parameters()))),
        all(map(same_bits, plain, backward(twin(x), x, *twin.parameters()))),
        counts(p),
    ]


def main() -> None:
    warnings.simplefilter("error")
    dist.init_process_group("gloo")
    names = ["chain", "odd_sizes", "layouts", "checks"] if dist.get_world_size() == 3 else list(CASES)
    report({name: CASES[name]() for name in names})
    leave()


if __name__ == "__main__":
    main()
