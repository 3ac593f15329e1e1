"""What the documents say of the repository is true: paths and links exist, one version, one set of checks."""

import re
from pathlib import Path

import pytest

import pygguf_surgery as pgs

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/*.md")]
PATH = re.compile(r"`((?:[\w.-]+/)+(?:[\w-]+\.\w+)?|[\w-]+\.(?:py|pyi))`")  # a folder ends in a slash
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)(?:#[\w-]+)?\)")
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b(?!\.md)")  # NAME.py, FAMILY.cpp
MADE = ("build/", "site/")


def exists(path):
    """From the root, in the package, or in the core."""
    return any((place / path).exists() for place in (ROOT, ROOT / "pygguf_surgery", ROOT / "csrc"))


def test_the_patterns_see_something():
    text = "`edits/NAME.py`, `csrc/io/`, `plan.py`, `--help`, `a/b`, [x](docs/a.md#b), [y](https://z)"
    assert PATH.findall(text) == ["edits/NAME.py", "csrc/io/", "plan.py"] and LINK.findall(text) == ["docs/a.md"]
    assert PLACEHOLDER.search("edits/NAME.py") and not PLACEHOLDER.search("CONTRIBUTING.md") and not exists("no.py")
    assert len(DOCUMENTS) > 8


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_paths_and_links_exist(document):
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    named = [path for path in PATH.findall(text) if not PLACEHOLDER.search(path) and not path.startswith(MADE)]
    assert [path for path in named if not exists(path)] == []
    assert [link for link in LINK.findall(text) if not (document.parent / link).exists()] == []


def test_the_site_shows_every_public_name():
    public = {f"pygguf_surgery.{name}" for name in pgs.__all__} - {"pygguf_surgery.__version__"}
    for module in (pgs.experts, pgs.imatrix, pgs.report):
        public.remove(module.__name__)
        public |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert public == set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))


def test_one_version():
    pyproject = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert re.search(r'^version: "(.+)"', (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == pyproject
    assert f"\n## {pyproject}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_hooks_and_workflows_run_the_parts_of_ci_lint():
    parts = re.search(r"set -- (.+); fi", (ROOT / ".ci" / "lint").read_text())[1].split()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert sorted(re.findall(r"entry: \.ci/lint (\w+)", hooks)) == sorted(parts)
    assert "run: .ci/lint\n" in (ROOT / ".github" / "workflows" / "lint.yml").read_text()
