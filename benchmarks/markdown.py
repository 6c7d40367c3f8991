"""Write results into documents as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; floats with two digits behind the point."""
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_tables(document: Path, name: str, text: str) -> None:
    """Put text between the marker lines of a document, `<!-- tables of NAME -->` and `<!-- end of tables of NAME -->`.

    Raises:
        SystemExit: the document has no such lines.
    """
    begin, end = f"<!-- tables of {name} -->", f"<!-- end of tables of {name} -->"
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise SystemExit(f"{document} has no lines {begin!r} and {end!r} to put the tables between")
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
