"""The text of a report: words first, equal blocks in one line, a reason for each dense site."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from reports import PREFIX, graph_report, pass_report, site
from sparse_compile import Recipe, SparseLoRAConfig
from sparse_compile.compiler.report import Report, report_of
from sparse_compile.compiler.report_text import graph_text
from sparse_compile.compiler.report_words import flops_words, note_of, pass_words, summary, summary_of
from sparse_compile.graph.cost_note import cost_note
from sparse_compile.graph.facts import MaskedLayer, ProductOrder, Rejection

BLOCKS = (
    site("layers.0.mlp", 48, 48),
    *(site(f"layers.{block}.mlp") for block in range(1, 16)),
)


def lines_of(report: Report) -> list[str]:
    return str(report).splitlines()


# --- The summary ------------------------------------------------------------------------------------------------------


def test_the_summary_comes_first_and_is_in_words() -> None:
    report = Report((graph_report(*BLOCKS),), {"preset": "o2"}, "config")
    assert lines_of(report)[:7] == [
        "15 of 16 sites sparse, 60% of the FLOPs of a dense step (6 GFLOP of 10 GFLOP).",
        "  Exact rewrites save 10% of the FLOPs, sparsity (an approximation) 30%.",
        "  30 context and 10 output tokens, told apart by the labels of the loss.",
        "  112 frozen linear layers with 48 adapters.",
        "  The passes took 0.8 s on this machine; Inductor's compilation comes on top.",
        "",
        "options, from config: preset='o2'",
    ]


def test_a_time_is_named_where_a_calibration_measured_one_and_nowhere_else() -> None:
    config = SparseLoRAConfig(recipe=Recipe({}, {"step_seconds": 3.0, "expected_step_seconds": 1.5}))
    said = "measured 3 s for a dense step, and expects 1.5 s of a sparse one (2.00x as fast)"
    assert said in str(report_of([graph_report(*BLOCKS)], [], config, "config"))
    counted = SparseLoRAConfig(recipe=Recipe({}, {"expected_flops": 0.5}))
    for each in (counted, SparseLoRAConfig()):
        assert "as fast" not in str(report_of([graph_report(*BLOCKS)], [], each, "config"))


def test_a_model_without_a_sparse_site_is_told_why() -> None:
    dense = [replace(each, kept=48, why_dense="too narrow") for each in BLOCKS[1:]]
    assert summary(Report((graph_report(*dense),)))[0].endswith(" All are dense because: too narrow.")
    assert summary(Report((graph_report(BLOCKS[0], *dense),)))[0].endswith(" 15 are dense because: too narrow.")


def test_flops_that_were_not_counted_are_not_named() -> None:
    unknown = graph_report(
        *BLOCKS, flops_before=math.nan, flops_after=math.nan, passes=(pass_report("find_ffn", math.nan, math.nan),)
    )
    assert lines_of(Report((unknown,)))[0] == "15 of 16 sites sparse, FLOPs were not counted."
    assert "nan" not in str(Report((unknown,)))


def test_passes_that_were_left_out_are_named_with_the_reason() -> None:
    off = pass_report("fuse_adapters", 6e9, 6e9, skipped="disabled")
    report = Report((graph_report(*BLOCKS, passes=(off,)),))
    assert "  Left out (disabled): fuse_adapters." in lines_of(report)


def test_roles_that_nothing_gives() -> None:
    assert "Nothing tells output tokens from context" in str(Report((graph_report(*BLOCKS, roles=None),)))


@pytest.mark.parametrize(
    ("flops", "words"),
    [(0.0, "0 FLOP"), (999.0, "999 FLOP"), (1.2345e7, "12.3 MFLOP"), (2e12, "2 TFLOP"), (math.nan, "unknown FLOPs")],
)
def test_flops_in_words(flops: float, words: str) -> None:
    assert flops_words(flops) == words


# --- Sites ------------------------------------------------------------------------------------------------------------


def test_equal_blocks_are_one_line() -> None:
    lines = lines_of(Report((graph_report(*BLOCKS),)))
    start = lines.index(f"sites (each name begins with {PREFIX}):")
    assert [line.split("  ")[0] for line in lines[start + 2 : start + 4]] == ["layers.0.mlp", "layers.1-15.mlp"]
    assert lines[start + 2].endswith("first block, always dense") and "12 of 48 channels" in lines[start + 3]
    assert lines[start + 4] == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kept": 48, "why_dense": "too small"}, "all (dense)"),
        ({"kept": 0, "provider": "map of rank 8"}, "a map of rank 8"),
        ({"kept": 0, "left": True, "provider": "context left"}, "nothing: they have left"),
        ({"kind": "attention", "kept": 48, "left": True, "provider": "context left"}, "keys and values alone"),
        (
            {"kind": "attention", "kept": 48, "left": True, "provider": "context left, map of rank 8"},
            "keys and values alone, and a map of rank 8",
        ),
    ],
)
def test_what_becomes_of_context(changes: dict[str, object], words: str) -> None:
    text = graph_text(graph_report(replace(site("layers.1.mlp"), **changes)))  # type: ignore[arg-type]
    assert words in text and "computed by" not in text


def test_a_site_that_does_not_pay() -> None:
    note = cost_note(1.0, 2.0)
    assert note_of(site("a", 48, 48, reason=note, why_dense=note)) == f"does not pay: {note}"
    assert note_of(site("a", reason=note)) == f"named in the options, but does not pay: {note}"


# --- What was declined, and tables ------------------------------------------------------------------------------------


def test_reasons_have_places_instead_of_nodes() -> None:
    places = {f"view_{block}": f"{PREFIX}layers.{block}.self_attn" for block in range(3)}
    rejections = (
        *(Rejection("find_attention", node, f"add_{at} is no sum") for at, node in enumerate(places)),
        Rejection("find_ffn", "mul_7", "the product is read elsewhere"),
        Rejection("exit_context", "graph", "it is cut"),
        Rejection("plan_sparsity", BLOCKS[0].name, BLOCKS[0].why_dense),
    )
    lines = lines_of(Report((graph_report(*BLOCKS, rejections=rejections, places=places),)))
    assert lines[lines.index("declined:") + 1 :] == [
        "  find_attention: add is no sum (layers.0-2.self_attn)",
        "  find_ffn: the product is read elsewhere (mul_7)",
        "  exit_context: it is cut",
    ], "what the table of the sites says is not said again"


def test_only_so_many_reasons() -> None:
    many = [Rejection("find_ffn", name, f"reason {name}") for name in "abcd"]
    assert summary_of(many, most=3)[-1] == "  and 1 more reasons" and len(summary_of(many, most=4)) == 4


def test_orders_of_products_are_explained() -> None:
    def order(layer: str, name: str, pays: str) -> ProductOrder:
        return ProductOrder(f"{PREFIX}{layer}", name, 64, (), 0.0, pays)

    orders = (
        *(order(f"layers.{block}.q", "F2B5", f"N > {9 - block}") for block in range(4)),
        order("layers.0.k", "F1B1", "never"),
    )
    rows = [line for line in lines_of(Report((graph_report(*BLOCKS, orders=orders),))) if "layers." in line][-2:]
    assert rows[0].startswith("merged into the weight in forward and backward  layers.0-3.q")
    assert rows[0].endswith("more than 6 to 9, by the layer")
    assert rows[1].startswith("apart, as the model has them ") and rows[1].endswith("never")


def test_pruned_layers_of_equal_blocks_are_one_line() -> None:
    masks = tuple(MaskedLayer(f"{PREFIX}layers.{b}.up", "n", 0.5 + b / 100, "2:4", 0.0) for b in range(3))
    row = next(line for line in lines_of(Report((graph_report(*BLOCKS, masks=masks),))) if "layers.0-2.up" in line)
    assert row.split()[1:] == ["50.0%", "to", "52.0%", "2:4", "kept"]


def test_several_graphs_have_a_title_each() -> None:
    report = Report((graph_report(*BLOCKS), graph_report(compile_id="1/0", roles=None)))
    titles = [line.split(":")[0] for line in lines_of(report) if line.startswith("graph ")]
    assert titles == ["graph 0/0", "graph 1/0"]
    assert "no site: no block of frozen linear layers" in str(report)


def test_each_pass_is_described() -> None:
    assert pass_words("select_loss_rows").endswith(".") and pass_words("nothing") == ""
