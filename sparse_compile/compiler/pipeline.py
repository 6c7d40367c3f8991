"""The ordered list of passes, and what runs it.

Data flows one way: captured graph -> one flat graph -> canonical linears -> sites -> roles -> plan -> exact
optimisations -> predictors -> sparse products -> providers. A transform works on a copy that is swapped in when the
verifier agrees, so a pass that raises leaves nothing half-done.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx

from sparse_compile.compiler.verify import VerificationError, verify
from sparse_compile.graph.facts import Rejection, SparsityPlan
from sparse_compile.graph.rewrite import copy_graph_module
from sparse_compile.passes.canonical.canonicalize_linears import CanonicalizeLinears
from sparse_compile.passes.canonical.expose_4bit_weights import Expose4BitWeights
from sparse_compile.passes.canonical.inline_checkpoint_bodies import InlineCheckpointBodies
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.exact.factor_dora_norm import FactorDoRANorm
from sparse_compile.passes.exact.fuse_adapters import FuseAdapters
from sparse_compile.passes.exact.order_adapter_products import OrderAdapterProducts
from sparse_compile.passes.exact.select_loss_rows import SelectLossRows
from sparse_compile.passes.lower.fuse_adapted_layers import FuseAdaptedLayers
from sparse_compile.passes.lower.fuse_products import FuseProducts
from sparse_compile.passes.lower.fuse_scores import FuseScores
from sparse_compile.passes.lower.lower_causal_attention import LowerCausalAttention
from sparse_compile.passes.lower.lower_frozen_linears import LowerFrozenLinears
from sparse_compile.passes.lower.lower_sparse_ops import LowerSparseOps
from sparse_compile.passes.protocol import InvalidOptionError, Numerics, Pass, PassOutcome, RequestedFunctionError
from sparse_compile.passes.requested.preserve_weight_mask import PreserveWeightMask
from sparse_compile.passes.roles.plan_sparsity import PlanSparsity
from sparse_compile.passes.roles.plan_token_slots import PlanTokenSlots
from sparse_compile.passes.roles.trace_roles import TraceRoles
from sparse_compile.passes.sites.find_attention import FindAttention
from sparse_compile.passes.sites.find_ffn import FindFFN
from sparse_compile.passes.sites.find_projections import FindProjections
from sparse_compile.passes.sparse.insert_predictors import InsertPredictors
from sparse_compile.passes.sparse.sparsify_attention import SparsifyAttention
from sparse_compile.passes.sparse.sparsify_ffn import SparsifyFFN

if TYPE_CHECKING:
    from sparse_compile.compiler.dump import GraphDump


_SPARSE_STAGES = {"predictors", "sparse", "lowered"}
"""What a graph without sparse sites never goes through."""


def passes() -> tuple[Pass, ...]:
    """Return the passes in the order in which they run."""
    return (
        InlineCheckpointBodies(),  # first: every other pass sees one flat graph
        Expose4BitWeights(),  # before the spelling of linear layers: it writes them in one
        CanonicalizeLinears(),  # one spelling of a linear layer for all analyses
        FindProjections(),  # frozen layers and their adapters: what sites are made of
        FindFFN(),
        FindAttention(),
        TraceRoles(),  # independent of the sites: from the loss back to the labels
        PlanTokenSlots(),  # needs the roles: what was counted must be what the graph reads
        PlanSparsity(),  # needs all facts; computes the predictor's factors
        SelectLossRows(),  # before the sparse passes: what it narrows needs no sparsity any more
        PreserveWeightMask(),  # after the plan, which masked sites leave; before what merges or fuses their adapters
        OrderAdapterProducts(),  # needs the plan: a sparse site is never merged
        FuseAdapters(),  # after it: a merged adapter has no product of its own left
        FactorDoRANorm(),  # after the analyses, which follow the norm's vector and not what it is computed from
        InsertPredictors(),  # before the rewrites: scores read the inputs of sites, which the rewrites keep
        SparsifyFFN(),
        SparsifyAttention(),
        FuseProducts(),  # behind what gathers products, before a provider is chosen for those that it leaves
        FuseScores(),  # behind what reads the choices of channels, which stay: it replaces what they rank
        FuseAdaptedLayers(),  # behind it, and behind what merges or stacks adapters: it takes the sums that are left
        LowerSparseOps(),  # last: a choice for each op that is left
        LowerFrozenLinears(),  # and for each dense product: all passes before it read them as `linear`
        LowerCausalAttention(),  # likewise: attention is found, and rows of the loss are selected, by its own name
    )


def evaluation_passes() -> tuple[Pass, ...]:
    """Return the passes of a graph without gradients: what changes the function itself, by request."""
    needed = ("expose_4bit_weights", "canonicalize_linears", "find_projections")
    return tuple(each for each in passes() if each.name in needed or each.numerics is Numerics.REQUESTED)


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to one graph.

    Attributes:
        name: the pass.
        numerics: `"exact"`, `"approximate"` or `"requested"`.
        changed: whether the graph was rewritten.
        milliseconds: time it took, verification included.
        nodes_before, nodes_after: size of the graph.
        stats: counts of the pass's own.
        skipped: why it did not run; empty where it ran.
    """

    name: str
    numerics: str
    changed: bool
    milliseconds: float
    nodes_before: int
    nodes_after: int
    stats: dict[str, int] = field(default_factory=dict)
    skipped: str = ""


