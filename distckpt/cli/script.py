"""Running a script as ``python SCRIPT`` would, in this process: its ``__main__``, ``sys.argv`` and ``sys.path[0]``."""

from __future__ import annotations

import builtins
import importlib.machinery
import importlib.util
import os
import runpy
import sys
import types
import zipimport
from collections.abc import Callable, Sequence
from typing import Any

from distckpt.errors import NoScript


def script(path: str, arguments: Sequence[str]) -> Callable[[], None]:
    """What runs the file ``path`` (or a folder or archive with a ``__main__.py``).

    Raises:
        NoScript: it does not exist or cannot be read.
    """
    if not os.path.exists(path):
        raise NoScript(f"there is no script {path}", fix=_nearest(path))
    if os.path.isdir(path) or _is_archive(path):
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "__main__.py")):
            raise NoScript(f"the folder {path} has no __main__.py", fix="name the script in it")
        return lambda: _run_container(path, arguments)
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise NoScript(f"cannot read {path} ({error.strerror})", fix="make it readable") from error
    if source.startswith(importlib.util.MAGIC_NUMBER):
        return lambda: _run_compiled(path, arguments)
    return lambda: _run_file(path, source, arguments)


def module(name: str, arguments: Sequence[str]) -> Callable[[], None]:
    """What runs the module ``name``, as ``python -m`` does.

    Raises:
        NoScript: there is no such module.
    """
    _set_path(os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError) as error:
        raise NoScript(
            f"there is no module {name} ({error})", fix="check the name, and the folder you are in"
        ) from error
    if spec is None:
        raise NoScript(f"there is no module {name}", fix="check the name, and the folder you are in")
    if spec.submodule_search_locations is not None and importlib.util.find_spec(f"{name}.__main__") is None:
        raise NoScript(f"the package {name} has no __main__", fix="name the module in it that is to run")

    def run() -> None:
        sys.argv = [spec.origin or name, *arguments]
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return run


def _nearest(path: str) -> str:
    import difflib

    folder = os.path.dirname(path) or "."
    names = [n for n in os.listdir(folder) if n.endswith(".py")] if os.path.isdir(folder) else []
    close = difflib.get_close_matches(os.path.basename(path), names, n=1)
    if close:
        return f"did you mean {os.path.join(os.path.dirname(path), close[0])}?"
    return "give the path of a Python file, or -m MODULE"


def _is_archive(path: str) -> bool:
    try:
        return zipimport.zipimporter(path) is not None
    except zipimport.ZipImportError:
        return False


def _set_path(first: str) -> None:
    # The interpreter put our own folder there; not when it was told to put nothing (-P, -I).
    if not getattr(sys.flags, "safe_path", False) and not sys.flags.isolated:
        sys.path[0] = first


def _run_container(path: str, arguments: Sequence[str]) -> None:
    sys.argv = [path, *arguments]
    full = os.path.abspath(path)
    _set_path(full)
    file = os.path.join(full, "__main__.py")
    folder = os.path.isdir(path)
    loader: Any = (
        importlib.machinery.SourceFileLoader("__main__", file) if folder else zipimport.zipimporter(full)
    )
    spec = importlib.util.spec_from_file_location("__main__", file, loader=loader)
    _run_code(loader.get_code("__main__"), file, loader, spec, "")


def _run_compiled(path: str, arguments: Sequence[str]) -> None:
    sys.argv = [path, *arguments]
    _set_path(os.path.dirname(os.path.realpath(path)))
    full = os.path.abspath(path)
    loader = importlib.machinery.SourcelessFileLoader("__main__", full)
    _run_code(loader.get_code("__main__"), full, loader, None, None)


def _run_file(path: str, source: bytes, arguments: Sequence[str]) -> None:
    sys.argv = [path, *arguments]
    _set_path(os.path.dirname(os.path.realpath(path)))
    full = os.path.abspath(path)
    loader = importlib.machinery.SourceFileLoader("__main__", full)
    _run_code(compile(source, full, "exec", dont_inherit=True), full, loader, None, None)


def _run_code(code: Any, file: str, loader: Any, spec: Any, package: str | None) -> None:
    main = types.ModuleType("__main__")
    main.__dict__.update(
        __file__=file, __builtins__=builtins, __loader__=loader, __spec__=spec, __package__=package
    )
    sys.modules["__main__"] = main  # for good: threads, pickles and exit handlers of the script look there
    exec(code, main.__dict__)


def hide_our_frames(hook: Callable[..., Any]) -> Callable[..., None]:
    """An ``excepthook`` that shows ``hook`` a traceback that begins in the script, as it would under Python."""

    def show(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
        at, begins = trace, trace
        while at is not None:
            if at.tb_frame.f_code.co_filename == __file__:
                begins = at.tb_next
            at = at.tb_next
        while begins is not None and begins.tb_frame.f_code.co_filename in (runpy.__file__, "<frozen runpy>"):
            begins = begins.tb_next
        hook(kind, error.with_traceback(begins), begins)

    return show
