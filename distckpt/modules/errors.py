"""Errors of ``dc.apply`` (DC3xx)."""

from __future__ import annotations

from distckpt_backends.errors import DistckptError


class NoMatch(DistckptError, LookupError):
    """A glob names no module of the model."""

    code = "DC301"


class AlreadyRegion(DistckptError, ValueError):
    """A module that is to become a region is one already."""

    code = "DC302"


class NeverCalled(DistckptError, ValueError):
    """A glob names only modules without a forward, which would never open their region."""

    code = "DC303"


class ModuleGone(DistckptError, ReferenceError):
    """A region was called after the module it belongs to was deleted."""

    code = "DC304"


class NotAModel(DistckptError, TypeError):
    """``dc.apply`` was given something else than a model first."""

    code = "DC305"


class BadChoice(DistckptError, TypeError):
    """``dc.apply`` was told which modules in a form that it does not know."""

    code = "DC306"


class Rebound(DistckptError, TypeError):
    """The function inside a region's bound method was bound to something else."""

    code = "DC604"


class UnknownModel(DistckptError, LookupError):
    """``dc.apply`` was given no glob, and no library knows the layers of this model."""

    code = "DC601"
