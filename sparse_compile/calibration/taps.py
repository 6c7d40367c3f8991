"""Run a model with taps: they hand on what a feed-forward block reads and returns, or put a map there.

The graphs that Dynamo captures are analysed as in training and run eagerly: sites are found by structure here too, and
no module of the model is named or hooked. Taps on the residual stream (`stream.py`) let context tokens leave it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

import sparse_compile.kernels  # noqa: F401  (registers torch.ops.sparselora)
from sparse_compile.calibration.blocks import Block, cut_block, gets_gradient
from sparse_compile.calibration.exits import AttentionPart, Exit, Exits, find_exits
from sparse_compile.calibration.stream import Pair, Stream, tap_stream
from sparse_compile.compiler.capture import capture_context
from sparse_compile.compiler.model_part import part_of
from sparse_compile.compiler.peft_support import make_dora_traceable
from sparse_compile.compiler.pipeline import ANALYSIS_PASSES
from sparse_compile.compiler.runner import run_pipeline
from sparse_compile.graph.cost import projection_flops
from sparse_compile.graph.declined import Declined
from sparse_compile.graph.read import nodes_by_name
from sparse_compile.graph.rewrite import Rewriter, copy_graph_module
from sparse_compile.graph.sites import FFNSite
from sparse_compile.kernels.observed_rows.registry import Observer
from sparse_compile.options.config import SparseLoRAConfig
from sparse_compile.options.recipe import AffineMap, ExitRecipe
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.read.token_space import token_space
from sparse_compile.passes.roles.plan_sparsity import weights_fingerprint
from sparse_compile.passes.write.output_mask import insert_output_mask
from sparse_compile.torch_private.dynamo import without_recompile_limit
from sparse_compile.torch_private.modules import calling, compiled_call, original_module

__all__ = ["Tap", "TappedModel"]


class Tap(nn.Module):
    """Stands behind a feed-forward site.

    Attributes:
        in_features, out_features: widths of what the block reads and returns.
        differentiated: whether what it reads gets a gradient in training.
        flops: of the block's frozen products for one token in a training step.
        weights: fingerprint of its frozen weights.
        probe: who is shown what the block reads, and which tokens are context, (B, S); None for nobody.
        collect: where rows of context tokens go; None for nowhere.
        surrogate: what context tokens get in place of the block's result; None for the result.
    """

    def __init__(self, site: FFNSite, ctx: PassContext, *, differentiated: bool) -> None:
        super().__init__()
        self.in_features = site.inputs[0].in_features
        self.out_features = site.output.out_features
        self.differentiated = differentiated
        products = sum(projection_flops(each) for each in site.projections)
        self.flops = products if differentiated else products / 2
        self.weights = weights_fingerprint([site], ctx)
        self.probe: Callable[[Tensor, Tensor], None] | None = None
        self.collect: Observer | None = None
        self.surrogate: AffineMap | None = None

    def map_flops(self, rank: int) -> float:
        """Return the FLOPs of a map in the block's place, for one token in a training step."""
        return 2.0 * rank * (self.in_features + self.out_features) * (2 if self.differentiated else 1)

    def forward(self, x: Tensor, y: Tensor, output_mask: Tensor, attended: Tensor | None) -> Tensor:
        """Return y, (..., out), or the map of x at context tokens.

        Args:
            x: (..., in), over the tokens.
            y: (..., out).
            output_mask: bool (B, S), true at output tokens.
            attended: bool (B, S), false at padding; None where nothing is.
        """
        context = ~output_mask
        if self.probe is not None:
            self.probe(x, context)
        if self.collect is not None:
            scored = (context if attended is None else context & attended).reshape(-1)
            self.collect(x.reshape(-1, x.shape[-1])[scored], y.reshape(-1, y.shape[-1])[scored])
        if self.surrogate is None:
            return y
        # As in training, a map is rounded to the dtype of the block it stands for.
        q, u, bias = (each.to(y) for each in (self.surrogate.q, self.surrogate.u, self.surrogate.bias))
        mapped = x.to(y.dtype) @ q.mT @ u.mT + bias
        return torch.where(context.reshape(*y.shape[:-1], 1), mapped, y)


