"""``make floors``: the house in numbers: files, import circles, names that stand twice, parameters typed ``Any``."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for top in ("distckpt", "backends") for path in sorted((ROOT / top).rglob("*.py"))]
SMALL, LARGE = 60, 500  # lines; a file outside says why in its first line


def module_name(path: Path) -> str:
    """``distckpt/engine/api.py`` as ``distckpt.engine.api``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part not in ("backends", "__init__"))


TREES = {module_name(path): ast.parse(path.read_text()) for path in SOURCES}


def imports(module: str) -> Iterator[str]:
    """The modules of ours that ``module`` imports at run time, wherever in it: inside functions too."""
    package = module if module in ("distckpt", "distckpt_backends") else module.rpartition(".")[0]
    waiting: list[ast.AST] = [TREES[module]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([package, *filter(None, [node.module])]) if node.level else node.module or ""
            found = [
                name if (name := f"{base}.{alias.name}") in TREES else base
                for alias in node.names
                if f"{base}.{alias.name}" != "distckpt.__version__"  # set before anything is imported
            ]
        else:
            continue
        yield from (name for name in found if name in TREES and name != module)


def circles() -> list[set[str]]:
    """Sets of modules that import each other."""
    graph = {module: set(imports(module)) for module in TREES}
    reached = {module: _reach(graph, module) for module in graph}
    found = [{other for other in reached[module] if module in reached[other]} for module in graph]
    return [circle for at, circle in enumerate(found) if circle and circle not in found[:at]]


def _reach(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += graph[module]
    return seen


def twins(kind: type[ast.ClassDef] | type[ast.FunctionDef]) -> dict[str, list[str]]:
    """Public names of classes or functions that stand in more than one module, with those modules."""
    homes: dict[str, list[str]] = defaultdict(list)
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, kind) and not node.name.startswith("_") and module not in homes[node.name]:
                homes[node.name].append(module)
    return {name: found for name, found in homes.items() if len(found) > 1}


def parameters(tree: ast.AST) -> tuple[int, int]:
    """How many parameters there are, and how many of them are ``Any``; ``self``, ``*args`` and the like left out."""
    found = [
        parameter
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for parameter in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if parameter.arg not in ("self", "cls")
    ]
    loose = [p for p in found if p.annotation is not None and ast.unparse(p.annotation) == "Any"]
    return len(found), len(loose)


def odd_sizes() -> list[tuple[int, str, str]]:
    """Files under 60 or over 500 lines: lines, path, first line."""
    found: list[tuple[int, str, str]] = []
    for path in SOURCES:
        lines = path.read_text().splitlines()
        if not SMALL <= len(lines) <= LARGE:
            found.append((len(lines), str(path.relative_to(ROOT)), lines[0]))
    return sorted(found)


def main() -> None:
    """Print it all."""
    rooms: dict[str, list[str]] = defaultdict(list)
    for module in TREES:
        parts = module.split(".")
        rooms[parts[1] if len(parts) > 2 else parts[0]].append(module)
    ours = [module for module in TREES if module.split(".")[0] == "distckpt"]
    print(f"files: {len(ours)} in distckpt; " + ", ".join(f"{room} {len(m)}" for room, m in rooms.items()))
    for lines, path, first in odd_sizes():
        print(f"  {lines:4} {path}: {first}")
    print("circles:", *[sorted(circle) for circle in circles()] or ["none"])
    for word, kind in (("classes", ast.ClassDef), ("functions", ast.FunctionDef)):
        print(f"{word} that stand twice:")
        for name, homes in sorted(twins(kind).items()):
            print(f"  {name}: {', '.join(homes)}")
    total, loose = map(sum, zip(*(parameters(TREES[module]) for module in ours), strict=True))
    print(f"parameters typed Any: {loose} of {total}, {100 * loose / total:.1f} %")
    if "-v" in sys.argv[1:]:
        for module in ours:
            count, any_of_them = parameters(TREES[module])
            if any_of_them:
                print(f"  {module}: {any_of_them} of {count}")


if __name__ == "__main__":
    main()
