"""The documentation as a site: no page is left out of it, and it builds without a warning."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import sparse_compile

API = "api.md"
"""The page that the site's hook writes from the docstrings."""


class PlainLoader(yaml.SafeLoader):
    """Reads `mkdocs.yml` without the Python objects that it names."""


PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def pages_of(nav: Any) -> Iterator[str]:
    """Yield the pages of a navigation, in their order."""
    for entry in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        if isinstance(entry, str):
            yield entry
        else:
            yield from pages_of(entry)


def brought_in(repo_root: Path) -> dict[str, str]:
    """Return the documents that the hook brings in from outside of `docs/`, and the names of their pages."""
    tree = ast.parse((repo_root / "docs" / "_site" / "pages.py").read_text(encoding="utf-8"))
    (found,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PAGES"
    )
    pages: dict[str, str] = ast.literal_eval(found)
    return pages


def test_every_document_is_in_the_navigation_once(repo_root: Path) -> None:
    config = yaml.load((repo_root / "mkdocs.yml").read_text(encoding="utf-8"), Loader=PlainLoader)
    listed = list(pages_of(config["nav"]))
    documents = [path.relative_to(repo_root / "docs").as_posix() for path in (repo_root / "docs").rglob("*.md")]
    assert sorted(listed) == sorted([*documents, *brought_in(repo_root).values(), API])


def test_the_documents_that_the_site_brings_in_are_there(repo_root: Path) -> None:
    assert [source for source in brought_in(repo_root) if not (repo_root / source).is_file()] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_the_api(repo_root: Path, tmp_path: Path) -> None:
    command = ["make", "--silent", "docs", f"ARGS=--site-dir {tmp_path / 'site'}"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert [name for name in sparse_compile.__all__ if f'id="sparse_compile.{name}"' not in api] == []
    assert ":class:" not in api
    usage = (tmp_path / "site" / "usage" / "index.html").read_text(encoding="utf-8")
    assert 'href="../#quick-start"' in usage and 'href="../source/examples/inspect_passes.py"' in usage