class TappedModel:
    """A model whose forward runs with taps, without gradients and without its own dropout.

    Args:
        model: the model, compiled or not; it is left as it is.
        config: the options that matter to roles.

    Attributes:
        taps: by site name, in the order of the model; known once it has run.
        blocks: by site name, the block alone; only of sites whose weights are at hand.
        declined: by site name, why a site has no tap.
        exits: by name of its attention block, where context may leave, the deepest first.
        attention: by name, each attention block that context may have left.
        stays: why there is no exit; empty where there are some.
    """

    def __init__(self, model: nn.Module, config: SparseLoRAConfig) -> None:
        self.model = original_module(model)
        self.config = config
        self.taps: dict[str, Tap] = {}
        self.blocks: dict[str, Block] = {}
        self.declined: dict[str, str] = {}
        self.exits: dict[str, Exit] = {}
        self.attention: dict[str, AttentionPart] = {}
        self.stays = ""
        self._stream = Stream()
        make_dora_traceable()
        itself = weakref.ref(self)

        def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            tapped = itself()  # Dynamo keeps a backend, and must keep no model alive
            assert tapped is not None, "a graph is captured during a call"
            return tapped._backend(gm, example_inputs)

        self._call = compiled_call(self.model, backend)

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """Run a forward; return what the model returns."""
        training = [module for module in self.model.modules() if module.training]
        try:
            self.model.eval()
            with calling(self.model, self._call), torch.no_grad(), without_recompile_limit():
                return self.model(**batch)
        finally:
            self._stream.forget()
            for module in training:
                module.training = True

    def put(self, surrogates: Mapping[str, AffineMap], exit_: ExitRecipe | None = None) -> None:
        """Have context get these maps in place of the sites named and of no others, and leave at an exit or none."""
        self._stream.exit = exit_
        for name, tap in self.taps.items():
            tap.surrogate = surrogates.get(name)

    def collect(self, collectors: Mapping[str, Observer], changes: Mapping[Pair, Observer] | None = None) -> None:
        """Hand on rows of the sites named and of no others, and changes of the stream between the blocks of pairs."""
        self._stream.collect = changes or {}
        for name, tap in self.taps.items():
            tap.collect = collectors.get(name)

    def probe(self, probes: Mapping[str, Callable[[Tensor, Tensor], None]]) -> None:
        """Show what the sites named read, and which tokens are context, and nothing of any other."""
        for name, tap in self.taps.items():
            tap.probe = probes.get(name)

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        ctx = capture_context(gm, example_inputs, self.config, part_of(gm))
        canonical = run_pipeline(gm, ctx, order=ANALYSIS_PASSES).canonical
        if ctx.facts.roles is None:
            reason = "nothing tells output tokens from context"
            self.declined |= {site.name: reason for site in ctx.facts.ffn_sites}
            return gm.forward
        tapped = copy_graph_module(canonical)
        space = token_space(tapped.graph, ctx.facts.roles)
        sites = [site for site in ctx.facts.ffn_sites if site.source in space]
        self.declined |= {
            site.name: "the loss is computed for other tokens than this site's"
            for site in ctx.facts.ffn_sites
            if site.source not in space
        }
        if not sites:
            return gm.forward
        self._tap(tapped, sites, ctx)
        return tapped.forward

    def keep_context(self, reason: str) -> None:
        """Try no exit, for a reason."""
        self.exits.clear()
        self.stays = reason

    def _find_exits(self, gm: fx.GraphModule, ctx: PassContext) -> Exits | None:
        """Return the exits of a graph; None where context stays. A graph for other sizes has those there are."""
        if self.stays:
            return None
        try:
            found = find_exits(gm, ctx)
        except Declined as declined:
            self.keep_context(declined.reason)
            return None
        if not self.exits:
            self.exits, self.attention = dict(found.exits), dict(found.parts)
        return found

    def _tap(self, gm: fx.GraphModule, sites: Sequence[FFNSite], ctx: PassContext) -> None:
        """Put taps behind sites, and on the residual stream."""
        exits = self._find_exits(gm, ctx)
        rewriter = Rewriter(gm, "calibration")
        nodes = nodes_by_name(gm.graph)
        for site in (
            each for each in sites if each.name not in self.taps
        ):  # a graph for other sizes has those there are
            self.taps[site.name] = Tap(site, ctx, differentiated=gets_gradient(gm, site, ctx))
            if (block := cut_block(gm, site.source, site.output.output, ctx)) is not None:
                self.blocks[site.name] = block
        top = next(node for node in gm.graph.nodes if node.op != "placeholder")
        with rewriter.before(top):
            mask, attended = insert_output_mask(rewriter, ctx, nodes[sites[0].source])
        for number, site in enumerate(sites):
            tap = self.taps[site.name]
            gm.add_submodule(f"sparselora_tap_{number}", tap)
            x, y = nodes[site.source], nodes[site.output.output]
            readers = list(y.users)
            with gm.graph.inserting_after(y):
                tapped = gm.graph.call_module(f"sparselora_tap_{number}", (x, y, mask, attended))
            for reader in readers:
                reader.replace_input_with(y, tapped)
        if exits is not None:
            dtypes = {name: part.dtype for name, part in exits.parts.items()}
            tap_stream(gm, exits.inputs, self._stream, dtypes, (mask, attended))
        gm.recompile()
