"""The house rules: who may import whom, where pybind11 and ggml.h may be, how long a file may be."""
import ast
import importlib
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

# A module imports only from modules listed before it.
ORDER = ["_core", "errors", "units", "container", "llama", "model", "safetensors", "imatrix.files", "imatrix.tools",
         "plan_data", "experts.roles", "experts.stats", "experts.calibrate", "experts.metrics", "blocks",
         "experts.rank", "experts.repair_file", "experts.repair", "experts.prune", "experts.ream", "experts.merge",
         "quantize", "quantize.mixes", "quantize.importance", "quantize.recipe_file", "quantize.recipe", "metadata",
         "layers", "shards", "check", "write", "quantize.fit", "plan",
         "report", "report.compare", "report.demo_model", "report.memory", "report.plots", "verify", "distributed",
         "cli"]
# Folders whose own __init__ gathers names: they come after what they gather.
GATHER = {"experts": "experts.merge", "imatrix": "imatrix.tools"}
ROOMS = ["base", "io", "gguf", "quant", "engine", "bind"]
# Imported inside functions only: not everybody has or needs them.
LAZY = ["scipy", "matplotlib", "dask", "ray", "llama_cpp"]

MODULES = sorted(p for p in PACKAGE.rglob("*.py"))
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".hpp"))


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rank(name):
    """The place of a module in ORDER; unknown ones are an error."""
    name = GATHER.get(name, name)
    if name.startswith("cli"):
        name = "cli"  # inside the command line anything goes
    assert name in ORDER, f"{name} has no place in ORDER"
    return ORDER.index(name)


def imports(tree):
    """Import statements at any depth; type-checking blocks do not count."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        yield from imports(node)


def imported_modules(path):
    """The package's own modules that a file imports, named relative to the package."""
    package = ["pygguf_surgery", *filter(None, module_name(path).split("."))]
    if path.name != "__init__.py":
        package.pop()
    for node in imports(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [a.name for a in node.names]
        else:
            base = package[:len(package) - node.level + 1] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            # "from . import check" imports a module, "from .check import human" a name of one.
            found = [f"{base}.{a.name}" if is_module(f"{base}.{a.name}") else base for a in node.names]
        yield from (n.removeprefix("pygguf_surgery.") for n in found if n.startswith("pygguf_surgery."))


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return name == "pygguf_surgery._core" or path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_the_rules_see_something():
    assert len(MODULES) > 15 and len(SOURCES) > 20
    assert "experts.roles" in set(imported_modules(PACKAGE / "check.py"))
    assert {"model", "_core", "quantize.recipe"} <= set(imported_modules(PACKAGE / "check.py"))


@pytest.mark.parametrize("path", [p for p in MODULES if module_name(p) not in ("", "__main__")],
                         ids=lambda p: module_name(p))
def test_python_imports_point_down(path):
    name = module_name(path)
    rank(name)
    for other in imported_modules(path):
        if other != name and not (name.startswith("cli") and other.startswith("cli")):
            inside = name in GATHER and other.startswith(name + ".")
            assert rank(other) < rank(name) or inside, f"{name} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: module_name(p) or "package")
def test_optional_imports_are_inside_functions(path):
    for node in ast.parse(path.read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
            [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else [])
        assert not [n for n in names if n.split(".")[0] in LAZY]


def test_importing_the_package_is_light():
    code = ("import sys, pygguf_surgery; heavy = [m for m in ('numpy', 'gguf', 'json', 'argparse', 'inspect',"
            "'pygguf_surgery.plan', 'pygguf_surgery.experts', 'pygguf_surgery.cli') if m in sys.modules]; print(heavy)")
    # The same package as this process has: an installed one, or the folder that a developer put on the path.
    folder = str(Path(pygguf_surgery.__file__).parents[1])
    out = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r}); {code}"], check=True,
                         capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def test_public_names():
    assert sorted(n for n in pygguf_surgery.__all__) == sorted(
        "open Model Tensor Metadata Plan Receipt Value quantize dequantize experts imatrix SurgeryError BadFile BadPlan "
        "Unsupported SourceChanged OutOfSpace __version__".split())
    assert all(getattr(pygguf_surgery, name) is not None for name in pygguf_surgery.__all__)
    assert set(pygguf_surgery.__all__) <= set(dir(pygguf_surgery))
    # These two are functions, though folders of the same name exist, whatever is imported first.
    importlib.import_module("pygguf_surgery.experts.rank")
    importlib.import_module("pygguf_surgery.quantize.mixes")
    assert pygguf_surgery.quantize.__name__ == "quantize" and callable(pygguf_surgery.quantize)
    assert callable(pygguf_surgery.experts.rank)
    with pytest.raises(AttributeError):
        pygguf_surgery.nothing


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
