"""Write figures: PNG to look at, SVG to keep beside the rows (its text is text, and equal rows give equal files)."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the path's suffix names."""
    if path.suffix == ".svg":
        with matplotlib.rc_context({"svg.hashsalt": "sparse_compile", "svg.fonttype": "none"}):
            figure.savefig(path, metadata={"Date": None})
        # matplotlib leaves blanks at the ends of lines.
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")
    else:
        figure.savefig(path, dpi=150)
