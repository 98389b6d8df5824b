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
