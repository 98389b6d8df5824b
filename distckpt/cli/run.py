"""``distckpt run``: an unmodified script, with torch.utils.checkpoint's names resolved to ours."""

from __future__ import annotations

import builtins
import importlib.machinery
import importlib.util
import json
import os
import runpy
import sys
import threading
import types
import weakref
import zipimport
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distckpt import compat
from distckpt.engine.inputs import tensors
from distckpt.engine.record import observe
from distckpt.engine.stats import counters
from distckpt.errors import BadUsage, NoScript


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


def _run_code(code: Any, file: str, loader: object, spec: object, package: str | None) -> None:
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


@dataclass(frozen=True)
class Totals:
    """``kept`` is in bytes: storages of region inputs, parameters aside, each counted once however many regions
    hold it, at the moment when most were held."""

    regions: int
    replays: int
    kept: int


class Tally:
    """Totals from now on until :meth:`stop`."""

    def __init__(self) -> None:
        self._start = counters.regions, counters.replays
        self._lock = (
            threading.RLock()
        )  # a region may die, and call back, in the middle of our own bookkeeping
        self._holders: dict[int, int] = {}  # regions that hold a storage, by its address object
        self._kept = 0
        self._peak = 0
        observe(self._opened)

    def _opened(self, region: object, held: object) -> None:
        sizes: dict[int, int] = {}
        for tensor in tensors(held):
            if not isinstance(tensor, torch.nn.Parameter) and tensor.layout is torch.strided:
                storage = _storage(tensor)
                if storage is not None:
                    sizes[storage._cdata] = storage.nbytes()
        with self._lock:
            for key, size in sizes.items():
                holders = self._holders.get(key, 0)
                self._holders[key] = holders + 1
                self._kept += 0 if holders else size
            self._peak = max(self._peak, self._kept)
        weakref.finalize(region, self._died, sizes).atexit = False

    def _died(self, sizes: dict[int, int]) -> None:
        with self._lock:
            for key, size in sizes.items():
                self._holders[key] -= 1
                if not self._holders[key]:
                    del self._holders[key]
                    self._kept -= size

    def stop(self) -> Totals:
        """Stop counting; what it came to."""
        observe(None)
        regions, replays = self._start
        return Totals(counters.regions - regions, counters.replays - replays, self._peak)


def _storage(tensor: torch.Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):  # a wrapper without memory of its own, an XLA tensor
        return None


def bytes_text(count: int) -> str:
    """Bytes for people, in units of 1024."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


SCHEMA = "distckpt.run/1"


@dataclass(frozen=True)
class Prepared:
    """A script that is there, and what to do around it."""

    start: Callable[[], None]
    name: str
    quiet: bool
    report: Path | None

    def run(self) -> int:
        """Run it and say what its regions did; what it raises passes through, ``SystemExit`` among it."""
        rank = int(os.environ.get("RANK", "0") or 0)
        size = int(os.environ.get("WORLD_SIZE", "1") or 1)
        installed = (
            compat.install()
        )  # for good: threads and exit handlers of the script outlive its last line
        replaced = installed.replaced()
        self._say(rank, _replaced_text(replaced))
        tally = Tally()
        try:
            self.start()
        except BaseException:
            sys.excepthook = hide_our_frames(sys.excepthook)
            raise
        finally:
            taken = installed.lost()
            counts = asdict(tally.stop())
            for line in _summary(counts, taken, rank, size):
                self._say(rank, line)
            if self.report is not None:
                found = {"schema": SCHEMA, "script": self.name, "rank": rank, "ranks": size, **counts}
                _write(self.report, rank, size, {**found, "replaced": list(replaced), "lost": list(taken)})
        return 0

    def _say(self, rank: int, line: str) -> None:
        if not self.quiet and rank == 0:
            print(f"distckpt run: {line}", file=sys.stderr, flush=True)


def prepare(options: Namespace) -> Prepared:
    """Find the script, and what to do around it.

    Raises:
        NoScript: there is none (DC702).
        BadUsage: ``--json`` cannot be written where it says (DC701).
    """
    name = options.module or options.script
    start = (module if options.module else script)(name, options.rest)
    report = None if options.json is None else Path(options.json)
    if report is not None and not report.parent.is_dir():
        raise BadUsage(
            f"--json {report}: there is no folder {report.parent}", fix="make it, or give another path"
        )
    return Prepared(start, name, options.quiet, report)


def _replaced_text(replaced: tuple[str, ...]) -> str:
    own = [name for name in replaced if name.startswith("torch.utils.checkpoint.")]
    rest = sorted({name.rpartition(".")[0] for name in replaced} - {"torch.utils.checkpoint"})
    more = f", and what {len(rest)} modules had imported of them" if rest else ""
    return f"{len(own)} names of torch.utils.checkpoint are distckpt's in this process{more}"


def _summary(counts: dict[str, Any], taken: tuple[str, ...], rank: int, size: int) -> list[str]:
    who = f"rank {rank} of {size}: " if size > 1 else ""
    found = [
        f"{who}{counts['regions']} regions ran, {counts['replays']} replays, at most "
        f"{bytes_text(counts['kept'])} of region inputs kept at once"
    ]
    if taken:
        found.append(
            f"replaced by somebody else meanwhile: {', '.join(taken)}; see distckpt doctor --import MODULE"
        )
    if not counts["regions"]:
        found.append("no region ran in this process: does the script turn activation checkpointing on?")
        found.append("Next: distckpt doctor")
    return found


def _write(path: Path, rank: int, size: int, found: dict[str, Any]) -> None:
    """One file, or under a launcher one per rank: report.json becomes report.rank0.json."""
    target = path if size == 1 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
    target.write_text(json.dumps(found, indent=2) + "\n")
