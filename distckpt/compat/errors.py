"""Errors of the torch-shaped surface beyond torch's own."""

from __future__ import annotations

from distckpt_backends.errors import DistckptError


class TorchAnswers(DistckptError):
    """Torch's own engine still answers after an installation, which was taken back."""

    code = "DC209"
