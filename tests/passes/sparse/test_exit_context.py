"""Context leaves before a block: the stream that is found, the graph behind it, and readers that keep it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from exited import context_exit
from graphs import (
    ANALYSES,
    Captured,
    aot_eager,
    assert_golden,
    capture,
    causal_loss,
    frozen,
    gradients_of,
    graph_eager,
    lora,
    rejections,
    render,
    run_passes,
    run_rewritten,
    targets,
    tokens,
)
from sparse_compile.graph.read import nodes_by_name, op_name
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.recipe import AffineMap
from sparse_compile.passes.protocol import PassOutcome
from sparse_compile.passes.read.residual_stream import BlockInput, block_input
from sparse_compile.reference import masked_dense, output_mask_from_labels
from sweeps import slow
from tolerances import assert_close_rms

PASS = "exit_context"
CONFIG = SparseLoRAConfig(layer_sparsity={}, context_exit=0.34)
"""Of three blocks, context leaves before the second."""


class SpeltOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "spelt out": SpeltOut,
    "a call": lambda: nn.LayerNorm(8),
    "two in a row": lambda: nn.Sequential(SpeltOut(), nn.LayerNorm(8)),
    "none": nn.Identity,
}
READERS = {"spelt out": {"pow", "mul"}, "a call": {"layer_norm"}, "two in a row": {"pow", "mul"}, "none": {"linear"}}
"""What reads the stream on the way to query, key and value."""


class Attention(nn.Module):
    def __init__(self, adapters: str) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            lora(8, 8) if name in adapters else nn.Linear(8, 8) for name in "qkvo"
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention behind a norm, with a residual connection; a feed-forward block where one is wanted."""

    def __init__(self, norm: nn.Module, ffn: bool, adapters: str) -> None:
        super().__init__()
        self.norm, self.self_attn = norm, Attention(adapters)
        self.up, self.down = (lora(8, 12), lora(12, 8)) if ffn else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm(x))
        return x if self.up is None or self.down is None else x + self.down(F.relu(self.up(x)))


class Stack(nn.Module):
    """Three blocks between an embedding and a causal loss; `more` is added to it, of what each block reads."""

    def __init__(
        self,
        norm: str,
        ffn: bool = True,
        adapters: str = "ko",
        more: Callable[[list[Tensor]], Any] = lambda streams: 0,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(NORMS[norm](), ffn, adapters) for _ in range(3)])
        self.head, self.more = nn.Linear(8, 11), more
        frozen(self)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        streams = [self.embed(input_ids)]
        for block in self.blocks:
            streams.append(block(streams[-1]))
        return causal_loss(self.head(streams[-1]), labels) + self.more(streams)


def captured_stack(*args: Any, config: SparseLoRAConfig = CONFIG, **kwargs: Any) -> Captured:
    return capture(Stack(*args, **kwargs), *tokens(rows=3), config=config)


def exited(captured: Captured, *before: str) -> PassOutcome:
    return run_passes(captured, *ANALYSES, "select_loss_rows", *before, "insert_predictors", PASS)[PASS]


def inputs_of(captured: Captured) -> list[BlockInput]:
    nodes = nodes_by_name(captured.gm.graph)
    return [block_input(site, nodes) for site in captured.ctx.facts.attention_sites]


