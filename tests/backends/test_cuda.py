"""CUDA on a real GPU: graphs, no synchronisation, and no context from asking."""

from __future__ import annotations

import distckpt_backends
import pytest
import torch
from distckpt_backends.errors import GraphCaptureError
from distckpt_backends.generator import GeneratorBackend

GPU = torch.device("cuda", 0)


@pytest.fixture
def cuda() -> distckpt_backends.Backend:
    backend = distckpt_backends.get("cuda")
    reason = backend.why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    torch.empty(1, device=GPU)
    return backend


def test_the_backend_says_why_there_is_no_gpu() -> None:
    backend = distckpt_backends.get("cuda")
    assert isinstance(backend, GeneratorBackend)
    if torch.cuda.is_available():
        assert backend.why_unavailable() is None
    else:
        assert backend.why_unavailable()
        assert backend.device_count() == 0
        assert backend.live_devices() == ()
        assert not backend.is_capturing(GPU)


@pytest.mark.cuda
def test_a_state_inside_a_graph_is_exact_or_refused_with_a_code(cuda: distckpt_backends.Backend) -> None:
    a, b = torch.empty(64, device=GPU), torch.empty(64, device=GPU)
    refused = False
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert cuda.is_capturing(GPU)
        state = cuda.rng_stash(GPU)
        a.uniform_()
        try:
            assert cuda.rng_moved(GPU, state)
            cuda.rng_restore(GPU, state)
            b.uniform_()
        except GraphCaptureError:
            refused = True
    if refused:
        assert torch.__version__ < "2.13"
        pytest.skip(
            f"torch {torch.__version__} refuses generator states during capture, and the error says so"
        )
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(a, b)


@pytest.mark.cuda
def test_reading_the_state_waits_for_no_kernel(cuda: distckpt_backends.Backend) -> None:
    x = torch.randn(4096, 4096, device=GPU)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    for _ in range(50):
        x = x @ x * 1e-3
    done.record()
    state = cuda.rng_stash(GPU)
    cuda.rng_moved(GPU, state)
    cuda.rng_restore(GPU, state)
    assert not done.query(), "the queue was empty when the state had been read"
    torch.cuda.synchronize()


@pytest.mark.cuda
def test_memory_is_counted_with_its_peak(cuda: distckpt_backends.Backend) -> None:
    cuda.reset_peak(GPU)
    before = cuda.memory(GPU)
    kept = torch.empty(1 << 20, dtype=torch.uint8, device=GPU)
    after = cuda.memory(GPU)
    assert before is not None
    assert after is not None
    assert after.allocated - before.allocated == kept.numel()
    assert after.peak_allocated is not None
    assert after.peak_allocated >= after.allocated
