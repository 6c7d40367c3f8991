"""Runs passes over a captured graph.

A pass either succeeds, and the verifier agrees, or it leaves no trace: a transform works on a copy of the graph, facts
are immutable, and both are put back where it fails. What then runs is what `disable=[...]` of that pass gives.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import sympy
from torch import fx

from sparse_compile.compiler.pipeline import PASSES
from sparse_compile.compiler.verify import VerificationError, verify
from sparse_compile.graph.facts import Rejection
from sparse_compile.graph.flops import StepFlops, step_flops
from sparse_compile.graph.rewrite import copy_graph_module
from sparse_compile.passes.context import PassContext
from sparse_compile.passes.protocol import InvalidOptionError, Numerics, Pass, PassOutcome, RequestedFunctionError
from sparse_compile.training.progress import stage

if TYPE_CHECKING:
    from sparse_compile.compiler.graph_texts import GraphTexts


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
        sparse: the graph with sparse sites, or None where no pass made any.
        exact: the graph that has none, or None where no exact pass saved anything and no option changed the function:
            then the captured graph is as good. Beside a sparse graph it is what runs where that does not compile, and
            lacks the optimisations that come behind the sparse passes.
        canonical: the graph before the first pass that saves work.
        records: one per pass.
        flops_before: of a training step as captured, in its canonical spelling: what is packed is counted there.
        flops: of a training step after each pass.
        flops_after: of a training step of the graph that runs.
        rejections: every place where a pass looked and did not apply.
        made_sparse: kinds of sites that were rewritten.
        failed: passes that raised, or left an illegal graph, of which the user was told.
    """

    sparse: fx.GraphModule | None
    exact: fx.GraphModule | None
    canonical: fx.GraphModule
    records: tuple[PassRecord, ...]
    flops_before: StepFlops
    flops: tuple[StepFlops, ...]
    flops_after: StepFlops
    rejections: tuple[Rejection, ...]
    made_sparse: frozenset[str]
    failed: tuple[Pass, ...] = ()

    @property
    def failed_to_approximate(self) -> bool:
        """Whether a pass failed that would have made the graph sparse."""
        return any(each.numerics is Numerics.APPROXIMATE for each in self.failed)


def run_pipeline(
    captured: fx.GraphModule, ctx: PassContext, dump: GraphTexts | None = None, order: Sequence[Pass] = PASSES
) -> PipelineResult:
    """Run passes over a captured graph.

    A pass that fails is left out, with one warning; `strict=True` raises instead. A pass named in `disable`, or one
    that requires a stage that was not reached, is skipped with the reason in its record. A pass that an option asks for
    is neither left out nor skipped.

    Args:
        captured: the graph; it is not changed.
        ctx: the context, whose facts are filled in.
        dump: what keeps the text of the graph after each pass, or writes it.
        order: the passes.

    Raises:
        InvalidOptionError: an option is wrong that only a pass can check, such as a file that is not there.
        RequestedFunctionError: a pass that changes the function by request raised, or left an illegal graph.
        VerificationError: in strict mode, if a pass leaves an illegal graph.
    """
    runner = _Runner(captured, ctx, dump)
    if dump is not None:
        dump.graph("captured", captured.graph, ctx.env.parameters)
    for each in order:
        runner.step(each)
    return runner.result()


