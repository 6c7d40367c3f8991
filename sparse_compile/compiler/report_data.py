"""What was found in the graphs of a training step, and what was done about it, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sparse_compile.compiler.capture import TokenCounts
from sparse_compile.compiler.graph_texts import GraphTexts
from sparse_compile.compiler.runner import PassRecord
from sparse_compile.graph.facts import MaskedLayer, ProductOrder, Rejection

__all__ = ["GraphReport", "PassReport", "SiteReport", "StepReport"]


@dataclass(frozen=True)
class SiteReport:
    """One matched site, dense or sparse.

    Attributes:
        name: site name, as `layer_sparsity` takes it.
        kind: `"ffn"` or `"attention"`.
        sparsity: fraction of channels not computed for context tokens; 0 where dense.
        kept: channels kept.
        total: channels to choose from.
        provider: what runs its products: `"map of rank 32"` where a map stands in its place for context tokens,
            `"context left"` where they have left the residual stream before it,
            `"dense"` where nothing was rewritten, `"loss_rows"` where only rows of the loss are left of a block that
            was to be sparse.
        reason: why it stays dense although it was asked for, or a note.
        adapters: number of LoRA branches at the site.
        left: whether context tokens have left the residual stream before it.
        why_dense: why it is dense, asked for or not; empty where it is sparse.
    """

    name: str
    kind: str
    sparsity: float
    kept: int
    total: int
    provider: str
    reason: str
    adapters: int
    left: bool = False
    why_dense: str = ""

    @property
    def sparse(self) -> bool:
        """Whether less is computed of context tokens than of output tokens."""
        return self.left or self.kept < self.total


@dataclass(frozen=True)
class PassReport:
    """One pass: what it did (`record`) and the FLOPs of a training step before and after it."""

    record: PassRecord
    flops_before: float
    flops_after: float


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph.

    Attributes:
        compile_id: Dynamo's name of the compilation.
        roles: where token roles come from: `"cross_entropy"`, `"labels"`, `"given"`, or None.
        tokens: what FLOPs are given for.
        projections, adapters: number of frozen linear layers, and of LoRA branches beside them.
        frozen_adapters: number of those branches that are not trained.
        sites: every matched site.
        passes: every pass.
        masks: the pruned layers with an adapter, where their zeros are to be kept.
        orders: the order of the products of each layer that could have another.
        rejections: every place where a pass looked and did not apply.
        places: where in the model the nodes stand that rejections name; nodes without a place there are left out.
        all_trained: whether every parameter is trained, so that no layer is frozen.
        flops_before, flops_after: FLOPs of the matrix products of a training step, as captured and as it will run.
        weight_flops_before, weight_flops_after: those of the products with frozen weights alone.
    """

    compile_id: str
    roles: str | None
    tokens: TokenCounts
    projections: int
    adapters: int
    frozen_adapters: int
    sites: tuple[SiteReport, ...]
    passes: tuple[PassReport, ...]
    masks: tuple[MaskedLayer, ...]
    orders: tuple[ProductOrder, ...]
    rejections: tuple[Rejection, ...]
    places: Mapping[str, str]
    all_trained: bool
    flops_before: float
    flops_after: float
    weight_flops_before: float
    weight_flops_after: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class StepReport:
    """What `explain` found: one training step of a model, which may arrive in several graphs.

    Attributes:
        graphs: one report per graph.
        options: the options that it is for, those that differ from the defaults, and the preset.
        options_from: where they come from: `"config"` (the argument), `"the compiled model"`, `"the defaults"`, ...
        texts: of each graph, its text after each pass.
        expected_seconds: what the calibration of a recipe says of a step: of a dense one as it was measured, and of a
            sparse one as it is expected; None where nothing was measured.
        untrained: why there is no graph, where there is none.
    """

    graphs: tuple[GraphReport, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    options_from: str = "the defaults"
    texts: tuple[GraphTexts, ...] = field(default=(), repr=False, compare=False)
    expected_seconds: tuple[float, float] | None = None
    untrained: str = "no graph was captured"

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """Every matched site of every graph."""
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """Every place where a pass looked and did not apply."""
        return tuple(rejection for graph in self.graphs for rejection in graph.rejections)

    @property
    def flops_before(self) -> float:
        """FLOPs of the matrix products of the training step as captured."""
        return sum(graph.flops_before for graph in self.graphs)

    @property
    def flops_after(self) -> float:
        """FLOPs of the training step as it will run."""
        return sum(graph.flops_after for graph in self.graphs)
