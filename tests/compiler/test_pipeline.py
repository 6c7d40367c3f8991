"""The pipeline: its order, what it skips, what it undoes, and that analyses leave graphs alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

from graphs import PASS_NAMES, Captured, Head, capture, frozen, lora, stand_in_pass, tokens
from sparse_compile.compiler.pipeline import PASSES, in_order
from sparse_compile.compiler.runner import run_pipeline
from sparse_compile.graph.text import render_graph
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.pass_names import pass_names
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Numerics, Pass, PassOutcome
from sparse_compile.passes.sites.find_ffn import FindFFN

# Sparsity without the exact optimisations, which have a test of their own below.
SPARSE = {"preset": "none", "layer_sparsity": {"body.0": 0.5}}


class MLP(nn.Module):
    """Its first product is spelt as a matmul, so that an exact pass has something to do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(8, 12)), lora(12, 8)
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(x @ self.up))


def captured_with(**options: object) -> Captured:
    return capture(Head(MLP()), *tokens(), config=SparseLoRAConfig(**options))  # type: ignore[arg-type]


def replaced(name: str, function: object) -> list[Pass]:
    return [stand_in_pass(function, each) if each.name == name else each for each in PASSES]  # type: ignore[arg-type]


def fails(gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
    # Half of its work is done already: none of it may be seen.
    for node in list(gm.graph.nodes):
        if node.op == "call_function":
            node.args = ()
    raise RuntimeError("lost the thread")


def test_every_module_of_a_chapter_is_a_pass_of_its_name() -> None:
    assert set(PASS_NAMES) == pass_names() and len(set(PASS_NAMES)) == len(PASSES)
    assert all(each.name == type(each).__module__.rpartition(".")[2] for each in PASSES)


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (("canonicalize_linears", "expose_4bit_weights"), "canonicalize_linears stands before expose_4bit_weights"),
        (("find_projections",), "find_projections requires canonical, which no pass before it ensures"),
        (("canonicalize_linears", "canonicalize_linears"), "a pass stands twice"),
    ],
)
def test_an_order_that_breaks_a_declaration(order: tuple[str, ...], reason: str) -> None:
    by_name = {each.name: each for each in PASSES}
    with pytest.raises(ValueError, match=reason):
        in_order(by_name[name] for name in order)


@pytest.mark.parametrize(("declared", "reason"), [("ensures", "the stage polished"), ("after", "follow polished")])
def test_a_declaration_of_what_does_not_exist(declared: str, reason: str) -> None:
    broken = type("Polish", (FindFFN,), {"name": "find_ffn", "requires": ("captured",), declared: ("polished",)})
    with pytest.raises(ValueError, match=reason):
        in_order([broken()])


def test_passes_have_no_state() -> None:
    assert not any(vars(each) for each in PASSES)


def test_a_whole_run() -> None:
    captured = captured_with(**SPARSE)
    before = render_graph(captured.gm.graph, captured.ctx.env.parameters)
    result = run_pipeline(captured.gm, captured.ctx)
    assert result.sparse is not None and result.rejections == ()
    changed = [record.name for record in result.records if record.changed]
    assert changed == ["canonicalize_linears", "insert_predictors", "sparsify_ffn", "lower_sparse_ops"]
    assert [record.name for record in result.records] == list(PASS_NAMES)
    assert {record.numerics for record in result.records} == {"exact", "approximate", "requested"}
    for record, following in zip(result.records, result.records[1:], strict=False):
        assert record.nodes_after == following.nodes_before and record.milliseconds >= 0
    # The captured graph is as it was, and the canonical one lies between the two.
    assert render_graph(captured.gm.graph, captured.ctx.env.parameters) == before
    assert "sparselora" not in render_graph(result.canonical.graph, captured.ctx.env.parameters)
    assert result.canonical is not captured.gm


@pytest.mark.parametrize("options", [{"preset": "none"}, {"preset": "none", "layer_sparsity": {"body.0": 0.0}}])
def test_a_plan_of_nothing_compiles_what_was_captured(options: dict[str, object]) -> None:
    captured = captured_with(**options)
    result = run_pipeline(captured.gm, captured.ctx)
    assert result.sparse is None and result.exact is None


def test_an_exact_optimisation_runs_with_sparse_sites_and_without() -> None:
    captured = captured_with(layer_sparsity=SPARSE["layer_sparsity"])
    result = run_pipeline(captured.gm, captured.ctx)
    graphs = (result.canonical, result.exact, result.sparse)
    texts = [render_graph(graph.graph, captured.ctx.env.parameters) for graph in graphs if graph is not None]
    assert ["select_rows" in text for text in texts] == [False, True, True]
    assert ["gathered_linear" in text for text in texts] == [False, False, True]


