"""The house rules: who may import whom, where pybind11 and ggml.h may be, how long a file may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pygguf_surgery

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pygguf_surgery"
CSRC = ROOT / "csrc"
LONGEST = 650

# The folders are the layers: one imports only from those listed before it. Files on top of them are the faces, which
# may import any folder; the command line comes last.
LAYERS = [
    "_core",
    "base",
    "quant",
    "plan_data",
    "architecture",
    "files",
    "llama",
    "recipes",
    "edits",
    "gate",
    "studies",
    "run",
    "reports",
]
ROOMS = ["base", "io", "gguf", "quant", "engine", "bind"]
# Imported inside functions only: not everybody has or needs them.
LAZY = ["scipy", "matplotlib", "dask", "ray", "llama_cpp"]

MODULES = sorted(p for p in PACKAGE.rglob("*.py"))
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".hpp"))


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(name):
    """The place of a module among the layers: its folder, above those the faces, above all the command line."""
    room = name.split(".")[0]
    if room in ("cli", "__main__"):
        return len(LAYERS) + (1 if room == "cli" else 2)
    if room in LAYERS:
        return LAYERS.index(room)
    assert "." not in name, f"{name}: the folder {room} is no layer"
    return len(LAYERS)


def imports(tree):
    """Import statements at any depth, those for annotations too."""
    return (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))


def imported_modules(path):
    """The package's own modules that a file imports, named relative to the package."""
    package = ["pygguf_surgery", *filter(None, module_name(path).split("."))]
    if path.name != "__init__.py":
        package.pop()
    for node in imports(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [a.name for a in node.names]
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            # "from . import check" imports a module, "from .check import human" a name of one.
            found = [f"{base}.{a.name}" if is_module(f"{base}.{a.name}") else base for a in node.names]
        yield from (n.removeprefix("pygguf_surgery").lstrip(".") for n in found if n.split(".")[0] == "pygguf_surgery")


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return name == "pygguf_surgery._core" or path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def graph():
    """module -> the package's modules that it imports."""
    return {module_name(path): {m for m in imported_modules(path) if m != module_name(path)} for path in MODULES}


def test_the_rules_see_something():
    assert len(MODULES) > 40 and len(SOURCES) > 20
    found = graph()
    below = {other.split(".")[0] for name, others in found.items() if name.startswith("gate.") for other in others}
    assert {"_core", "base", "architecture", "files", "edits", "plan_data"} <= below
    assert {room for name in found if (room := name.split(".")[0]) in LAYERS} == set(LAYERS[1:])


@pytest.mark.parametrize("path", [p for p in MODULES if module_name(p)], ids=lambda p: module_name(p))
def test_python_imports_point_down(path):
    name = module_name(path)
    for other in imported_modules(path):
        same = name.split(".")[0] == other.split(".")[0]
        face = layer(name) == layer(other) == len(LAYERS)  # a face may use another; circles are found below
        # The package itself is the face of all: what is beside it may use it, no folder below.
        above = layer(name) >= len(LAYERS) if other == "" else layer(other) < layer(name)
        assert above or same or face, f"{name} imports {other or 'the package'}"


def test_no_circles():
    """Not between folders, which the order of layers forbids, and not between files."""
    found, done, path = graph(), set(), []

    def walk(name):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name in done or name not in found:
            return
        path.append(name)
        for other in sorted(found[name]):
            walk(other)
        path.pop()
        done.add(name)

    for name in sorted(found):
        walk(name)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: module_name(p) or "package")
def test_the_core_is_imported_by_names(path):
    """`from .._core import x`: `from .. import _core` would read as an import of the face."""
    for node in imports(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level and not (node.module or "").endswith("_core"):
            assert "_core" not in [a.name for a in node.names]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: module_name(p) or "package")
def test_only_llama_imports_llama_cpp(path):
    for node in imports(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        assert module_name(path).startswith("llama.") or not [n for n in names if n.split(".")[0] == "llama_cpp"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: module_name(p) or "package")
def test_optional_imports_are_inside_functions(path):
    for node in ast.parse(path.read_text()).body:
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else ([node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else [])
        )
        assert not [n for n in names if n.split(".")[0] in LAZY]


def test_importing_the_package_is_light():
    code = (
        "import sys, pygguf_surgery; heavy = [m for m in ('numpy', 'gguf', 'json', 'argparse', 'inspect',"
        "'pygguf_surgery.plan', 'pygguf_surgery.experts', 'pygguf_surgery.cli') if m in sys.modules]; print(heavy)"
    )
    # The same package as this process has: an installed one, or the folder that a developer put on the path.
    folder = str(Path(pygguf_surgery.__file__).parents[1])
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}); {code}"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert out.stdout.strip() == "[]"


def test_public_names():
    assert sorted(n for n in pygguf_surgery.__all__) == sorted(
        "open Model Tensor Metadata Plan Receipt Value quantize dequantize experts imatrix report SurgeryError BadFile "
        "BadPlan Unsupported SourceChanged OutOfSpace SurgeryWarning __version__".split()
    )
    assert all(getattr(pygguf_surgery, name) is not None for name in pygguf_surgery.__all__)
    assert set(pygguf_surgery.__all__) <= set(dir(pygguf_surgery))
    # A room is a noun and a function a verb: no module has the name of a public function.
    assert not [n for n in pygguf_surgery.__all__ if (PACKAGE / n).is_dir()]
    with pytest.raises(AttributeError):
        _ = pygguf_surgery.nothing


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_point_down(path):
    room = path.relative_to(CSRC).parts[0]
    assert room in ROOMS
    for name in includes(path):
        other = name.split("/")[0]
        if "/" in name and other in ROOMS:
            assert ROOMS.index(other) <= ROOMS.index(room), name
            assert (CSRC / name).exists(), name
        assert not (re.match(r"pybind11/|Python\.h", name) and room != "bind"), name
        assert not (re.match(r"ggml", name) and room != "quant"), name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(CSRC)))
def test_the_core_is_quiet_and_never_dies(path):
    text = re.sub(r'"(\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', "", path.read_text(), flags=re.DOTALL)
    bad = r"\b(printf|fprintf|puts|fputs|perror|abort|assert|exit|terminate)\s*\(|std::c(out|err|log)\b"
    assert not re.search(bad, text)


@pytest.mark.parametrize("path", MODULES + SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= LONGEST
