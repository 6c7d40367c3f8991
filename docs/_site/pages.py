"""What the site has beside the pages of `docs/`: other documents of the repository, files they link to, the API.

Documents link to each other and to sources by relative paths, which GitHub follows. MkDocs knows the files of `docs/`
alone, so this hook brings in the others and has the links point at where they lie on the site.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "passes/README.md": "writing-a-pass.md",
}
"""Documents outside of `docs/`, by their place in the repository, and the names of their pages."""

SOURCES = "source"
"""Folder of the site that holds the files which documents link to."""

_FENCE = re.compile(r"^(```+).*?^\1[ ]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
_ROLE = re.compile(r":(?:class|func|data|meth):(?=<code>)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the other documents, the page of the API, and each file of the repository that a document links to."""
    root = Path(config.config_file_path).parent
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(root / source)))
    files.append(File.generated(config, "api.md", content=api_page(root / "sparse_compile" / "__init__.py")))
    documents = [*root.glob("docs/*.md"), *(root / source for source in PAGES)]
    linked = {path for document in documents for path in linked_files(document, root)}
    for path in sorted(linked):
        if not path.startswith("docs/") and path not in PAGES:
            files.append(File.generated(config, f"{SOURCES}/{path}", abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have relative links point at where their targets lie on the site."""
    uri = page.file.src_uri
    source = next((source for source, renamed in PAGES.items() if renamed == uri), f"docs/{uri}")
    root = Path(config.config_file_path).parent
    return outside_fences(markdown, lambda text: _LINK.sub(lambda link: relinked(link, source, uri, root), text))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take off the roles of Sphinx that docstrings give to names in backticks."""
    return _ROLE.sub("", html)


def api_page(front_door: Path) -> str:
    """Write the page of what the package exports, in the order of `__all__`; nothing is imported for it."""
    (names,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(front_door.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return "\n\n".join(["# API", "What `sparse_compile` exports.", *(f"::: sparse_compile.{name}" for name in names)])


def linked_files(document: Path, root: Path) -> set[str]:
    """Return the files that a document links to, by their place in the repository."""
    prose = _FENCE.sub("", document.read_text(encoding="utf-8"))
    targets = (place_of(target, document.relative_to(root).as_posix()) for _, target in _LINK.findall(prose))
    return {target for target in targets if target is not None and (root / target).is_file()}


def relinked(link: re.Match[str], source: str, uri: str, root: Path) -> str:
    """Return a link as the site needs it; one to a folder, which the site does not have, becomes its text."""
    text, target = link.groups()
    place = place_of(target, source)
    if place is None:
        return link[0]
    if (root / place).is_dir():
        return text[1:-1]
    on_site = PAGES.get(place) or (place.removeprefix("docs/") if place.startswith("docs/") else f"{SOURCES}/{place}")
    _, hash_mark, anchor = target.partition("#")
    return f"{text}({os.path.relpath(on_site, os.path.dirname(uri) or '.')}{hash_mark}{anchor})"


def place_of(target: str, source: str) -> str | None:
    """Return the place in the repository of a relative link; None for an address, or a heading of the same page."""
    path = target.partition("#")[0]
    if not path or re.match(r"[a-z]+:", target):
        return None
    return os.path.normpath(os.path.join(os.path.dirname(source), path))


def outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    """Apply a change to what stands outside of fenced blocks."""
    pieces, end = [], 0
    for fence in _FENCE.finditer(markdown):
        pieces += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, change(markdown[end:])])
