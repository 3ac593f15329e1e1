"""The rules of the tests themselves."""

import ast

import pytest

from support.places import ROOT

TESTS = ROOT / "tests"
FILES = sorted(path for path in TESTS.rglob("*.py") if path.name.startswith("test_"))


def imported(path):
    """Names of modules, also of those imported inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda p: str(p.relative_to(TESTS)))
def test_no_file_imports_tests(path):
    """What two test files need lies in tests/support."""
    names = {file.stem for file in FILES}
    assert not [name for name in imported(path) if names & set(name.split("."))]


def test_names_of_test_files_differ():
    """Folders of tests are no packages, so that none of them hides a module of that name."""
    assert len({path.name for path in FILES}) == len(FILES)
    assert [path.parent.name for path in TESTS.rglob("__init__.py")] == ["support"]
