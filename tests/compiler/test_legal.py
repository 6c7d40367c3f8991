"""The rules of the legal graph: a broken graph, or a broken fact, for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from decoder import DecoderConfig, Fp64Decoder
from graphs import IGNORE, capture
from sparse_compile.compiler.legal import RULES, STAGES, Checked
from sparse_compile.compiler.runner import run_pipeline
from sparse_compile.graph.facts import SparsityPlan
from sparse_compile.graph.rewrite import Rewriter, copy_graph_module
from sparse_compile.kernels.tables import PROVIDERS
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.context import PassContext

OPS = torch.ops.sparselora


@pytest.fixture(scope="module")
def legal() -> Checked:
    """A graph that went through all stages, both kinds of sites sparse."""
    ids = torch.randint(61, (2, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = IGNORE
    config = SparseLoRAConfig(layer_sparsity={"layers.0.mlp": 0.5, "layers.0.self_attn": 0.5})
    captured = capture(Fp64Decoder(DecoderConfig(layers=2)), ids, labels, torch.ones_like(ids), config=config)
    result = run_pipeline(captured.gm, captured.ctx)
    assert result.sparse is not None
    return Checked(result.sparse, captured.gm, frozenset(STAGES), captured.ctx)


def of(checked: Checked, target: Any) -> fx.Node:
    return checked.calls(target)[0]


def loses_an_output(checked: Checked) -> None:
    checked.gm.graph.output_node().args = ((),)


def inserts_without_a_tag(checked: Checked) -> None:
    node = of(checked, OPS.put_rows.default)
    with checked.gm.graph.inserting_after(node):
        checked.gm.graph.call_function(torch.relu, (node,))


def lets_a_choice_be_recomputed(checked: Checked) -> None:
    del of(checked, OPS.top_channels.default).meta["recompute"]


def splits_twice(checked: Checked) -> None:
    split = of(checked, OPS.split_tokens.default)
    rewriter = Rewriter(checked.gm, "broken")
    with rewriter.before(split):
        rewriter.call(OPS.split_tokens.default, split.args[0])


def without_predictors(checked: Checked) -> Checked:
    return replace(checked, stages=checked.stages - {"predictors"})


def leaves_a_matmul(checked: Checked) -> None:
    node = of(checked, torch.nn.functional.scaled_dot_product_attention)
    weight = next(each for each in checked.gm.graph.nodes if "q_proj" in each.name and "lora" not in each.name)
    rewriter = Rewriter(checked.gm, "broken")
    with rewriter.before(node):
        flat = rewriter.method("reshape", node.args[0], -1, 32)
        rewriter.call(torch.matmul, flat, weight)


def fact(**changed: Any) -> Callable[[Checked], None]:
    """Return what puts other facts in the place of some."""

    def change(checked: Checked) -> None:
        values = {name: make(checked) for name, make in changed.items()}
        checked.ctx.facts = replace(checked.ctx.facts, **values)

    return change


def _trained(checked: Checked) -> Any:
    base, projection = next(iter(checked.facts.projections.items()))
    trained = next(name for name, parameter in checked.ctx.env.parameters.items() if parameter.trained)
    return {base: replace(projection, weight=trained)}


def _ffn(**changed: Any) -> Callable[[Checked], Any]:
    return lambda checked: tuple(replace(site, **changed) for site in checked.facts.ffn_sites)


def _narrow_output(checked: Checked) -> Any:
    return tuple(replace(site, output=replace(site.output, in_features=1)) for site in checked.facts.ffn_sites)


def _other_heads(checked: Checked) -> Any:
    return tuple(replace(site, head_dim=3) for site in checked.facts.attention_sites)


def _roles_from_weights(checked: Checked) -> Any:
    return replace(checked.facts.roles, labels=((next(iter(checked.ctx.env.parameters)), 1),))


def _nothing_kept(checked: Checked) -> Any:
    return SparsityPlan(tuple(replace(plan, kept=0) for plan in checked.facts.plan.sites))


def ranks_what_a_gradient_reaches(checked: Checked) -> None:
    node = of(checked, OPS.top_channels.default)
    node.args = (node.args[0].args[0], *node.args[1:])  # type: ignore[union-attr]


def takes_rows_of_no_split(checked: Checked) -> None:
    node = of(checked, OPS.take_rows.default)
    node.args = (node.args[0], node.args[2], of(checked, OPS.top_channels.default), *node.args[3:])


def gathers_what_nobody_chose(checked: Checked) -> None:
    node = of(checked, OPS.gathered_linear.default)
    rewriter = Rewriter(checked.gm, "broken")
    with rewriter.before(node):
        node.update_arg(2, rewriter.call(torch.arange, 4))


def leaves_out_a_provider(checked: Checked) -> None:
    node = of(checked, OPS.put_rows.default)
    node.kwargs = {key: value for key, value in node.kwargs.items() if key != "provider"}


def names_another_provider(checked: Checked) -> None:
    of(checked, OPS.put_rows.default).update_kwarg("provider", "abacus")


def still_roles(checked: Checked) -> Checked:
    """Before predictors were inserted, the labels must be there to be read."""
    return replace(checked, stages=frozenset({"captured", "roles"}))


BROKEN: list[tuple[str, Callable[[Checked], Any], str]] = [
    ("captured", loses_an_output, "the outputs changed from"),
    ("captured", inserts_without_a_tag, "was inserted without a tag"),
    ("captured", lets_a_choice_be_recomputed, "could be recomputed: a near tie"),
    ("captured", splits_twice, "tokens are split by role more than once"),
    ("captured", without_predictors, "stands in a graph without predictors"),
    ("canonical", leaves_a_matmul, "and is no linear"),
    ("projections", fact(projections=_trained), "is no frozen layer"),
    ("ffn", fact(projections=lambda checked: {}), "which is no frozen layer of the graph"),
    ("ffn", fact(ffn_sites=_narrow_output), "in-projections of width [48] feed 1 channels"),
    ("attention", fact(attention_sites=_other_heads), "the query projection has 32 channels, its heads have 12"),
    ("roles", fact(roles=_roles_from_weights), "which holds no integers of the graph"),
    ("plan", fact(plan=_nothing_kept), "the plan keeps 0 of"),
    ("plan", fact(roles=lambda checked: None), "nothing tells context tokens from output tokens"),
    ("plan", fact(factors=lambda checked: {}), "has no factors"),
    ("plan", fact(ffn_sites=lambda checked: ()), "which is no site of the graph"),
    ("predictors", fact(selections=lambda checked: {}), "nothing chooses its channels"),
    ("predictors", ranks_what_a_gradient_reaches, "ranks a score that a gradient could reach"),
    ("sparse", takes_rows_of_no_split, "does not use the rows of the one split"),
    ("sparse", gathers_what_nobody_chose, "gathers channels that no predictor chose"),
    ("lowered", leaves_out_a_provider, "has no provider"),
    ("lowered", names_another_provider, "names the provider 'abacus'"),
]


def faults(checked: Checked) -> dict[tuple[str, str], list[str]]:
    """Return by stage and rule what is wrong."""
    found = {(rule.stage, rule.holds): list(rule.faults(checked)) for rule in RULES if rule.stage in checked.stages}
    return {key: each for key, each in found.items() if each}


def test_a_legal_graph_has_no_fault(legal: Checked) -> None:
    assert faults(legal) == {}


@pytest.mark.parametrize(("stage", "breaks", "fault"), BROKEN, ids=lambda each: getattr(each, "__name__", None))
def test_a_broken_graph_is_found(legal: Checked, stage: str, breaks: Callable[[Checked], Any], fault: str) -> None:
    broken = replace(legal, gm=copy_graph_module(legal.gm), ctx=PassContext(legal.ctx.env, legal.ctx.facts))
    if stage == "roles":
        broken = still_roles(broken)
    broken = breaks(broken) or broken
    found = [each for (where, _), reasons in faults(broken).items() if where == stage for each in reasons]
    assert any(fault in each for each in found), faults(broken)


def test_every_stage_has_a_rule_and_every_rule_a_broken_graph(legal: Checked) -> None:
    assert [stage for stage in STAGES if stage not in {rule.stage for rule in RULES}] == []
    assert [rule.stage for rule in RULES] == sorted((rule.stage for rule in RULES), key=STAGES.index)
    seen = set()
    for stage, breaks, _ in BROKEN:
        broken = replace(legal, gm=copy_graph_module(legal.gm), ctx=PassContext(legal.ctx.env, legal.ctx.facts))
        broken = still_roles(broken) if stage == "roles" else broken
        seen |= set(faults(breaks(broken) or broken))
    assert {(rule.stage, rule.holds) for rule in RULES} == seen


def test_the_table_of_providers_holds_every_op_that_has_some() -> None:
    names = [name for name in dir(OPS) if hasattr(getattr(OPS, name), "default")]
    ops = [getattr(OPS, name).default for name in names]
    with_provider = {op for op in ops if any(argument.name == "provider" for argument in op._schema.arguments)}
    assert with_provider == set(PROVIDERS)