def test_both_numbers_of_rows_are_read_at_once() -> None:
    captured = captured_with(layer_sparsity=SPARSE["layer_sparsity"])
    result = run_pipeline(captured.gm, captured.ctx)
    assert result.sparse is not None and result.exact is not None
    (counts,) = [node for node in result.sparse.graph.nodes if "row_counts" in str(node.target)]
    assert sorted(str(user.target) for user in counts.users) == [
        "sparselora.loss_rows.default", "sparselora.split_tokens.default",
    ]  # fmt: skip
    assert "row_counts" not in render_graph(result.exact.graph, captured.ctx.env.parameters)


def test_preset_none_leaves_out_what_only_saves_work() -> None:
    captured = captured_with(**SPARSE)
    records = {record.name: record for record in run_pipeline(captured.gm, captured.ctx).records}
    optimising = {each.name for each in PASSES if each.optimises}
    assert optimising and all(records[name].skipped == "preset 'none'" for name in optimising)
    assert not any(record.skipped for name, record in records.items() if name not in optimising)


@pytest.mark.parametrize("name", PASS_NAMES)
def test_disable(name: str) -> None:
    captured = captured_with(disable=(name,), **SPARSE)
    result = run_pipeline(captured.gm, captured.ctx)
    records = {record.name: record for record in result.records}
    assert records[name].skipped == "disabled" and not records[name].changed
    needs = {
        "canonicalize_linears": {"find_projections": "needs canonical", "trace_roles": "needs canonical"},
        "insert_predictors": {"sparsify_ffn": "needs predictors", "lower_sparse_ops": "needs predictors"},
    }.get(name, {})
    for skipped, reason in needs.items():
        assert records[skipped].skipped == reason
    # The model has a feed-forward site alone. An analysis that is left out has found nothing, and the rest goes on.
    not_needed = (
        "preserve_weight_mask",
        "plan_token_slots",
        "select_loss_rows",
        "order_adapter_products",
        "fuse_adapters",
        "factor_dora_norm",
        "inline_checkpoint_bodies",
        "expose_4bit_weights",
        "find_attention",
        "exit_context",
        "sparsify_attention",
        "fuse_products",
        "fuse_scores",
        "fuse_adapted_layers",
        "lower_sparse_ops",
        "lower_frozen_linears",
        "lower_causal_attention",
    )
    assert (result.sparse is not None) == (name in not_needed)


def test_a_failing_exact_pass_is_left_out() -> None:
    captured = captured_with(**SPARSE)
    with pytest.warns(UserWarning, match="canonicalize_linears failed, the pass is left out. Runtime") as seen:
        result = run_pipeline(captured.gm, captured.ctx, order=replaced("canonicalize_linears", fails))
    assert len(seen) == 1
    assert result.sparse is None and result.canonical is captured.gm
    assert [(r.rule, r.node, r.reason) for r in result.rejections] == [
        ("canonicalize_linears", "graph", "RuntimeError: lost the thread")
    ]


@pytest.mark.parametrize("name", ["canonicalize_linears", "find_ffn", "sparsify_ffn"])
def test_strict_raises(name: str) -> None:
    captured = captured_with(strict=True, **SPARSE)
    with pytest.raises(RuntimeError, match="lost the thread"):
        run_pipeline(captured.gm, captured.ctx, order=replaced(name, fails if name != "find_ffn" else raises))


def raises(gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
    raise RuntimeError("lost the thread")


def test_analyses_leave_the_graph_alone() -> None:
    captured = captured_with(**SPARSE)
    analyses = [each for each in PASSES if each.analysis]
    assert len(analyses) == 6 and all(each.numerics is Numerics.EXACT for each in analyses)
    next(each for each in PASSES if each.name == "canonicalize_linears").run(captured.gm, captured.ctx)
    before = render_graph(captured.gm.graph, captured.ctx.env.parameters)
    for each in analyses:
        assert not each.run(captured.gm, captured.ctx).changed
        assert render_graph(captured.gm.graph, captured.ctx.env.parameters) == before, each.name


def test_rejections_of_all_passes_are_kept() -> None:
    captured = capture(Head(MLP(), loss=lambda z, y: z.sum() + y.sum()), *tokens(), config=SparseLoRAConfig(**SPARSE))
    result = run_pipeline(captured.gm, captured.ctx)
    assert [rejection.rule for rejection in result.rejections] == ["trace_roles", "plan_sparsity"]
