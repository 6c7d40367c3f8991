"""Build reports without a model: what texts and pages are made from, as small or as large as a test wants it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_compile.compiler.capture import TokenCounts
from sparse_compile.compiler.graph_texts import GraphTexts
from sparse_compile.compiler.report_data import GraphReport, PassReport, SiteReport
from sparse_compile.compiler.runner import PassRecord

PREFIX = "base_model.model.model."


def site(name: str, kept: int = 12, total: int = 48, **changes: Any) -> SiteReport:
    """A sparse feed-forward site; with `kept=total` a dense one."""
    dense = kept == total
    plain = SiteReport(
        name=f"{PREFIX}{name}",
        kind="ffn",
        sparsity=1 - kept / total,
        kept=kept,
        total=total,
        provider="dense" if dense else "reference",
        reason="",
        adapters=3,
        why_dense="first block, always dense" if dense else "",
    )
    return replace(plain, **changes)


def pass_report(name: str, before: float, after: float, numerics: str = "exact", **changes: Any) -> PassReport:
    """A pass that takes a step from some FLOPs to others."""
    record = PassRecord(name, numerics, before != after, 250.0, 100, 120)
    return PassReport(replace(record, **changes), before, after)


def graph_report(*sites: SiteReport, **changes: Any) -> GraphReport:
    """A graph of ten GFLOPs, of which an exact pass saves one and a sparse pass three."""
    plain = GraphReport(
        compile_id="0/0",
        roles="cross_entropy",
        tokens=TokenCounts(30, 10, 9),
        projections=7 * len(sites),
        adapters=3 * len(sites),
        frozen_adapters=0,
        sites=sites,
        passes=(
            pass_report("find_ffn", 10e9, 10e9),
            pass_report("select_loss_rows", 10e9, 9e9),
            pass_report("sparsify_ffn", 9e9, 6e9, "approximate"),
        ),
        masks=(),
        orders=(),
        rejections=(),
        places={},
        all_trained=False,
        flops_before=10e9,
        flops_after=6e9,
        weight_flops_before=9e9,
        weight_flops_after=5e9,
    )
    return replace(plain, **changes)


def graph_texts(blocks: int, lines: int = 120) -> GraphTexts:
    """Texts like those of a model with so many blocks: a pass that finds, and two that rewrite a fifth of the lines."""
    captured = [
        f"%{PREFIX}layers.{block}.node_{line} : f32[2, 256, 256] = torch._C._nn.linear(%input_{line}, %weight_{block})"
        for block in range(blocks)
        for line in range(lines)
    ]
    rows = [f"{line}    # select_loss_rows" if number % 5 == 0 else line for number, line in enumerate(captured)]
    sparse: list[str] = []
    for number, line in enumerate(rows):
        tag = f"    # sparsify_ffn {PREFIX}layers.{number // lines}.mlp"
        sparse += [f"%taken_{number} : f32[u0, 256] = take{tag}", f"{line}{tag}"] if number % 5 == 1 else [line]
    texts = GraphTexts()
    steps = {"captured": captured, "find_ffn": captured, "select_loss_rows": rows, "sparsify_ffn": sparse}
    texts.steps = {name: "\n".join(each) + "\n" for name, each in steps.items()}
    return texts
