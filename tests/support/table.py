"""Write `docs/support.md` from the rows of the support matrix: `python tests/support/table.py`."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
PAGE = TESTS.parent / "docs" / "support.md"

HEAD = """# What is supported

Written from the tests by `make support`; do not edit. Each row is a model of one block, of random weights, in
`tests/support`: its loss and the gradient of every adapter equal those of the masked-dense oracle at sparsity 0.5.
That a model trains bit-equal to a compilation without this backend, where nothing is asked for, is tested on Gemma 2,
Phi-3, GPT-NeoX, GPT-2, T5 and ViT.

| model | sparse feed-forward sites | sparse attention sites | stays dense |
|---|---|---|---|
"""


def support_page() -> str:
    """Return the text of the page."""
    from support.zoo import DECLINED, MODELS

    lines = []
    for row in (*MODELS.values(), *DECLINED.values()):
        ffn = sum(isinstance(form, str) for form in row.sites.values())
        kinds = ["yes" if count else "none" for count in (ffn, len(row.sites) - ffn)]
        lines.append(f"| {row.title} | {' | '.join(kinds)} | {row.dense} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    PAGE.write_text(support_page(), encoding="utf-8")