@dataclass(frozen=True)
class PipelineResult:
    """The outcome of the pipeline.

    Attributes:
        sparse: the graph with sparse sites, or None where no approximate pass changed anything.
        exact: the graph that has none, or None where no exact pass saved anything and no option changed the function:
            then the captured graph is as good. Beside a sparse graph it is what runs where that does not compile, and
            lacks the optimisations that come behind the sparse passes.
        canonical: the graph before the first pass that saves work.
        records: one per pass.
        rejections: every place where a pass looked and did not apply.
        failed: whether an approximate pass raised, which the user was told.
    """

    sparse: fx.GraphModule | None
    exact: fx.GraphModule | None
    canonical: fx.GraphModule
    records: tuple[PassRecord, ...]
    rejections: tuple[Rejection, ...]
    failed: bool = False


def run_pipeline(
    captured: fx.GraphModule, ctx: PassContext, dump: GraphDump | None = None, order: Sequence[Pass] | None = None
) -> PipelineResult:
    """Run the passes over a captured graph.

    Where an approximate pass raises, all approximate passes are undone and the graph goes on without them, with one
    warning; `strict=True` raises instead. A pass named in `disable`, or one that requires a stage that was not
    reached, is skipped with the reason in its record. What an option asks for is neither undone nor skipped.

    Args:
        captured: the graph; it is not changed.
        ctx: the context, whose facts are filled in.
        dump: where to write the graph after each pass.
        order: the passes; None for `passes()`.

    Raises:
        InvalidOptionError: an option is wrong that only a pass can check, such as a file that is not there.
        RequestedFunctionError: a pass that changes the function by request raised, or left an illegal graph.
        VerificationError: in strict mode, if a pass leaves an illegal graph.
    """
    runner = _Runner(captured, ctx, dump)
    if dump is not None:
        dump.graph("captured", captured.graph, ctx.parameters)
    for each in passes() if order is None else order:
        runner.step(each)
    return runner.result()