@pytest.mark.parametrize("ffn", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_the_stream_of_each_block_is_found(norm: str, ffn: bool) -> None:
    """It is what the block adds its result to, and what the block before it has returned."""
    captured = captured_stack(norm, ffn)
    run_passes(captured, *ANALYSES)
    found, nodes = inputs_of(captured), nodes_by_name(captured.gm.graph)
    assert len(found) == 3 and op_name(found[0].stream) == "embedding", "of the first block nothing is added up"
    for each in found:
        out = nodes[each.site.output.output]
        (added,) = (user for user in out.users if op_name(user) == "add")
        assert each.stream in added.all_input_nodes, "a block adds to what it has read"
        assert added not in each.readers and {op_name(user) for user in each.readers} == READERS[norm]
        assert (each.stream is each.source) == (norm == "none")
    assert all(op_name(each.stream) == "add" for each in found[1:])


@pytest.mark.parametrize("norm", [slow("spelt out"), slow("two in a row"), "a call", slow("none")])
def test_blocks_behind_the_exit_compute_output_tokens_alone(norm: str) -> None:
    captured = captured_stack(norm)
    outcome = exited(captured)
    assert outcome.changed and not outcome.rejections
    assert outcome.stats["blocks"] == 2 and outcome.stats["nodes"] > 10 and outcome.stats["inserted"] > 10
    called = targets(captured.gm)
    assert called.count("queried_attention") == 2 and called.count("scaled_dot_product_attention") == 1
    assert called.count("query_slots") == 1 and called.count("observe_rows") == 1
    assert called.count("place_rows") >= 2, "the queries of two blocks"


def test_a_plan_without_an_exit_asks_for_nothing() -> None:
    assert exited(captured_stack("none", config=SparseLoRAConfig(layer_sparsity={}))) == PassOutcome(False)


def test_a_product_of_several_adapters_stays_whole() -> None:
    """Keys and values need all rows of it: those of queries are taken of its part."""
    captured = captured_stack("a call", adapters="qkvo")
    assert exited(captured, "fuse_adapters").changed
    called = targets(captured.gm)
    assert called.count("split_with_sizes") == 3 and called.count("queried_attention") == 2
    splits = [node for node in captured.gm.graph.nodes if op_name(node) == "split_with_sizes"]
    assert all(node.args[0].meta["example_value"].dim() == 3 for node in splits), "(batch, tokens, ranks)"


def test_golden() -> None:
    captured = captured_stack("none", ffn=False)
    assert exited(captured).changed
    assert_golden(PASS, render(captured))


READING: dict[str, tuple[Callable[[list[Tensor]], Tensor], str]] = {
    "the stream of the last block": (lambda streams: streams[2].square().mean(), "square"),
    "its first token": (lambda streams: streams[2][:, 0].sum(), "getitem"),
    "the end of the last block, which adds to it": (lambda streams: streams[3].cumsum(1).mean(), "x_2"),
}


@pytest.mark.parametrize("name", READING)
def test_another_reader_of_the_stream_keeps_context_in_it(name: str) -> None:
    more, reader = READING[name]
    captured = captured_stack("a call", more=more)
    outcome = exited(captured)
    (declined,) = outcome.rejections
    assert not outcome.changed, "and `run_passes` has seen that the graph is as it was"
    assert declined.node == "blocks.2.self_attn"
    assert declined.reason.startswith(reader) and declined.reason.endswith(" reads the residual stream of all tokens")
    plans = captured.ctx.facts.plan.sites
    assert not any(plan.left or plan.mapped for plan in plans)
    behind = [plan for plan in plans if plan.reason.startswith("context cannot leave before it: ")]
    assert {plan.site.name for plan in behind} >= {"blocks.1.self_attn", "blocks.2.self_attn"}
    assert all(plan.reason.endswith(declined.reason) for plan in behind)


@pytest.mark.parametrize("place", [slow(0), 1])
def test_a_reader_in_front_of_the_exit_keeps_nothing(place: int) -> None:
    """Of the block of the exit, context tokens are computed all the same."""
    more = (lambda streams: streams[0].square().mean(), lambda streams: streams[1].square().mean())[place]
    outcome = exited(captured_stack("none", more=more))
    assert outcome.changed and rejections(outcome) == []


@pytest.mark.parametrize(
    ("norm", "compiler"), [("a call", graph_eager), slow("spelt out", aot_eager), slow("none", aot_eager)]
)
def test_values_and_gradients_are_those_of_the_oracle(norm: str, compiler: Callable[..., Any]) -> None:
    """With maps of zeros: context is seen as it was at the exit."""
    model, (ids, labels) = Stack(norm), tokens(rows=3)
    ran = run_rewritten(model, ids, labels, config=CONFIG, compiler=compiler)
    assert "exit" in ran.result.made_sparse
    zeros = AffineMap(*(torch.zeros(shape, dtype=torch.float64) for shape in ((1, 8), (8, 1), (8,))))
    site = context_exit(model, {"blocks.2.self_attn": zeros}, 1)
    with masked_dense([site], output_mask_from_labels(labels)):
        expected = model(ids, labels)
    assert_close_rms(ran.value, expected, name="loss")
    wanted = gradients_of(expected, model)
    for name, found in gradients_of(ran.value, model).items():
        assert wanted[name].any()
        assert_close_rms(found, wanted[name], name=name)
    assert (model(ids, labels) - expected).abs() > 1e-6
