"""Checkpointed blocks become part of one flat graph, marked for recomputation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from graphs import (
    ANALYSES,
    Head,
    aot_eager,
    assert_golden,
    assert_like_masked_dense,
    capture,
    frozen,
    gradients_of,
    lora,
    rejections,
    render,
    run_passes,
    run_rewritten,
    targets,
    tokens,
)
from models import normal
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.reference import MaskedFFN
from tolerances import assert_close_rms

PASS = "inline_checkpoint_bodies"
CHECKPOINT = "tag_activation_checkpoint"


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = lora(8, 12), lora(12, 8)
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Checkpointed(nn.Module):
    def __init__(self, body: Callable[..., Any] | None = None, **options: Any):
        super().__init__()
        self.mlp = MLP()
        self.body = body or (lambda m, x: m.mlp(x))
        self.options = options

    def forward(self, x: Tensor) -> Any:
        return checkpoint(lambda y: self.body(self, y), x, use_reentrant=False, **self.options)


def marks(gm: torch.fx.GraphModule) -> dict[str, tuple[Any, Any]]:
    return {
        node.name: (node.meta["recompute"], node.meta.get("ac_graph_id"))
        for node in gm.graph.nodes
        if "recompute" in node.meta
    }


def test_golden_and_marks() -> None:
    captured = capture(Checkpointed(), normal(2, 8))
    before = render(captured)
    outcome = run_passes(captured, PASS)[PASS]
    assert outcome.changed and outcome.stats == {"inlined": 1}
    assert CHECKPOINT not in before.replace("higher_order.", "") or CHECKPOINT not in render(captured)
    marked = marks(captured.gm)
    assert len(marked) == len(targets(captured.gm)) and len(set(marked.values())) == 1
    assert next(iter(marked.values()))[0] is CheckpointPolicy.PREFER_RECOMPUTE
    assert_golden(PASS, render(captured))


def test_repeated_bodies_have_ids_of_their_own() -> None:
    captured = capture(nn.Sequential(Checkpointed(), Checkpointed()), normal(2, 8))
    assert run_passes(captured, PASS)[PASS].stats == {"inlined": 2}
    assert len({region for _, region in marks(captured.gm).values()}) == 2


def test_a_body_with_two_results_and_several_users() -> None:
    model = Checkpointed(lambda m, x: (m.mlp(x), x.relu()))
    captured = capture(lambda x: sum(y * y for y in model(x)), normal(2, 8))
    assert run_passes(captured, PASS)[PASS].changed
    assert CHECKPOINT not in targets(captured.gm)


def test_nested() -> None:
    inner = Checkpointed()
    outer = Checkpointed(lambda m, x: m.mlp(inner(x)).relu())
    captured = capture(outer, normal(2, 8))
    assert run_passes(captured, PASS)[PASS].stats == {"inlined": 2}
    assert targets(captured.gm).count("gelu") == 2


def test_idempotent_and_unrelated() -> None:
    captured = capture(Checkpointed(), normal(2, 8))
    run_passes(captured, PASS)
    assert not run_passes(captured, PASS)[PASS].changed
    assert not run_passes(capture(MLP(), normal(2, 8)), PASS)[PASS].changed


def test_dynamic_first_dimension() -> None:
    x = normal(5, 8)
    captured = capture(Checkpointed(), x, dynamic=((x, 0),))
    assert run_passes(captured, PASS)[PASS].changed


def test_forward_and_gradients() -> None:
    model, x = nn.Sequential(Checkpointed(), Checkpointed()), normal(3, 8).requires_grad_()
    ran = run_rewritten(model, x, only=(PASS,), compiler=aot_eager)
    actual, expected = (gradients_of(value.square().sum(), model, x) for value in (ran.value, model(x)))
    assert_close_rms(ran.value, model(x))
    for name, gradient in expected.items():
        assert_close_rms(actual[name], gradient, name=name)


def test_declines_a_policy_of_its_own() -> None:
    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        return CheckpointPolicy.PREFER_RECOMPUTE

    model = Checkpointed(context_fn=partial(create_selective_checkpoint_contexts, policy))
    captured = capture(model, normal(2, 8))
    assert rejections(run_passes(captured, PASS)[PASS]) == [
        "the checkpoint has a policy of its own (context_fn): sites inside stay dense"
    ]
    assert CHECKPOINT in " ".join(targets(captured.gm))


def test_a_policy_of_an_inner_checkpoint_is_left_alone() -> None:
    """What is around it is inlined all the same."""
    inner = Checkpointed(context_fn=partial(create_selective_checkpoint_contexts, []))
    outer = Checkpointed(lambda m, x: m.mlp(inner(x)).relu())
    captured = capture(outer, normal(2, 8))
    outcome = run_passes(captured, PASS)[PASS]
    assert outcome.stats == {"inlined": 1}
    assert rejections(outcome) == ["the checkpoint has a policy of its own (context_fn): sites inside stay dense"]
    (holder,) = captured.gm.graph.find_nodes(op="get_attr", target="nested_wrap_body_0")
    assert holder.meta["sparselora"] == {"pass": PASS, "site": ""}


@pytest.mark.parametrize("blocks", [1, 2])
def test_sparse_blocks_inside_checkpoints(blocks: int) -> None:
    """The choice is saved, never made again; products around it may be recomputed."""
    model = Head(*(Checkpointed() for _ in range(blocks)))
    inputs = tokens(rows=3)
    config = SparseLoRAConfig(layer_sparsity=dict.fromkeys((f"body.{i}.mlp" for i in range(blocks)), 0.6))
    assert_like_masked_dense(
        model,
        *inputs,
        labels=inputs[1],
        config=config,
        compiler=aot_eager,
        sites=lambda kept: [MaskedFFN(model.get_submodule(f"{name}.down"), found) for name, found in kept.items()],
    )
    captured = capture(model, *inputs, config=config)
    run_passes(captured, PASS, *ANALYSES, "insert_predictors", "sparsify_ffn")
    marked = marks(captured.gm)
    chosen = [mark for name, (mark, _) in marked.items() if name.startswith("top_channels")]
    assert chosen == [CheckpointPolicy.MUST_SAVE] * blocks
    assert any(name.startswith("gathered_linear") for name in marked)
