"""CUDA and ROCm (which torch also calls "cuda")."""

from __future__ import annotations

import torch

from .generator import GeneratorBackend


class CudaBackend(GeneratorBackend):
    """One Philox generator per GPU; `torch.cuda.default_generators` is empty until the first CUDA call, so
    asking whether it is live touches no driver."""

    def __init__(self) -> None:
        super().__init__("cuda", torch.cuda)

    def why_unavailable(self) -> str | None:
        if not torch.backends.cuda.is_built():
            return "this torch was built without CUDA and ROCm"
        return super().why_unavailable()

    def is_initialized(self) -> bool:
        # asked per region: without a context there are no generators, and nothing else needs to be called
        return bool(torch.cuda.default_generators) and torch.cuda.is_initialized()
