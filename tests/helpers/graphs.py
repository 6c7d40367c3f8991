"""Capture the graph that Dynamo hands to the backend, run passes on it, and run what they made of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

import sparse_compile.kernels  # noqa: F401 - registers torch.ops.sparselora
from decoder import LoRALinear, randomize
from sparse_compile.compiler.capture import capture_context
from sparse_compile.compiler.outputs import restored
from sparse_compile.compiler.pipeline import PASSES
from sparse_compile.compiler.runner import PipelineResult, run_pipeline
from sparse_compile.compiler.verify import verify
from sparse_compile.graph.read import op_name
from sparse_compile.graph.rewrite import copy_graph_module
from sparse_compile.graph.text import render_graph
from sparse_compile.kernels.channel_selection import record_channels
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import Pass, PassOutcome
from sparse_compile.reference import MaskedAttention, MaskedFFN, masked_dense, output_mask_from_labels
from tolerances import assert_close_rms

PASS_NAMES = tuple(each.name for each in PASSES)
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
IGNORE = -100


# --- Capture ----------------------------------------------------------------------------------------------------------


class Captured(NamedTuple):
    """A graph as the backend receives it, with a fresh context."""

    gm: fx.GraphModule
    ctx: PassContext


def capture(
    function: Callable[..., Any],
    *args: Any,
    config: SparseLoRAConfig | None = None,
    dynamic: tuple[tuple[Tensor, int], ...] = (),
    **kwargs: Any,
) -> Captured:
    """Return the graph of `function(*args, **kwargs)`, which must be one; nothing of it is run.

    Args:
        function: A module or a function that closes over modules.
        *args: Its arguments.
        config: Options of the context.
        dynamic: Pairs of an argument and one of its dimensions, to be traced with a symbolic size.
        **kwargs: More of its arguments.
    """
    found: list[Captured] = []

    class _EnoughError(Exception):
        pass

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(Captured(gm, capture_context(gm, example_inputs, config or SparseLoRAConfig())))
        raise _EnoughError

    torch._dynamo.reset()
    for tensor, dim in dynamic:
        torch._dynamo.mark_dynamic(tensor, dim)
    try:
        torch.compile(function, backend=backend, fullgraph=True)(*args, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, _EnoughError):
            raise
    (captured,) = found
    return captured


def run_passes(captured: Captured, *names: str) -> dict[str, PassOutcome]:
    """Run the named passes on the captured graph in place, verified like the pipeline does; return their outcomes."""
    by_name = {each.name: each for each in PASSES}
    original = copy_graph_module(captured.gm)
    outcomes = {}
    stages = {"captured", *(["predictors"] if captured.ctx.facts.selections else [])}
    for name in names:
        before = render(captured)
        outcomes[name] = by_name[name].run(captured.gm, captured.ctx)
        stages |= set(by_name[name].ensures)
        verify(captured.gm, original, stages, captured.ctx, changed=outcomes[name].changed)
        if not outcomes[name].changed:
            assert render(captured) == before, f"{name} changed the graph and did not say so"
    captured.gm.recompile()
    return outcomes


ANALYSES = ("canonicalize_linears", "find_projections", "find_ffn", "find_attention", "trace_roles", "plan_sparsity")
"""The passes up to the plan."""


def rejections(outcome: PassOutcome) -> list[str]:
    """Return the reasons of an outcome."""
    return [rejection.reason for rejection in outcome.rejections]


def targets(gm: fx.GraphModule) -> list[str]:
    """Return the names of what the graph calls, in order."""
    return [op_name(node) for node in gm.graph.nodes if node.op in ("call_function", "call_method")]


def stand_in_pass(function: Callable[[fx.GraphModule, PassContext], PassOutcome], like: Pass) -> Pass:
    """Return a pass with the name and stages of another that runs `function`."""
    kind = type(like)
    body = {"name": like.name, "run": lambda self, gm, ctx: function(gm, ctx)}
    return type(kind.__name__, (kind,), body)()  # type: ignore[no-any-return]


# --- Text -------------------------------------------------------------------------------------------------------------


def render(captured: Captured) -> str:
    """Return the text of the graph, as dumps hold it."""
    return render_graph(captured.gm.graph, captured.ctx.env.parameters)


def assert_golden(name: str, text: str) -> None:
    """Compare with `golden/<name>.txt`; `SPARSE_COMPILE_UPDATE_GOLDEN=1` writes it."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("SPARSE_COMPILE_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), (
        f"{path.name} differs: read the diff, then update it if it is meant"
    )


# --- Running ----------------------------------------------------------------------------------------------------------


def aot_eager(gm: fx.GraphModule, example_inputs: Sequence[Any], *_: Any) -> Callable[..., Any]:
    """Compile as Inductor would (AOTAutograd, min-cut partitioner), with the graphs run op by op."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    def compiler(graph: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)(
        gm, list(example_inputs)
    )


def graph_eager(gm: fx.GraphModule, example_inputs: Sequence[Any], *_: Any) -> Callable[..., Any]:
    """Run a graph op by op under plain autograd, as Dynamo handed it over or the passes left it.

    A fifth of the time of `aot_eager`, and as good for what a rewrite computes and what its formulas give. Only
    AOTAutograd shows what the partitioner recomputes, how operators trace under fake tensors, and guards on sizes.
    """
    return gm.forward


class Ran(NamedTuple):
    """The result of a rewritten function, and the pipeline's outcome."""

    value: Any
    result: PipelineResult
    ctx: PassContext