class _Runner:
    def __init__(self, captured: fx.GraphModule, ctx: PassContext, dump: GraphDump | None) -> None:
        self.captured = captured
        self.ctx = ctx
        self.dump = dump
        self.current = captured
        self.exact = captured
        self.canonical = captured
        self.optimised = False
        self.stages = {"captured"}
        self.records: list[PassRecord] = []
        self.rejections: list[Rejection] = []
        self.failed = False

    def step(self, each: Pass) -> None:
        """Run one pass, or record why it is skipped."""
        before = len(self.current.graph.nodes)
        reason = self._reason_to_skip(each)
        if reason and each.name in self.ctx.config.requested:
            raise _not_made(each, f"it {reason}")
        if reason:
            self.records.append(PassRecord(each.name, each.numerics.value, False, 0.0, before, before, {}, reason))
            if each.analysis and each.name in self.ctx.config.disable:
                self.stages |= set(each.ensures)  # nothing was found is a fact as well
            return
        start = time.perf_counter()
        try:
            outcome = self._run(each)
        except Exception as error:
            if self.ctx.config.strict or isinstance(error, InvalidOptionError):
                raise
            if each.name in self.ctx.config.requested:
                raise _not_made(each, _described(error)) from error
            outcome = self._undo(each, error)
        elapsed = 1e3 * (time.perf_counter() - start)
        after = len(self.current.graph.nodes)
        self.records.append(
            PassRecord(each.name, each.numerics.value, outcome.changed, elapsed, before, after, dict(outcome.stats))
        )
        self.rejections += outcome.rejections
        if self.dump is not None:
            self.dump.graph(each.name, self.current.graph, self.ctx.parameters)

    def result(self) -> PipelineResult:
        """Return the outcome."""
        rewritten = any(record.changed and record.name.startswith("sparsify_") for record in self.records)
        return PipelineResult(
            sparse=self.current if rewritten and not self.failed else None,
            exact=self.exact if self.optimised else None,
            canonical=self.canonical,
            records=tuple(self.records),
            rejections=tuple(self.rejections),
            failed=self.failed,
        )

    def _reason_to_skip(self, each: Pass) -> str:
        if each.name in self.ctx.config.disable:
            return "disabled"
        if each.optimises and self.ctx.config.preset == "none":
            return "preset 'none'"
        if self.failed and each.numerics is Numerics.APPROXIMATE:
            return "an approximate pass failed"
        missing = [stage for stage in each.requires if stage not in self.stages]
        return f"needs {', '.join(missing)}" if missing else ""

    def _run(self, each: Pass) -> PassOutcome:
        work = self.current if each.analysis else copy_graph_module(self.current)
        outcome = each.run(work, self.ctx)
        reached = self.stages | set(each.ensures)
        if outcome.changed:
            self._check(work, reached)
            if each.numerics is not Numerics.APPROXIMATE and not self.ctx.selections:
                self.exact = work
                self.optimised |= each.optimises or each.numerics is Numerics.REQUESTED
                if not self.optimised:
                    self.canonical = work
            self.current = work
        self.stages = reached
        return outcome

    def _check(self, work: fx.GraphModule, stages: set[str]) -> None:
        verify(work, self.captured, stages, self.ctx.parameters, self.ctx.loss_rows)
        work.recompile()

    def _undo(self, each: Pass, error: Exception) -> PassOutcome:
        """Go on without a pass that raised: the graph before it, or before all approximate passes."""
        reason = _described(error)
        if each.numerics is Numerics.APPROXIMATE or (self.ctx.selections and not each.optimises):
            self.failed = True
            self.current = self.exact
            self.ctx.plan = SparsityPlan(())
            self.ctx.selections = {}
            self.stages -= _SPARSE_STAGES
            consequence = "this graph runs dense"
        else:
            consequence = "the pass is left out"
        warnings.warn(f"sparselora: {each.name} failed, {consequence}. {reason}", stacklevel=2)
        return PassOutcome(False, {}, (Rejection(each.name, "graph", reason),))


def _described(error: Exception) -> str:
    kind = "internal error" if isinstance(error, VerificationError) else type(error).__name__
    return f"{kind}: {error}"


def _not_made(each: Pass, reason: str) -> RequestedFunctionError:
    return RequestedFunctionError(
        f"{each.name} failed, and without it this graph would compute another function than the one asked for. {reason}"
    )
