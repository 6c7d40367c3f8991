"""A pass that fails leaves no trace: what then runs, and what is then known, is what `disable` of that pass gives."""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import fx

from decoder import DecoderConfig, Fp64Decoder
from graphs import IGNORE, PASS_NAMES, Captured, capture, stand_in_pass
from sparse_compile.compiler import runner
from sparse_compile.compiler.pipeline import PASSES
from sparse_compile.compiler.runner import PipelineResult, run_pipeline
from sparse_compile.compiler.verify import VerificationError
from sparse_compile.graph.text import render_graph
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.context import Facts, PassContext
from sparse_compile.passes.protocol import PassOutcome

EVERY_SITE = {"layers.0.mlp": 0.5, "layers.0.self_attn": 0.5}


@functools.cache
def captured_once() -> Captured:
    """Return the graph of a model with both kinds of sites and a head on the rows of the loss; runs leave it alone."""
    ids = torch.randint(61, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = IGNORE
    return capture(Fp64Decoder(DecoderConfig(layers=2)), ids, labels)


def run(fails: str = "", *, in_verifier: bool = False, **options: Any) -> tuple[PassContext, PipelineResult]:
    """Run the pipeline with fresh facts, one pass failing."""
    captured = captured_once()
    config = SparseLoRAConfig(layer_sparsity=EVERY_SITE, **options)
    ctx = PassContext(replace(captured.ctx.env, config=config))
    order = [
        stand_in_pass(_raising(each, before=not in_verifier), each) if each.name == fails else each for each in PASSES
    ]
    return ctx, run_pipeline(captured.gm, ctx, order=order)


@functools.cache
def run_without(name: str) -> tuple[PassContext, PipelineResult]:
    return run(disable=(name,))


def _raising(each: Any, *, before: bool) -> Any:
    """Return the work of a pass, which raises when all is done, or leaves a graph and facts that are illegal."""

    def work(gm: fx.GraphModule, ctx: PassContext) -> PassOutcome:
        outcome = each.run(gm, ctx)
        if before:
            raise RuntimeError("lost the thread")
        ctx.results = _Marked(ctx.results.providers, ctx.results.kernel_sources)
        return outcome

    return work


class _Marked(type(PassContext(None).results)):  # type: ignore[misc,arg-type]
    """Results that the broken verifier knows."""


def known(ctx: PassContext) -> dict[str, Any]:
    """Return all facts and results that can be compared; factors and parameters hold tensors."""
    facts = {each.name: getattr(ctx.facts, each.name) for each in fields(Facts) if each.name != "factors"}
    return {**facts, "factors": list(ctx.facts.factors), "providers": ctx.results.providers}


def texts(ctx: PassContext, result: PipelineResult) -> list[str]:
    graphs = (result.sparse, result.exact, result.canonical)
    return ["" if gm is None else render_graph(gm.graph, ctx.env.parameters) for gm in graphs]


@pytest.fixture(autouse=True)
def _without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the check of values to the other tests: here it is the same for both sides, and most of the time."""
    monkeypatch.setenv("SPARSELORA_VERIFY", "0")


@pytest.fixture
def verifier_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    verify = runner.verify

    def failing(gm: Any, captured: Any, stages: Any, ctx: PassContext, **given: Any) -> None:
        verify(gm, captured, stages, ctx, **given)
        if isinstance(ctx.results, _Marked):
            raise VerificationError("the graph is illegal")

    monkeypatch.setattr(runner, "verify", failing)


@pytest.mark.parametrize("name", PASS_NAMES)
def test_a_pass_that_raises_is_a_pass_that_is_disabled(name: str) -> None:
    assert_like_disabled(name, in_verifier=False, reason="RuntimeError: lost the thread")


@pytest.mark.parametrize("name", PASS_NAMES)
def test_a_pass_that_the_verifier_refuses_is_a_pass_that_is_disabled(name: str, verifier_that_fails: None) -> None:
    assert_like_disabled(name, in_verifier=True, reason="internal error: the graph is illegal")


def assert_like_disabled(name: str, *, in_verifier: bool, reason: str) -> None:
    with pytest.warns(UserWarning, match=f"sparselora: {name} failed, the pass is left out. {reason}") as seen:
        ctx, result = run(name, in_verifier=in_verifier)
    assert len(seen) == 1
    wanted_ctx, wanted = run_without(name)
    assert texts(ctx, result) == texts(wanted_ctx, wanted)
    assert known(ctx) == known(wanted_ctx)
    assert result.made_sparse == wanted.made_sparse and result.flops == wanted.flops
    assert [(each.rule, each.reason) for each in result.rejections if each.rule == name] == [(name, reason)]
    assert [each.name for each in result.failed] == [name] and wanted.failed == ()


def test_the_model_has_every_kind_of_site() -> None:
    ctx, result = run()
    assert result.made_sparse == {"ffn", "attention"} and ctx.facts.loss_rows is not None
    changed = {record.name for record in result.records if record.changed}
    assert changed >= {"select_loss_rows", "fuse_adapters", "insert_predictors", "lower_sparse_ops"}


def test_flops_are_counted_after_each_pass() -> None:
    """Each pass changes the count by what it leaves out, and by nothing else."""
    _, result = run()
    flops = dict(zip((record.name for record in result.records), result.flops, strict=True))
    assert flops["fuse_adapters"] == flops["order_adapter_products"]  # the same products, stacked
    assert flops["lower_sparse_ops"] == flops["sparsify_attention"]
    output, loss = 4, 4  # 2 of 6 positions in 2 sequences; the last position has no next label
    counts = dict(zip(sorted(flops["sparsify_ffn"].total.free_symbols, key=str), (loss, output), strict=True))
    assert [str(symbol) for symbol in counts] == ["loss", "output"]
    before, after = (flops[name].at(counts) for name in ("insert_predictors", "sparsify_ffn"))
    # Forward and gradient of the input of gate, up and down, (32, 48) each: half of the channels, 8 context tokens.
    assert before[1] - after[1] == 4 * 3 * 32 * 48 * 8 / 2


def test_flops_that_cannot_be_counted_cost_a_warning_and_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graph: fx.Graph) -> Any:
        raise KeyError("an op that nobody counts")

    monkeypatch.setattr(runner, "step_flops", fails)
    with pytest.warns(UserWarning, match="the FLOPs of a graph were not counted. KeyError: 'an op that nobody counts'"):
        _, result = run()
    assert result.sparse is not None and result.made_sparse == {"ffn", "attention"}
    with pytest.raises(KeyError):
        run(strict=True)


def test_flops_are_those_of_the_graph_that_runs() -> None:
    """Predictors whose sites stay dense are in the working graph, and not in the one that is compiled."""
    _, result = run(disable=("sparsify_ffn", "sparsify_attention"))
    flops = dict(zip((record.name for record in result.records), result.flops, strict=True))
    assert result.sparse is None and flops["insert_predictors"] != flops["factor_dora_norm"]
    assert result.flops_after == flops["factor_dora_norm"]
    _, sparse = run()
    assert sparse.flops_after == sparse.flops[-1]
