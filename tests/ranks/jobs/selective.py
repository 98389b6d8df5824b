"""Selective regions around collectives, with every kind of policy, on two ranks: gradients against a plain run."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

import distckpt as dc
from tests.ranks.spawn import leave, report

Fn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def all_reduce(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = (x @ w).detach().clone()
    dist.all_reduce(h)
    return (x * h).sin().exp()


def all_to_all_base(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    out = torch.empty(4, 4)
    dist.all_to_all_single(out, (x @ w).detach())
    return (x * out).sin().exp()


def all_to_all_lists(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    out = [torch.empty(2, 4), torch.empty(2, 4)]
    dist.all_to_all(out, list((x @ w).detach().chunk(2)))
    return (x * torch.cat(out)).sin().exp()


def all_gather(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x @ w  # only read: what is kept of it must not count as changed
    out = [torch.empty(4, 4), torch.empty(4, 4)]
    dist.all_gather(out, h.detach())
    return (h * out[1 - dist.get_rank()]).sin().exp()


def all_gather_base(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    out = torch.empty(8, 4)
    dist.all_gather_into_tensor(out, (x @ w).detach())
    return (x * out[:4]).sin() * out[4:].exp() * x


def broadcast(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = (x @ w).detach().clone()
    dist.broadcast(h, 0)
    dist.barrier()
    return (x * h).sin().exp()


def point_to_point(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    rank, out = dist.get_rank(), torch.empty(4, 4)
    ops = [dist.P2POp(dist.isend, (x @ w).detach(), 1 - rank), dist.P2POp(dist.irecv, out, 1 - rank)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return (x * out).sin().exp()


def asynchronous(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = (x @ w).detach().clone()
    work = dist.all_reduce(h, async_op=True)
    y = x.cos()
    assert work is not None
    work.wait()
    return (y * h).sin().exp()


def functional(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = funcol.all_reduce((x @ w).detach(), "sum", dist.group.WORLD)
    return (x * h).sin().exp()


def functional_exchange(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = funcol.all_to_all_single_autograd(x @ w, [2, 2], [2, 2], dist.group.WORLD)
    return (h * 2.0).sin().exp()


def functional_gather(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = funcol.all_gather_tensor_autograd(x @ w, 0, dist.group.WORLD)
    return (h.sin() * h).exp().sum(0)


PROGRAMS: list[Fn] = [
    all_reduce,
    all_to_all_base,
    all_to_all_lists,
    all_gather,
    all_gather_base,
    broadcast,
    point_to_point,
    asynchronous,
    functional,
    functional_exchange,
    functional_gather,
]


def _space(op: Any) -> str:
    return getattr(op, "namespace", "")


POLICIES: dict[str, Callable[..., bool]] = {
    "c10d": lambda ctx, op, *args, **kwargs: _space(op) == "c10d",
    "functional": lambda ctx, op, *args, **kwargs: _space(op) == "_c10d_functional" and "wait" not in str(op),
    "waits": lambda ctx, op, *args, **kwargs: "wait_tensor" in str(op),
    "collectives and products": lambda ctx, op, *args, **kwargs: "c10d" in _space(op) or "mm" in str(op),
}


def gradients(fn: Fn, call: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
    rank = dist.get_rank()
    x = torch.linspace(-1.0, 1.0, 16).view(4, 4).add(0.1 * rank).requires_grad_()
    w = torch.linspace(0.5, -0.5, 16).view(4, 4).requires_grad_()
    return torch.autograd.grad(call(fn, x, w).sum(), (x, w), allow_unused=True)


def main() -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    flavours = {"dc": dc.checkpoint, "compat": functools.partial(dc.compat.checkpoint, use_reentrant=False)}
    found: dict[str, Any] = {}
    for fn in PROGRAMS:
        want = gradients(fn, lambda fn, *args: fn(*args))
        for name, policy in POLICIES.items():
            for flavour, checkpoint in flavours.items():
                for hooks in (False, True) if flavour == "dc" else (False,):
                    context_fn = functools.partial(dc.create_selective_checkpoint_contexts, policy)

                    def call(
                        fn: Fn,
                        *args: Any,
                        checkpoint: Any = checkpoint,
                        make: Any = context_fn,
                        hooks: bool = hooks,
                    ) -> torch.Tensor:
                        if not hooks:
                            return checkpoint(fn, *args, context_fn=make)
                        with torch.autograd.graph.saved_tensors_hooks(
                            torch.clone, lambda t: t
                        ):  # as save_on_cpu
                            return checkpoint(fn, *args, context_fn=make)

                    got = gradients(fn, call)
                    same = all(
                        a is b or (a is not None and b is not None and torch.equal(a, b))
                        for a, b in zip(want, got, strict=True)
                    )
                    found[f"{fn.__name__}, {name}, {flavour}{', hooks' if hooks else ''}"] = same
    report(found)
    leave()


if __name__ == "__main__":
    main()
