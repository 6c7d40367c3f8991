"""The verifier, proven by passes that are broken on purpose: each is caught, and the graph goes on without it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import CheckpointPolicy

from graphs import MLP, Head, aot_eager, capture, stand_in_pass, tokens
from sparse_compile.compiler.capture import capture_context
from sparse_compile.compiler.pipeline import PASSES
from sparse_compile.compiler.runner import run_pipeline
from sparse_compile.compiler.verify import STAGES, VerificationError, verify
from sparse_compile.graph.read import hinted_shape
from sparse_compile.graph.rewrite import Rewriter
from sparse_compile.graph.vocabulary import LINEAR
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome

OPS = torch.ops.sparselora
CONFIG = {"preset": "none", "layer_sparsity": {"body.0": 0.5}}


def node_named(gm: fx.GraphModule, start: str) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.name.startswith(start))


def drops_an_input(gm: fx.GraphModule, ctx: PassContext) -> None:
    labels = node_named(gm, "l_labels")
    with gm.graph.inserting_after(labels):
        other = gm.graph.placeholder("other")
    other.meta.update(labels.meta)
    labels.replace_all_uses_with(other)
    gm.graph.erase_node(labels)


def loses_the_outputs(gm: fx.GraphModule, ctx: PassContext) -> None:
    next(node for node in gm.graph.nodes if node.op == "output").args = ((),)


def splits_twice(gm: fx.GraphModule, ctx: PassContext) -> None:
    split = node_named(gm, "split_tokens")
    rewriter = Rewriter(gm, "broken")
    with rewriter.before(split):
        rewriter.call(OPS.split_tokens.default, split.args[0])


def takes_rows_of_no_split(gm: fx.GraphModule, ctx: PassContext) -> None:
    node = node_named(gm, "take_rows")
    node.args = (node.args[0], node.args[2], node_named(gm, "top_channels"), *node.args[3:])


def lets_a_choice_be_recomputed(gm: fx.GraphModule, ctx: PassContext) -> None:
    del node_named(gm, "top_channels").meta["recompute"]


def lets_a_split_be_recomputed(gm: fx.GraphModule, ctx: PassContext) -> None:
    node_named(gm, "split_tokens").meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE


def inserts_without_a_tag(gm: fx.GraphModule, ctx: PassContext) -> None:
    node = node_named(gm, "embedding")
    with gm.graph.inserting_after(node):
        gm.graph.call_function(torch.relu, (node,))


def uses_before_definition(gm: fx.GraphModule, ctx: PassContext) -> None:
    node_named(gm, "embedding").append(node_named(gm, "cross_entropy"))


def leaves_a_matmul(gm: fx.GraphModule, ctx: PassContext) -> None:
    # The weight of `up` has the shape (channels, width), so that the product of the hidden channels with it exists.
    up = next(node for node in gm.graph.nodes if "_up_modules_base_layer_parameters_weight_" in node.name)
    down = next(node for node in gm.graph.nodes if node.target is LINEAR and hinted_shape(node.args[0])[-1] == 12)
    rewriter = Rewriter(gm, "broken")
    with rewriter.before(down):
        rewriter.call(torch.matmul, down.args[0], up)


def leaves_out_a_provider(gm: fx.GraphModule, ctx: PassContext) -> None:
    node = node_named(gm, "put_rows")
    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "provider"}


def changes_the_dtype(gm: fx.GraphModule, ctx: PassContext) -> None:
    loss = node_named(gm, "cross_entropy")
    output = next(node for node in gm.graph.nodes if node.op == "output")
    rewriter = Rewriter(gm, "broken")
    with rewriter.before(output):
        output.replace_input_with(loss, rewriter.method("float", loss))


def changes_the_shape(gm: fx.GraphModule, ctx: PassContext) -> None:
    loss = node_named(gm, "cross_entropy")
    output = next(node for node in gm.graph.nodes if node.op == "output")
    rewriter = Rewriter(gm, "broken")
    with rewriter.before(output):
        output.replace_input_with(loss, rewriter.method("unsqueeze", loss, 0))


def records_another_dtype(gm: fx.GraphModule, ctx: PassContext) -> None:
    node = node_named(gm, "put_rows")
    node.meta["example_value"] = node.meta["example_value"].float()


def records_another_shape(gm: fx.GraphModule, ctx: PassContext) -> None:
    node = node_named(gm, "put_rows")
    node.meta["example_value"] = node.meta["example_value"].unsqueeze(0)


def records_the_rows_of_the_other_role(gm: fx.GraphModule, ctx: PassContext) -> None:
    output, context = (each for each in node_named(gm, "take_rows").users)
    output.meta["example_value"], context.meta["example_value"] = (
        each.meta["example_value"] for each in (context, output)
    )


BROKEN: dict[Callable[[fx.GraphModule, PassContext], None], tuple[str, str]] = {
    drops_an_input: ("insert_predictors", "the inputs changed: "),
    loses_the_outputs: ("insert_predictors", "the outputs changed from "),
    splits_twice: ("sparsify_ffn", "tokens are split by role more than once"),
    takes_rows_of_no_split: ("sparsify_ffn", "does not use the rows of the one split"),
    lets_a_choice_be_recomputed: ("insert_predictors", "could be recomputed: a near tie would choose other channels"),
    lets_a_split_be_recomputed: ("insert_predictors", "could be recomputed: each split is a host synchronisation"),
    inserts_without_a_tag: ("canonicalize_linears", "was inserted without a tag: use Rewriter"),
    uses_before_definition: ("canonicalize_linears", "the graph is malformed"),
    leaves_a_matmul: ("canonicalize_linears", "and is no linear"),
    leaves_out_a_provider: ("lower_sparse_ops", "has no provider"),
    changes_the_dtype: ("sparsify_ffn", "an output of torch.float64 () became torch.float32 ()"),
    changes_the_shape: ("sparsify_ffn", "an output of torch.float64 () became torch.float64 (1,)"),
    records_another_dtype: ("sparsify_ffn", "is recorded to hold dtype torch.float32, and computes torch.float64"),
    records_another_shape: ("sparsify_ffn", "is recorded to hold shape (1, 12, 8), and computes (12, 8)"),
    records_the_rows_of_the_other_role: ("sparsify_ffn", ", and computes (u0, 8)"),
}
ONLY_ON_REQUEST = (
    changes_the_dtype,
    changes_the_shape,
    records_another_dtype,
    records_another_shape,
    records_the_rows_of_the_other_role,
)


def order_with(broken: Callable[[fx.GraphModule, PassContext], None], after: str) -> list[Pass]:
    """Return the pipeline's passes, the named one doing its work and then the broken thing."""

    def both(each: Pass) -> Pass:
        def run(gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
            outcome = each.run(gm, ctx)
            broken(gm, ctx)
            return PassOutcome(True, outcome.stats, outcome.rejections)

        return stand_in_pass(run, each)

    return [both(each) if each.name == after else each for each in PASSES]


def run(broken: Callable[..., None], *, strict: bool) -> tuple[Any, Any]:
    after, _ = BROKEN[broken]
    captured = capture(Head(MLP()), *tokens(), config=SparseLoRAConfig(strict=strict, **CONFIG))
    return captured, run_pipeline(captured.gm, captured.ctx, order=order_with(broken, after))


@pytest.mark.parametrize("broken", BROKEN, ids=lambda each: each.__name__)
def test_caught_in_strict_mode(broken: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELORA_VERIFY", "1" if broken in ONLY_ON_REQUEST else "0")
    with pytest.raises(VerificationError) as error:
        run(broken, strict=True)
    assert BROKEN[broken][1] in str(error.value)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda each: each.__name__)
def test_falls_back_with_one_warning(broken: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELORA_VERIFY", "1" if broken in ONLY_ON_REQUEST else "0")
    after, reason = BROKEN[broken]
    with pytest.warns(UserWarning, match=f"sparselora: {after} failed") as caught:
        captured, result = run(broken, strict=False)
    assert len(caught) == 1 and reason in str(caught[0].message) and "internal error" in str(caught[0].message)
    assert [rejection.rule for rejection in result.rejections] == [after]
    if after == "canonicalize_linears":
        # An exact pass is left out, and with it what needs canonical linears.
        assert {record.name for record in result.records if record.skipped.startswith("needs")} >= {"find_projections"}
    # All passes behind it but the choice of providers are needed for a sparse graph.
    assert (result.sparse is None) == (after != "lower_sparse_ops")
    verify(result.canonical, captured.gm, {"captured"}, captured.ctx)


@pytest.mark.parametrize("broken", ONLY_ON_REQUEST, ids=lambda each: each.__name__)
def test_outputs_are_checked_on_request_only(broken: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELORA_VERIFY", "0")
    assert run(broken, strict=True)[1].sparse is not None


def test_a_sound_pipeline_passes_all_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELORA_VERIFY", "1")
    captured = capture(Head(MLP()), *tokens(), config=SparseLoRAConfig(strict=True, **CONFIG))
    assert run_pipeline(captured.gm, captured.ctx).sparse is not None


@pytest.mark.parametrize("does", ["inserts", "erases", "retargets"])
def test_a_pass_that_hides_its_change_is_found(does: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it rewrote would be handed to the next pass as a copy of the current graph."""
    monkeypatch.setenv("SPARSELORA_VERIFY", "1")

    def run(gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        loss = node_named(gm, "cross_entropy")
        if does == "inserts":
            rewriter = Rewriter(gm, "broken")
            with rewriter.before(loss):
                rewriter.method("float", loss.args[0])
        elif does == "erases":
            relu = node_named(gm, "relu")
            relu.replace_all_uses_with(relu.args[0])
            gm.graph.erase_node(relu)
        else:
            node_named(gm, "relu").target = F.silu
        return PassOutcome(False)

    order = [stand_in_pass(run, each) if each.name == "sparsify_attention" else each for each in PASSES]
    captured = capture(Head(MLP()), *tokens(), config=SparseLoRAConfig(**CONFIG))
    with pytest.warns(UserWarning, match="sparsify_attention failed.*rewrote the graph and says that it did not"):
        result = run_pipeline(captured.gm, captured.ctx, order=order)
    assert result.sparse is not None and result.failed[0].name == "sparsify_attention"


class MLPWithDropout(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(F.relu(self.up(x)), 0.5, self.training))


def test_dropout_in_a_region_is_checked_like_any_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel asks for the number of elements, which depends on data."""
    monkeypatch.setenv("SPARSELORA_VERIFY", "1")
    captured = capture(Head(MLPWithDropout()).train(), *tokens(), config=SparseLoRAConfig(strict=True, **CONFIG))
    result = run_pipeline(captured.gm, captured.ctx)
    assert result.sparse is not None
    assert sum("dropout" in str(node.target) for node in result.sparse.graph.nodes) == 2  # of either role


def test_values_are_checked_in_the_modes_of_the_graph() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x

    captured = capture(function, torch.zeros(2, 2))
    verify(captured.gm, captured.gm, {"captured"}, captured.ctx)
    product = node_named(captured.gm, "matmul")
    assert product.meta["example_value"].dtype == torch.bfloat16
    product.meta["example_value"] = product.meta["example_value"].float()
    with pytest.raises(VerificationError, match=r"hold dtype torch\.float32, and computes torch"):
        verify(captured.gm, captured.gm, {"captured"}, captured.ctx)
    assert not torch.is_autocast_enabled("cpu")


def test_fallback_trains_like_eager() -> None:
    """The function that is compiled after a failure is the user's own."""
    model, inputs = Head(MLP()), tokens()

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        ctx = capture_context(gm, example_inputs, SparseLoRAConfig(**CONFIG))
        result = run_pipeline(gm, ctx, order=order_with(splits_twice, "sparsify_ffn"))
        return aot_eager(result.sparse or result.canonical, example_inputs)

    with pytest.warns(UserWarning, match="sparsify_ffn failed"):
        loss = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    torch.testing.assert_close(loss, model(*inputs))


def test_unknown_stage() -> None:
    captured = capture(MLP(), torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(VerificationError, match=r"unknown stage \['polished'\]"):
        verify(captured.gm, captured.gm, {"captured", "polished"}, captured.ctx)


def test_every_stage_is_known() -> None:
    named = {stage for each in PASSES for stage in (*each.requires, *each.ensures)}
    assert named | {"captured"} == set(STAGES)


def test_no_warning_where_nothing_is_wrong() -> None:
    captured = capture(Head(MLP()), *tokens(), config=SparseLoRAConfig(**CONFIG))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_pipeline(captured.gm, captured.ctx)
