"""Hooks of mkdocs: the documents of the root are pages of the site too, and links between documents lead to pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for document, page in PAGES.items():
        text = (root / document).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as they are in the repository, to links from one page in docs/ to another."""
    for document, page in PAGES.items():
        for link in (f"](../{document}", f"]({document}"):
            markdown = markdown.replace(link, f"]({page}")
    return markdown