def run_rewritten(
    function: Callable[..., Any],
    *args: Any,
    config: SparseLoRAConfig | None = None,
    only: tuple[str, ...] = (),
    compiler: Callable[..., Callable[..., Any]] = graph_eager,
    **kwargs: Any,
) -> Ran:
    """Run `function` with its graph rewritten: by the whole pipeline, or by the passes named in `only`.

    Args:
        function: A module or a function that closes over modules.
        *args: Its arguments.
        config: Options of the context.
        only: Names of passes; all of them if there is none.
        compiler: `graph_eager` or `aot_eager`.
        **kwargs: More of its arguments.
    """
    seen: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        ctx = capture_context(gm, example_inputs, config or SparseLoRAConfig())
        order = [each for each in PASSES if each.name in only] if only else PASSES
        result = run_pipeline(gm, ctx, order=order)
        seen.extend((result, ctx))
        compiled = compiler(result.sparse or result.exact or result.canonical, example_inputs)
        return restored(compiled, gm, ctx.facts.loss_rows) if ctx.facts.loss_rows else compiled

    torch._dynamo.reset()
    value = torch.compile(function, backend=backend, fullgraph=True)(*args, **kwargs)
    return Ran(value, *seen)


def gradients_of(value: Tensor, module: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a scalar, by name of what is trained and by position of the given inputs."""
    wanted = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    wanted |= {str(i): x for i, x in enumerate(inputs)}
    found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


def assert_like_masked_dense(
    model: nn.Module,
    *args: Tensor,
    labels: Tensor,
    config: SparseLoRAConfig,
    sites: Callable[[dict[str, Tensor]], Sequence[MaskedFFN | MaskedAttention]],
    compiler: Callable[..., Callable[..., Any]] = graph_eager,
) -> Ran:
    """Assert that loss and gradients of the rewritten model are those of the oracle at the channels it chose.

    Args:
        model: An fp64 model that returns its loss.
        *args: Its inputs.
        labels: The labels among them.
        config: What to make sparse.
        sites: Describes the sites to the oracle, given the chosen channels by name.
        compiler: `graph_eager` or `aot_eager`.
    """
    with record_channels() as chosen:
        ran = run_rewritten(model, *args, config=config, compiler=compiler)
    assert ran.result.sparse is not None, ran.result.rejections
    kept = {site: found[0] for site, found in chosen.items()}
    actual = gradients_of(ran.value, model)
    with masked_dense(sites(kept), output_mask_from_labels(labels)):
        expected_loss = model(*args)
        # Inside: a checkpoint runs the forward again.
        expected = gradients_of(expected_loss, model)
    assert_close_rms(ran.value, expected_loss, name="loss")
    for name, gradient in expected.items():
        assert_close_rms(actual[name], gradient, name=name)
    assert (model(*args) - ran.value).abs() > 1e-6, "sparsity changes nothing here: this model tests nothing"
    return ran


# --- Small modules ----------------------------------------------------------------------------------------------------


def frozen(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill a module with seeded fp64 normals; train its LoRA factors alone."""
    module.double().requires_grad_(False)
    randomize(module, seed)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return module


def lora(inputs: int, outputs: int, *, bias: bool = False, rank: int = 2) -> LoRALinear:
    """A linear layer with an adapter."""
    return LoRALinear(nn.Linear(inputs, outputs, bias=bias), rank, 2.0)


class MLP(nn.Module):
    """An ungated feed-forward block, 8 to 12 to 8, with an adapter on either layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = lora(8, 12), lora(12, 8)
        frozen(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class Head(nn.Module):
    """A body between an embedding and a causal loss: the smallest model with roles.

    The loss is spelt with a slice of the logits, unless another `loss` of (logits, labels) is given.
    """

    def __init__(
        self, *body: nn.Module, hidden: int = 8, vocab: int = 11, loss: Callable[[Tensor, Tensor], Tensor] | None = None
    ):
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.body = nn.Sequential(*body)
        self.head = lora(hidden, vocab)
        self.loss = loss or causal_loss
        frozen(self)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.body(self.embed(input_ids))
        # Tokens read their predecessors, or context tokens would have no part in the loss.
        return self.loss(self.head(x + 0.3 * x.cumsum(1)), labels)


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


def tokens(
    rows: int = 2, length: int = 6, vocab: int = 11, *, context: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return `(input_ids, labels)`, the first `context` labels of each row ignored."""
    ids = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :context] = IGNORE
    return ids, labels


def without_numbers(text: str) -> str:
    """Return a text with its numbers replaced, to compare messages that hold sizes or names of nodes."""
    return re.sub(r"\d+", "#", text)
