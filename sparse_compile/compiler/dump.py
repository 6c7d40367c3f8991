"""Write the dump of a compiled graph: a folder with its text after each pass, generated kernels, and what was decided.

`sparse_compile/graph/text.py` says what the text of a graph is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx

from sparse_compile.compiler.graph_texts import GraphTexts
from sparse_compile.compiler.report import GraphReport, report_of
from sparse_compile.graph.sites import Parameter
from sparse_compile.options.config import SparseLoRAConfig


class GraphDump(GraphTexts):
    """The folder of one compiled graph: a text for each pass, `kernels/`, `plan.json`, `manifest.json`, `index.html`.

    Args:
        root: folder of all dumps, made if need be.
        compile_id: Dynamo's name of the compilation, such as `"0/1"`.
    """

    def __init__(self, root: str | os.PathLike[str], compile_id: str) -> None:
        super().__init__()
        stem = re.sub(r"[^\w.-]", "_", compile_id)
        folder, count = Path(root) / stem, 1
        # A folder of an earlier run is left as it is.
        while folder.exists():
            folder = Path(root) / f"{stem}-{count}"
            count += 1
        folder.mkdir(parents=True)
        self.folder = folder

    def graph(self, name: str, graph: fx.Graph, parameters: Mapping[str, Parameter]) -> None:
        """Write the graph as it stands after the step `name`."""
        number = len(self.steps)
        super().graph(name, graph, parameters)
        (self.folder / f"{number:02d}_{name}.txt").write_text(self.steps[name], encoding="utf-8")

    def kernel(self, name: str, source: str) -> None:
        """Write the source of a generated kernel as `kernels/<name>`."""
        super().kernel(name, source)
        folder = self.folder / "kernels"
        folder.mkdir(exist_ok=True)
        (folder / re.sub(r"[^\w.-]", "_", name)).write_text(source, encoding="utf-8")

    def data(self, name: str, content: Mapping[str, Any]) -> None:
        """Write `<name>.json`."""
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (self.folder / f"{name}.json").write_text(text, encoding="utf-8")

    def page(self, report: GraphReport, config: SparseLoRAConfig) -> None:
        """Write `index.html`, to look through the report of this graph with its texts and kernels."""
        # Without the place of the dump, so that those of two runs can be compared.
        config = replace(config, dump_dir=None)
        report_of([report], [self], config, "the compiled model").save(self.folder / "index.html")


def dump_root(dump_dir: str | None) -> str | None:
    """Return the folder asked for by the option or by `SPARSELORA_DUMP`; None for no dump."""
    return dump_dir or os.environ.get("SPARSELORA_DUMP") or None
