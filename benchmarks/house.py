"""house.py [PACKAGE]: how the package is built, in numbers: its largest parts, what no checker sees, who imports whom.

PACKAGE is a folder of sources, by default the one beside this script, so that two versions can be compared. A
circle of files is one in the graph of all imports, those inside functions and those for annotations too.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path


def as_file(module: Path) -> Path | None:
    file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    return file if file.exists() else None


def imports(path: Path, package: Path) -> set[Path]:
    """The files of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parent
            for _ in range(node.level - 1):
                base = base.parent
            base = base.joinpath(*(node.module or "").split("."))
            for name in (base / alias.name for alias in node.names):
                # "from . import check" imports a module, "from .check import human" a name of one.
                file = as_file(name) or as_file(base)
                if file is not None and file.is_relative_to(package):
                    found.add(file)
    return found - {path}


def circles(graph: dict[Path, set[Path]]) -> int:
    """Files that import themselves by way of others."""

    def reaches(start: Path) -> bool:
        seen, todo = set(), [*graph[start]]
        while todo:
            file = todo.pop()
            if file == start:
                return True
            if file not in seen:
                seen.add(file)
                todo += graph[file]
        return False

    return sum(reaches(file) for file in graph)


def mutual(graph: dict[Path, set[Path]], package: Path) -> int:
    """Pairs of rooms that import each other: whatever their order, one of the two arrows points up."""
    rooms = {file: file.relative_to(package).parts[0] for file in graph}
    arrows = {(rooms[a], rooms[b]) for a, others in graph.items() for b in others if rooms[a] != rooms[b]}
    return sum((b, a) in arrows for a, b in arrows) // 2


def main() -> None:
    package = Path(
        sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "pygguf_surgery"
    ).resolve()
    files = sorted(package.rglob("*.py"))
    trees = {file: ast.parse(file.read_text()) for file in files}
    functions = [
        (node.end_lineno - node.lineno + 1, f"{file.relative_to(package)}: {node.name}")
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]
    lines = [(len(file.read_text().splitlines()), str(file.relative_to(package))) for file in files]
    names = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Name)]
    nested = [
        node
        for tree in trees.values()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import) and node.names[0].name == "numpy"
    ]
    graph = {file: imports(file, package) for file in files}
    print(f"files: {len(files)}, lines: {sum(n for n, _ in lines)}")
    print(f"longest file: {max(lines)}")
    print(f"longest function: {max(functions)}, of {len(functions)}")
    print(f"functions of more than 60 lines: {sum(n > 60 for n, _ in functions)}")
    print(f"uses of Any: {sum(name.id == 'Any' for name in names)}")
    print(f"imports of numpy inside functions: {len(nested)}")
    print(f"imports between files: {sum(map(len, graph.values()))}, files in a circle: {circles(graph)}")
    print(f"pairs of rooms that import each other: {mutual(graph, package)}")


if __name__ == "__main__":
    main()
