"""The stub _core.pyi says what the compiled module has: each name, and each parameter of each function."""

import ast
import inspect
import re

import pytest

from pygguf_surgery import _core
from support.places import ROOT

STUB = ast.parse((ROOT / "pygguf_surgery" / "_core.pyi").read_text())
# What every class of pybind11 has, and what pickle and printing need: nobody calls them by name.
SILENT = {"__module__", "__doc__", "_pybind11_conduit_v1_", "__getstate__", "__setstate__", "__repr__", "__init__"}


def parameters(function):
    """[(name, keyword only, has a default)] of a function of the stub, without self."""
    args = function.args
    assert not args.posonlyargs and not args.kwarg
    names = args.args + ([args.vararg] if args.vararg else [])
    defaults = [None] * (len(args.args) - len(args.defaults)) + args.defaults + [None] * bool(args.vararg)
    found = [(a.arg, False, d is not None) for a, d in zip(names, defaults, strict=True)]
    found += [(a.arg, True, d is not None) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return [p for p in found if p[0] != "self"]


def split(text):
    """At the commas outside of brackets and strings."""
    parts, depth, quoted, start = [], 0, False, 0
    for i, c in enumerate(text):
        quoted ^= c == "'"
        depth += 0 if quoted else (c in "([{") - (c in ")]}")
        if c == "," and depth == 0 and not quoted:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()] if text[start:].strip() else parts


def described(function):
    """The same of a function of the module, from the signature that pybind11 writes in its docstring."""
    signature = re.match(r"\w+\((.*)\) -> ", function.__doc__)
    found, keyword_only = [], False
    for part in split(signature[1]):
        if part == "*":
            keyword_only = True
        elif part != "/":
            name = re.match(r"\*{0,2}(\w+)", part)[1]
            found.append((name, keyword_only, bool(re.search(r"(?<![=<>]) = ", part))))
    return [p for p in found if p[0] != "self"]


def members(body):
    """name -> its function, or None for an attribute."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            is_property = any(getattr(d, "id", "") == "property" for d in node.decorator_list)
            found[node.name] = None if is_property else node
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = None
    return found


CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
FUNCTIONS = {name: node for name, node in members(STUB.body).items() if node is not None}


def test_the_same_names():
    stub = {*CLASSES, *members(STUB.body)}
    public = {name for name in dir(_core) if not name.startswith("__")} | {"__version__"}
    assert stub == public
    assert {name for name in public if inspect.isclass(getattr(_core, name))} == {*CLASSES}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    assert described(getattr(_core, name)) == parameters(FUNCTIONS[name])


@pytest.mark.parametrize("name", CLASSES)
def test_classes(name):
    stub, live = members(CLASSES[name].body), vars(getattr(_core, name))
    assert {*stub} - {"__init__"} == {*live} - SILENT
    constructor = "->" in (getattr(live.get("__init__"), "__doc__", None) or "")
    assert ("__init__" in stub) == constructor  # without one only the core makes such objects
    for member, function in stub.items():
        if function is None:
            assert isinstance(live[member], property), member
        elif member not in ("__eq__", "__exit__"):  # called by Python, by position
            assert described(getattr(getattr(_core, name), member)) == parameters(function), member


def test_attributes_that_may_be_set():
    """Those that the stub annotates; its properties may not."""
    for name, node in CLASSES.items():
        live = vars(getattr(_core, name))
        annotated = {member.target.id for member in node.body if isinstance(member, ast.AnnAssign)}
        settable = {member for member in live if isinstance(live[member], property) and live[member].fset}
        assert annotated == settable, name