class _Runner:
    def __init__(self, captured: fx.GraphModule, ctx: PassContext, dump: GraphTexts | None) -> None:
        self.captured = captured
        self.ctx = ctx
        self.dump = dump
        self.current = captured
        self.unused_copy: fx.GraphModule | None = None  # of the current graph
        self.exact = captured
        self.canonical = captured
        self.approximate = False
        self.optimised = False
        self.stages = {"captured"}
        self.unknown: set[str] = set()  # stages whose analysis was left out
        self.records: list[PassRecord] = []
        self.flops: list[StepFlops | None] = []
        self.exact_flops: StepFlops | None = None
        self.rejections: list[Rejection] = []
        self.made_sparse: set[str] = set()
        self.failed: list[Pass] = []

    def step(self, each: Pass) -> None:
        """Run one pass, or record why it is skipped."""
        before = len(self.current.graph.nodes)
        reason = self._reason_to_skip(each)
        if each.name in self.ctx.env.config.requested:
            unknown = [stage for stage in each.requires if stage in self.unknown]
            if reason or unknown:
                raise _not_made(each, f"it {reason or 'needs ' + ', '.join(unknown)}")
        if reason:
            if each.name in self.ctx.env.config.disable:
                self._leave_out(each)
            self._record(PassRecord(each.name, each.numerics.value, False, 0.0, before, before, {}, reason))
            return
        stage(f"pass {each.name}")
        start = time.perf_counter()
        outcome = self._run(each)
        elapsed = 1e3 * (time.perf_counter() - start)
        after = len(self.current.graph.nodes)
        self.rejections += outcome.rejections
        stats = dict(outcome.stats)
        self._record(PassRecord(each.name, each.numerics.value, outcome.changed, elapsed, before, after, stats))
        if self.dump is not None:
            self.dump.graph(each.name, self.current.graph, self.ctx.env.parameters)

    def result(self) -> PipelineResult:
        """Return the outcome."""
        before = next((flops for flops in self.flops if flops is not None), None) or self._count(self.captured)
        flops = tuple(before if each is None else each for each in self.flops)
        runs = flops[-1] if self.made_sparse and flops else self.exact_flops or before
        return PipelineResult(
            sparse=self.current if self.made_sparse else None,
            exact=self.exact if self.optimised else None,
            canonical=self.canonical,
            records=tuple(self.records),
            flops_before=before,
            flops=flops,
            flops_after=runs,
            rejections=tuple(self.rejections),
            made_sparse=frozenset(self.made_sparse),
            failed=tuple(self.failed),
        )

    def _reason_to_skip(self, each: Pass) -> str:
        if each.name in self.ctx.env.config.disable:
            return "disabled"
        if each.optimises and self.ctx.env.config.preset == "none":
            return "preset 'none'"
        missing = [stage for stage in each.requires if stage not in self.stages]
        return f"needs {', '.join(missing)}" if missing else ""

    def _leave_out(self, each: Pass) -> None:
        """Go on without a pass. That an analysis found nothing is a fact as well, but for what an option asks for."""
        if each.analysis:
            self.stages |= set(each.ensures)
            self.unknown |= set(each.ensures)

    def _run(self, each: Pass) -> PassOutcome:
        """Run a pass and verify what it left; put everything back where either fails."""
        facts, results = self.ctx.facts, self.ctx.results
        work = self.current if each.analysis else self._copy()
        try:
            outcome = each.run(work, self.ctx)
            reached = self.stages | set(each.ensures)
            verify(work, self.captured, reached, self.ctx, changed=outcome.changed, before=self.current)
        except Exception as error:
            self.ctx.facts, self.ctx.results = facts, results
            if self.ctx.env.config.strict or isinstance(error, InvalidOptionError):
                raise
            if each.name in self.ctx.env.config.requested:
                raise _not_made(each, _described(error)) from error
            self.failed.append(each)
            self._leave_out(each)
            reason = _described(error)
            dense = " Sites that need it stay dense." if each.numerics is Numerics.APPROXIMATE else ""
            warnings.warn(
                f"sparselora: {each.name} failed, the pass is left out. {reason.rstrip('.')}.{dense}", stacklevel=2
            )
            return PassOutcome(False, {}, (Rejection(each.name, "graph", reason),))
        self.stages = reached
        if outcome.changed:
            self._swap_in(each, work)
        elif not each.analysis:
            self.unused_copy = work
        return outcome

    def _copy(self) -> fx.GraphModule:
        """Return a copy of the current graph: the one that the pass before left as it was, if there is one."""
        copy, self.unused_copy = self.unused_copy, None
        return copy or copy_graph_module(self.current)

    def _swap_in(self, each: Pass, work: fx.GraphModule) -> None:
        """Go on with the graph that a pass rewrote."""
        work.recompile()
        self.current = work
        self.approximate |= each.numerics is Numerics.APPROXIMATE
        if each.sparsifies:
            self.made_sparse.add(each.sparsifies)
        if not self.approximate:
            self.exact = work
            self.optimised |= each.optimises or each.numerics is Numerics.REQUESTED
            if not self.optimised:
                self.canonical = work

    def _record(self, record: PassRecord) -> None:
        self.records.append(record)
        last = self.flops[-1] if self.flops else None
        if "canonical" in self.stages and (record.changed or last is None):
            last = self._count(self.current)
        self.flops.append(last)
        if not self.approximate:
            self.exact_flops = last

    def _count(self, gm: fx.GraphModule) -> StepFlops:
        """Count FLOPs: what is reported of a graph must not keep it from being compiled."""
        try:
            return step_flops(gm.graph)
        except Exception as error:
            if self.ctx.env.config.strict:
                raise
            warnings.warn(f"sparselora: the FLOPs of a graph were not counted. {_described(error)}", stacklevel=2)
            return StepFlops(sympy.nan, sympy.nan)


def _described(error: Exception) -> str:
    kind = "internal error" if isinstance(error, VerificationError) else type(error).__name__
    return f"{kind}: {error}"


def _not_made(each: Pass, reason: str) -> RequestedFunctionError:
    return RequestedFunctionError(
        f"{each.name} failed, and without it this graph would compute another function than the one asked for. {reason}"
    )
