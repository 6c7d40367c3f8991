"""`sparselora dump`: find the pages in a folder of dumps."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from sparse_compile.cli.errors import CommandError
from sparse_compile.cli.output import Output

__all__ = ["run_dump"]

_MANIFEST = "manifest.json"
"""What every dump of a graph ends with."""


def run_dump(output: Output, folder: Path, *, in_browser: bool) -> None:
    """Name the page of each dumped graph; where a graph has none, list its files.

    Args:
        output: where the names go.
        folder: the folder of all dumps, or that of one graph.
        in_browser: whether the first page is opened.

    Raises:
        CommandError: the folder is not there or holds no dump, or there is no page to open.
    """
    if not folder.is_dir():
        raise CommandError(f"{folder}: no such folder. Name the one that dump_dir or SPARSELORA_DUMP named")
    graphs = sorted(manifest.parent for manifest in (*folder.glob(_MANIFEST), *folder.glob(f"*/{_MANIFEST}")))
    if not graphs:
        raise CommandError(
            f"{folder} holds no dump of a graph. A training step with dump_dir={str(folder)!r} (or with "
            f"SPARSELORA_DUMP={folder}) makes one"
        )
    files = {graph: sorted(file for file in graph.rglob("*") if file.is_file()) for graph in graphs}
    pages = {graph: [file for file in files[graph] if file.suffix == ".html"] for graph in graphs}
    if in_browser:
        page = next((page for graph in graphs for page in pages[graph]), None)
        if page is None:
            raise CommandError(f"{folder} holds no page; without --open its files are listed")
        if not webbrowser.open(page.resolve().as_uri()):
            raise CommandError(f"no browser was found: open {page} yourself")
    data = [
        {"graph": graph.name, "pages": list(map(str, pages[graph])), "files": list(map(str, files[graph]))}
        for graph in graphs
    ]
    lines = [f"graph {graph.name}: {file}" for graph in graphs for file in (pages[graph] or files[graph])]
    output.result({"folder": str(folder), "graphs": data}, lambda: "\n".join(lines))
